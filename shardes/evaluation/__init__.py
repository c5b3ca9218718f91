"""Evaluation of models and of centres of runs, and their divergence from the base model."""
