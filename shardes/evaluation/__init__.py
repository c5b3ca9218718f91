"""Evaluating centres, models and runs."""
