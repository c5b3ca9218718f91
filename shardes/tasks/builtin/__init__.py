"""Built-in tasks. A module here declares its tasks in ``TASKS``, and reward functions with names in ``REWARDS``.

The registry finds every module of this folder. None may import torch or numpy: the configuration looks up
names here, and reward processes import these modules.
"""
