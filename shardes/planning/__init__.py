"""What a run will take of the machine, told before anything is loaded: ``shardes plan``."""
