"""transformers models without weights, and ranges of checkpoints."""
