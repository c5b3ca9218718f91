"""Gathers through memory that the ranks of one machine share if they compute on its CPU.

Between processes of one machine gloo goes through sockets and threads of its own. These need the very cores
that compute, and often wait for one until the scheduler's next tick: what could take a tenth of a millisecond
takes several. Here every rank copies its part to where the others see it, counts, and looks at their counts.
"""

import mmap
import os
import platform
import time
from typing import Any

import numpy as np
import torch

# Bytes that a rank writes at a time: so few that they are still in the caches when the others read them.
SLOT_BYTES = 1 << 20
# A count has a cache line of its own, so that looking at one does not slow down the writing of another.
_LINE_BYTES = 64
# Where processors let others see writes in another order than they were made in, counting needs instructions
# that Python does not have.
IS_POSSIBLE = platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")
# Seconds that a rank polls the others without a pause; activations, the most frequent, come sooner.
_BUSY_SECONDS = 2e-3
_PAUSE_SECONDS = 1e-4


class SharedMemory:
    """Memory that ranks share.

    Every rank has two slots and uses them in turn. In a turn it fills one, counts the turn, and waits for the
    others to have counted it. A rank can begin the next turn but one only after all have counted the next,
    and have therefore read what it is about to overwrite.

    Args:
        buffer: Buffer of ``num_bytes`` zeros, the same memory on all ranks.
        rank: Index of this process among the ranks.
        world_size: Number of ranks.
        timeout_seconds: Seconds that a rank waits for another.
    """

    def __init__(self, buffer: Any, *, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._rank = rank
        self._timeout_seconds = timeout_seconds
        counts = np.frombuffer(buffer, np.int64, count=world_size * _LINE_BYTES // 8)
        self._counts = counts[:: _LINE_BYTES // 8]
        slots = torch.frombuffer(buffer, dtype=torch.uint8, offset=world_size * _LINE_BYTES)
        self._slots = slots.view(2, world_size, SLOT_BYTES)
        self._others = [other for other in range(world_size) if other != rank]
        self._turn = 0

    @staticmethod
    def num_bytes(world_size: int) -> int:
        """Return the bytes that a number of ranks need."""
        return world_size * (_LINE_BYTES + 2 * SLOT_BYTES)

    def gather(self, local: torch.Tensor, output: torch.Tensor) -> None:
        """Concatenate the ranks' tensors in ``output``.

        Args:
            local: This rank's tensor, flat, as long as those of the other ranks.
            output: Flat tensor, as long as all together.

        Raises:
            TimeoutError: A rank did not come in time.
        """
        parts = output.view(1 + len(self._others), -1)
        parts[self._rank].copy_(local)
        slots = self._slots.view(local.dtype)
        step = slots.shape[-1]
        for first in range(0, len(local), step):
            sent = local[first : first + step]
            self._turn += 1
            of_turn = slots[self._turn % 2, :, : len(sent)]
            of_turn[self._rank].copy_(sent)
            self._counts[self._rank] = self._turn
            for other in self._others:
                self._wait_for(other)
                parts[other, first : first + step].copy_(of_turn[other])

    def _wait_for(self, rank: int) -> None:
        """Wait until a rank has counted this turn."""
        start = None
        while self._counts[rank] < self._turn:
            now = time.monotonic()
            start = now if start is None else start
            if now - start > self._timeout_seconds:
                raise TimeoutError("timed out waiting for another rank (parallel.timeout_seconds)")
            if now - start > _BUSY_SECONDS:
                time.sleep(_PAUSE_SECONDS)
            else:
                os.sched_yield()  # the rank that is waited for may need this core


def make_file(size: int, token: str) -> int | None:
    """Make a file in memory, zeros that end with a token, and return its descriptor; None if that fails.

    It has no name, so that nothing is left behind, whoever dies when.
    """
    try:
        file = os.memfd_create("shardes")
    except OSError:
        return None
    try:
        os.truncate(file, size)
        os.pwrite(file, token.encode(), size - len(token))
    except OSError:
        os.close(file)
        return None
    return file


def map_file(path: str, size: int, token: str) -> mmap.mmap | None:
    """Map another process's file in memory; return None if there is none that ends with the token."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        buffer = mmap.mmap(file, size)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    return buffer if buffer[-len(token) :] == token.encode() else None
