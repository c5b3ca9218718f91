"""Evaluate models and the centres of runs, and their divergence from the base model."""
