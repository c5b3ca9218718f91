"""The run directory: journal, metrics, lock and resume."""
