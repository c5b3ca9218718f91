"""The algorithm, without communication or files: strategy, shaping, schedules, optimizers."""
