"""Kinds of noise: one folder each, with a NumPy definition, a CPU and a GPU implementation."""
