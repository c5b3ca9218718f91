"""Run on four ranks: collectives of all, and gathers of replicas of two.

The latter go through shared memory, unless something is in the way of that.
"""

import os
import platform
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from shardes.distributed.group import make_mesh, shared_memory
from shardes.distributed.launch import process_group
from shardes.distributed.stop import Stop


def obstacles(rank):
    """Patches that keep ranks from sharing memory, and the ranks that are patched, one of each replica."""
    yield mock.patch.object(platform, "node", lambda: f"node{rank}"), (0, 3)
    yield mock.patch.object(os, "memfd_create", side_effect=OSError), (0, 2)
    yield mock.patch.object(os, "truncate", side_effect=OSError), (0, 2)
    yield mock.patch.object(shared_memory, "map_file", lambda path, size, token: None), (0, 3)
    # The path is another file on that machine.
    yield mock.patch.object(os, "open", lambda path, flags: os.memfd_create("another")), (0, 3)


def check_reductions(group):
    """Each small collective on a value that tells its operation and its ranks."""
    size, rank = group.world_size, group.rank
    assert group.sum_float64([0.5, float(rank)]) == [size / 2, size * (size - 1) / 2]
    assert group.sum_int64(2**64 - 1 - rank) == 2**64 - size - size * (size - 1) // 2
    assert [group.any(rank == size - 1), group.any(False)] == [True, False]
    assert [group.min(rank + 3), group.min(-rank)] == [3, 1 - size]
    assert group.gather_json(["x" * rank]) == [["x" * other] for other in range(size)]


def check(group, generator):
    """What comes through shared memory, or through the group, is what comes through the group alone."""
    plain = replace(group, memory=None)
    for dtype, length in ((torch.float32, 1), (torch.bfloat16, 5), (torch.float32, 700_001)):
        mine = torch.randn(length, generator=generator).to(dtype)
        found, wanted = mine.new_empty(2 * length), mine.new_empty(2 * length)
        group.gather_tensor(mine, found)
        plain.gather_tensor(mine, wanted)
        assert found.equal(wanted)
        assert found.view(2, -1)[group.rank].equal(mine)
        assert group.sum_tensor(mine.clone()).equal(plain.sum_tensor(mine.clone()))


def main():
    with process_group(timeout_seconds=60, always=True, stop=Stop(), stop_seconds=60) as world:
        generator = torch.Generator().manual_seed(world.rank)
        check_reductions(world)

        def checked():
            mesh = make_mesh(world, shard_size=2, timeout_seconds=60)
            check(mesh.shard, generator)
            return mesh.shard.memory

        assert checked() is not None
        for obstacle, ranks in obstacles(world.rank):
            with ExitStack() as stack:
                if world.rank in ranks:
                    stack.enter_context(obstacle)
                assert checked() is None, obstacle
        assert make_mesh(world, shard_size=1, timeout_seconds=60).shard.memory is None
        held = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert not [name for name in held if "memfd:shardes" in name], held
        world.barrier()  # rank 0 keeps the store that others may still need


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason
