"""Ranks gather through memory that they share what they would through the process group."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shardes.distributed import shared_memory
from shardes.distributed.shared_memory import SharedMemory
from tests.helpers.ranks import ROOT, run_ranks

NUM_RANKS = 3


def memories(num_ranks, *, timeout_seconds=20):
    """One for each rank, over the same buffer."""
    buffer = bytearray(SharedMemory.num_bytes(num_ranks))
    return [
        SharedMemory(buffer, rank=rank, world_size=num_ranks, timeout_seconds=timeout_seconds)
        for rank in range(num_ranks)
    ]


def test_every_rank_finds_the_parts_of_all(monkeypatch):
    """Of several types, shorter and longer than a slot, with ranks that come and read late."""
    monkeypatch.setattr(shared_memory, "SLOT_BYTES", 64)
    wait_for = SharedMemory._wait_for

    def late(self, rank):
        wait_for(self, rank)
        if random.random() < 0.1:
            time.sleep(1e-3)

    monkeypatch.setattr(SharedMemory, "_wait_for", late)
    draw = random.Random(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int32)
    shapes = [(draw.choice(dtypes), draw.choice((0, 1, 8, 9, 16, 17, 100, 333))) for _ in range(60)]

    def part(rank, number, dtype, length):
        return (torch.arange(length) + 1000 * rank + number).to(dtype)

    def work(memory):
        for number, (dtype, length) in enumerate(shapes):
            output = torch.full((NUM_RANKS * length,), -1).to(dtype)
            memory.gather(part(memory._rank, number, dtype, length), output)
            wanted = torch.cat([part(rank, number, dtype, length) for rank in range(NUM_RANKS)])
            assert output.equal(wanted), (memory._rank, number, dtype, length)

    with ThreadPoolExecutor(NUM_RANKS) as pool:
        for done in [pool.submit(work, memory) for memory in memories(NUM_RANKS)]:
            done.result(timeout=60)


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_was_said():
    alone, _ = memories(2, timeout_seconds=0.05)
    with pytest.raises(TimeoutError, match=r"waiting for another rank \(parallel\.timeout_seconds\)"):
        alone.gather(torch.zeros(3), torch.zeros(6))


@pytest.mark.slow
def test_ranks_of_a_machine_share_memory_and_others_do_not(tmp_path):
    script = ROOT / "tests" / "helpers" / "memory_checks.py"
    run_ranks([script], world_size=4, log_dir=tmp_path)
