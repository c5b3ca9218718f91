"""Planning: a run's needs, computed before anything is loaded (``shardes plan``)."""
