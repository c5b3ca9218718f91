"""The run directory: journal, snapshots, metrics, lock, resume and trackers."""
