"""Built-in tasks: a module here declares its tasks in ``TASKS`` and named reward functions in ``REWARDS``.

The registry finds every module of this folder. None may import torch or numpy: the configuration looks up
names here, and reward processes import these modules.
"""
