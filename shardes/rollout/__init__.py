"""Generating answers under perturbed weights, and scoring them."""
