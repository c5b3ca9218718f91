"""Process groups, launching, stopping, and noticing failures."""
