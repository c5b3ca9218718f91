"""Run on every rank: the bytes of tensors that are alive while members are evaluated, as rank 0 sees them.

python plan_checks.py CASES.json OUT.json; CASES.json is a list of configurations as trees
"""

import json
import os
import sys
from pathlib import Path

import torch

from shardes.backends.build import make_backend
from shardes.config.loading import parse_config
from shardes.distributed.group import make_mesh
from shardes.distributed.launch import process_group
from shardes.distributed.stop import Stop
from shardes.es.strategy import Strategy, optimizer_of
from shardes.es.update import Update
from shardes.models.checkpoint import Checkpoint
from shardes.rollout.build import make_evaluator
from shardes.rollout.iteration import IterationSpec
from shardes.rollout.scheduler import MemberScheduler
from shardes.session import Session
from shardes.tasks.loading import load_task
from shardes.utils.timers import PhaseTimer
from shardes.weights.master import Weights
from shardes.weights.update_stats import UpdateStats
from tests.helpers.tracing import Trace

NUM_MEMBERS = 2


def measure(config, world):
    """The most bytes that were alive in an iteration, and those before it."""
    mesh = make_mesh(world, shard_size=config.parallel.shard_size, timeout_seconds=60)
    backend = make_backend(config, group=mesh.shard)
    narrow = config.weights.master == "model"
    weights = Weights(
        backend,
        seed=7,
        dtype=backend.dtype if narrow else torch.float32,
        trainable=config.es.trainable,
        optimizer=optimizer_of(config.es),
    )
    weights.load(Checkpoint(config.model.path))
    session = Session(config, mesh, backend, weights, {}, PhaseTimer(), Stop())
    task = load_task(config.task)
    rollout, *_ = make_evaluator(session, task)
    population = MemberScheduler(
        rollout, mesh=mesh, timeout_seconds=60, stop=session.stop, timer=session.timer
    )
    strategy = Strategy(config.es, num_elements=0)
    kept = [weights.masters, *weights.state_buffers()]
    held = [shard.local for shard in backend.shards]
    # What all ranks of a machine gather through would outweigh models as small as these.
    ignored = [] if mesh.shard.memory is None else [mesh.shard.memory._slots]
    with Trace([*held, *(tensor for each in kept for tensor in each.tensors.values())], ignored) as trace:
        spec = IterationSpec(0, task.train, rollout, strategy)
        population.evaluate_members(range(NUM_MEMBERS), spec=spec, on_result=lambda _: None)
        # Measured, as every tenth is; there must be one before it, whose step is computed again.
        for iteration in range(2):
            stats = UpdateStats(world.device)
            weights.update(Update(iteration, [1e-3] * NUM_MEMBERS, 1e-3), stats=stats)
    world.barrier()
    return {"peak": trace.peak_bytes, "held": trace.base_bytes}


def main():
    torch.set_num_threads(1)
    cases = [parse_config(tree, source="case") for tree in json.loads(Path(sys.argv[1]).read_text())]
    with process_group(timeout_seconds=60, always=True, stop=Stop(), stop_seconds=60) as world:
        found = [measure(config, world) for config in cases]
        if world.is_main:
            Path(sys.argv[2]).write_text(json.dumps(found))
        world.barrier()  # rank 0 keeps the store that others may still need


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason
