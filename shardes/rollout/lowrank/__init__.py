"""Low-rank members as terms added to the outputs of layers."""
