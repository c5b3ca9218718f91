"""Evaluate low-rank members as terms added to the outputs of layers."""
