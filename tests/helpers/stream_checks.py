"""Run on every rank: members under a backend, with the streams of a device modelled.

python stream_checks.py CASES.json, a list of {"config": tree, "without": names of what to leave out}; prints
a line of JSON for each. ``WITHOUT`` says what can be left out.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

import shardes.backends.fsdp
import shardes.backends.zero3
import shardes.runs.snapshot_writer
import shardes.weights.master
from shardes.backends.build import make_backend
from shardes.config.loading import parse_config
from shardes.distributed.group import make_mesh
from shardes.distributed.launch import process_group
from shardes.distributed.stop import Stop
from shardes.es.strategy import optimizer_of
from shardes.es.update import Perturbation, Update
from shardes.models.checkpoint import Checkpoint
from shardes.runs.snapshot_writer import SnapshotWriter
from shardes.weights import pinned
from shardes.weights.gathered import GatheredWeights
from shardes.weights.master import Weights
from shardes.weights.master_digest import master_digest
from tests.helpers.streams import Streams, Timeline

NUM_MEMBERS = 4  # DeepSpeed fetches ahead once it has seen two whole forwards
WITHOUT = {
    # The waits of the host before layers are gathered, and after masters were written.
    "commit": (shardes.backends.zero3, "synchronize", lambda device: None),
    "masters": (shardes.weights.master, "synchronize", lambda device: None),
    "snapshot": (shardes.runs.snapshot_writer, "synchronize", lambda device: None),
    # The wait of an update for the snapshot that is being written.
    "finish": (SnapshotWriter, "finish", lambda self: None),
    # The hook by which a module is gathered before FSDP2 fetches ahead, and how its streams wait.
    "hook": (shardes.backends.fsdp, "_gather", lambda module, args: None),
    "wait": (Timeline, "wait_stream", lambda self, other: None),
    # What keeps the allocator from handing out what another stream still uses.
    "record": (torch.Tensor, "record_stream", lambda self, stream: None),
}


def accelerator(model):
    """Patches that give DeepSpeed's CPU the streams of a model."""
    import deepspeed

    kind, changes = type(deepspeed.get_accelerator()), {"current_stream": lambda *_: model.current}
    changes |= dict.fromkeys(
        ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"),
        lambda self: False,
    )
    changes |= {"stream": lambda self, stream: model.on(stream), "default_stream": lambda *_: model.default}
    changes |= {"Stream": property(lambda self: model.make), "Event": property(lambda self: model.event)}
    changes |= {"synchronize": lambda *_: model.synchronize()}
    return [mock.patch.object(kind, name, value) for name, value in changes.items()]


@torch.no_grad()
def check(config, mesh, *, num_members):
    """Every way in which weights are written and read; yields the tensors that a device would pin."""
    backend = make_backend(config, group=mesh.shard)
    weights = Weights(backend, seed=7, on_host=True, chunk_elements=500, optimizer=optimizer_of(config.es))
    weights._is_offloaded = True  # as where there is a device
    weights.masters = weights._allocate(weights.dtype)
    yield from weights.masters.tensors.values()
    checkpoint = Checkpoint(config.model.path)
    weights.load(checkpoint)
    for state in weights.state_buffers():
        yield from state.tensors.values()
    snapshots = SnapshotWriter(config.run.dir, every=1, keep=2, mesh=mesh, weights=weights, is_sharded=True)
    snapshots.open()
    ids = torch.arange(24).view(4, 6)
    whole = GatheredWeights(backend, weights)
    for iteration in range(2):
        for direction in range(num_members):
            member = Perturbation(iteration, direction, 0.1)
            weights.perturb(member)
            backend.sharded_model(ids)
        backend.gathered()(ids)
        whole.refresh()
        whole.perturb(member)
        whole.model(ids)
        snapshots.finish()
        weights.update(Update(iteration, [0.1, -0.2, 0.05]))
        assert not weights.could_overflow(Update(iteration, [0.1]))
        snapshots.begin(iteration, digest=f"{master_digest(weights):016x}", states_digest="0")
    snapshots.finish()
    weights.centre()
    weights.read_buffers(weights.masters, checkpoint)
    weights.centre()
    snapshots.close()


def report(model, config, mesh, *, without, num_members=NUM_MEMBERS, is_pinned=True):
    """What the model sees of one case, with masters in host memory or on the device."""
    with contextlib.ExitStack() as stack:
        unpinned = mock.patch.object(pinned, "_allocate", lambda size: torch.zeros(size, dtype=torch.uint8))
        stack.enter_context(unpinned)
        for name in without:
            stack.enter_context(mock.patch.object(*WITHOUT[name]))
        for tensor in check(config, mesh, num_members=num_members):
            if is_pinned:
                model.mark_host(tensor)
    return model.report()


def main():
    torch.set_num_threads(1)
    with contextlib.ExitStack() as job:
        # DeepSpeed looks up collectives once: one model serves all cases.
        model = job.enter_context(Streams())
        for patch in accelerator(model):
            job.enter_context(patch)
        world = job.enter_context(
            process_group(timeout_seconds=60, always=True, stop=Stop(), stop_seconds=60)
        )
        for raw in json.loads(Path(sys.argv[1]).read_text()):
            config = parse_config(raw["config"], source="case")
            mesh = make_mesh(world, shard_size=None, timeout_seconds=60)
            found = report(model, config, mesh, without=raw["without"])
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
            world.barrier()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
