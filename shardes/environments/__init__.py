"""Environments: episodes of many turns, in worker processes."""
