"""Run on every rank: trains and exports a list of configurations, one after the other.

python train_cases.py CASES.json, a list of {"config": tree, "export": directory, "shortages":
[[where, rank, call], ...]}: on that rank, that call (from 0) of "reserve" or of "decode" fails for want of
memory.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

from shardes.config.loading import parse_config
from shardes.environments.runners import Environments, tasks_by_key
from shardes.export.writer import export_model
from shardes.rollout.engines.transformers.decoder import Decoder
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from tests.helpers.one_store import make_store

ERRORS = {
    "reserve": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    "decode": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
}


def failing(function, error, calls):
    """The function, but for some of its calls."""
    seen = []

    def wrapper(*arguments, **keywords):
        seen.append(None)
        if len(seen) - 1 in calls:
            raise error
        return function(*arguments, **keywords)

    return wrapper


@contextlib.contextmanager
def shortages(backend, wanted, rank):
    places = {"reserve": (backend, "reserve"), "decode": (Decoder, "decode")}
    with contextlib.ExitStack() as stack:
        for where, (owner, name) in places.items():
            calls = {call for place, its_rank, call in wanted if (place, its_rank) == (where, rank)}
            wrapper = failing(getattr(owner, name), ERRORS[where], calls)
            stack.enter_context(mock.patch.object(owner, name, wrapper))
        yield


def main():
    _store = make_store()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        config = parse_config(case["config"], source="case")
        task = load_task(config.task)
        with Environments(config, tasks_by_key(task, {})) as environments, open_session(config) as session:
            with shortages(session.backend, case.get("shortages", []), session.mesh.world.rank):
                make_training_loop(session, task, environments=environments).train()
            export_model(session, Path(case["export"]), iteration=session.config.es.iterations, settings={})


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason
