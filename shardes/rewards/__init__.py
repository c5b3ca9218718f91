"""Rewards, run in processes that may hang, crash or fill their memory without harm to the run.

The training process starts a template process before anything else (``template.py``), from which worker
processes are forked; a pool hands them answers and takes back numbers, and kills and replaces the ones that
give none in time (``pool.py``). What a worker does with answers is in ``judging.py``. Numbers come back as
JSON and are checked; nothing that a worker sends is unpickled. It is protection against rewards that fail,
not a jail: a worker has the rights of its user.
"""
