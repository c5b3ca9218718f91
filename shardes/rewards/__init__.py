"""Rewards, run in processes that may hang, crash or fill their memory without harm to the run.

The training process starts a fork server before anything else (``fork_server.py``), from which worker
processes are forked; a pool hands them completions and takes back numbers, and kills and replaces those that
give none in time (``pool.py``). A worker calls the reward functions (``worker.py``). Numbers come back as
JSON and are checked; nothing that a worker sends is unpickled. This protects against rewards that fail; it
is no jail: a worker has the rights of its user. The scorer adds the numbers up (``scorer.py``).
"""
