"""Tasks: data, prompts and rewards."""
