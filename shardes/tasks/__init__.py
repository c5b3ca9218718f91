"""Data, prompts and rewards."""
