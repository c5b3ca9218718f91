"""Groups of ranks with the few collectives that the rest needs, and the mesh of replicas."""

import datetime
import json
import os
import platform
import secrets
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shardes.distributed import shared_memory
from shardes.distributed.shared_memory import SharedMemory
from shardes.errors import UserError

_N = TypeVar("_N", int, float)


@dataclass(frozen=True)
class Group:
    """Ranks that work together, all of a job or some. With one rank, every collective is the identity.

    Attributes:
        rank: Index of this process in the group.
        world_size: Number of ranks in the group.
        device: Device of this rank's tensors.
        process_group: Process group of the collectives; None for torch's default group, or for none at all.
        store: Store that all ranks of the job can read and write at any time; None without a process group.
        memory: Memory through which tensors are gathered; None for the process group.
    """

    rank: int
    world_size: int
    device: torch.device
    process_group: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    memory: SharedMemory | None = None

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    def sum_float64(self, values: list[float]) -> list[float]:
        """Sum over ranks element by element; exact if at most one rank has a non-zero entry at each index."""
        return self._reduce(values, torch.float64, dist.ReduceOp.SUM)

    def sum_int64(self, value: int) -> int:
        """Sum over ranks modulo 2**64; return an unsigned number."""
        wrapped = value & 0xFFFFFFFFFFFFFFFF
        (total,) = self._reduce([wrapped - (wrapped >> 63 << 64)], torch.int64, dist.ReduceOp.SUM)
        return total & 0xFFFFFFFFFFFFFFFF

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return bool(self._reduce([int(flag)], torch.int32, dist.ReduceOp.MAX)[0])

    def gather_int64(self, values: list[int]) -> list[list[int]]:
        """Gather every rank's values, equally many of each, by rank."""
        if self.world_size == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(found, mine, group=self.process_group)
        return [each.tolist() for each in found]

    def min(self, value: int) -> int:
        """Return the smallest of the ranks' values."""
        return self._reduce([value], torch.int64, dist.ReduceOp.MIN)[0]

    def _reduce(self, values: list[_N], dtype: torch.dtype, operation: Any) -> list[_N]:
        """Reduce the ranks' values, equally many of each, element by element."""
        if self.world_size == 1:
            return values
        reduced = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(reduced, op=operation, group=self.process_group)
        return reduced.tolist()

    def broadcast_json(self, value: Any) -> Any:
        """Return rank 0's value on every rank; it must be representable as JSON. Nothing is pickled."""
        if self.world_size == 1:
            return value
        payload = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(payload)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, group=self.process_group, group_src=0)
        buffer = torch.zeros(int(size.item()), dtype=torch.uint8, device=self.device)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(buffer, group=self.process_group, group_src=0)
        return json.loads(bytes(buffer.cpu().numpy()))

    def gather_json(self, value: Any) -> list[Any]:
        """Gather every rank's value, which must be representable as JSON, by rank. Nothing is pickled."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [size for (size,) in self.gather_int64([len(payload)])]
        buffer = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        buffer[: len(payload)] = payload.to(self.device)
        parts = [torch.empty_like(buffer) for _ in range(self.world_size)]
        dist.all_gather(parts, buffer, group=self.process_group)
        return [json.loads(bytes(part[:size].cpu().numpy())) for part, size in zip(parts, sizes, strict=True)]

    def gather_tensor(self, local: torch.Tensor, output: torch.Tensor) -> None:
        """Concatenate the ranks' tensors in ``output``; with one rank, copy.

        Args:
            local: This rank's tensor, flat, as long as those of the other ranks.
            output: Flat tensor, as long as all together.

        Raises:
            TimeoutError: A rank did not come in time.
        """
        if self.device.type != "cpu":
            # torch 2.13 renames the function and warns about the old name, the only one that 2.11 has.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(output, local, group=self.process_group)
            return
        if self.memory is not None:
            self.memory.gather(local, output)
            return
        # gloo passes a gather on from rank to rank in pieces, through buffers of its own. Sending each rank's
        # part as a whole takes a third of the time.
        parts = output.view(self.world_size, -1)
        parts[self.rank].copy_(local)
        if self.world_size == 1:
            return
        works = [
            dist.broadcast(part, group=self.process_group, group_src=rank, async_op=True)
            for rank, part in enumerate(parts)
        ]
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            # One of the messages says what happened, the others that the connection was closed because of it.
            if "timeout" in str(error).lower() or "timed out" in str(error).lower():
                raise TimeoutError("timed out waiting for another rank (parallel.timeout_seconds)") from None
            raise

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum tensors over ranks, to the same bits on all ranks; the argument may be overwritten.

        Made for the activations of tensor parallelism, which are small and many.
        """
        if self.world_size == 1:
            return tensor
        if self.device.type != "cpu":
            dist.all_reduce(tensor, group=self.process_group)
            return tensor
        parts = tensor.new_empty(self.world_size, *tensor.shape)
        self.gather_tensor(tensor.reshape(-1), parts.view(-1))
        return parts.sum(dim=0)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)


@dataclass(frozen=True)
class Mesh:
    """Ranks of a job as replicas of the model, each spread over equally many ranks.

    Replicas evaluate different members at the same time. Weights cross between the ranks of one replica only.

    Attributes:
        world: All ranks. Replica i is the i-th run of consecutive ranks, so that a replica stays on one
            machine if it fits there.
        shard: Ranks that hold this rank's replica together.
    """

    world: Group
    shard: Group

    @property
    def num_replicas(self) -> int:
        """Number of replicas of the model."""
        return self.world.world_size // self.shard.world_size

    @property
    def replica(self) -> int:
        """Index of this rank's replica."""
        return self.world.rank // self.shard.world_size

    @property
    def alone(self) -> Group:
        """Group of this rank by itself, whose collectives are the identity."""
        return Group(0, 1, self.world.device)


def make_mesh(world: Group, *, shard_size: int | None, timeout_seconds: int) -> Mesh:
    """Divide the ranks into replicas; a collective.

    Args:
        world: All ranks.
        shard_size: Ranks that hold one replica; None for all.
        timeout_seconds: Seconds that a collective waits for a rank.

    Raises:
        UserError: ``shard_size`` does not divide the number of ranks.
    """
    size = world.world_size if shard_size is None else shard_size
    if world.world_size % size:
        divisors = [str(n) for n in range(1, world.world_size + 1) if world.world_size % n == 0]
        raise UserError(
            f"parallel.shard_size: got {size}, which does not divide the {world.world_size} rank(s) of the "
            f"job; wanted {' or '.join(divisors)}, or null"
        )
    shard = world
    if size < world.world_size:
        timeout = datetime.timedelta(seconds=timeout_seconds)
        # Every rank makes every group, in one order: torch numbers them by it.
        groups = [
            dist.new_group(list(range(first, first + size)), timeout=timeout)
            for first in range(0, world.world_size, size)
        ]
        shard = Group(world.rank % size, size, world.device, groups[world.rank // size], world.store)
    if shard.store is not None:
        shard = replace(shard, memory=_share_memory(shard, timeout_seconds=timeout_seconds))
    return Mesh(world, shard)


def _share_memory(group: Group, *, timeout_seconds: int) -> SharedMemory | None:
    """Make the memory through which the ranks of a group gather; a collective of them.

    Returns:
        The memory; None on all ranks if there is only one rank, or if they compute on GPUs or are on several
        machines.
    """
    if group.world_size == 1 or group.device.type != "cpu":
        return None
    place = platform.node() if shared_memory.IS_POSSIBLE else None
    if set(group.gather_json(place)) != {place} or place is None:
        return None
    size, token = SharedMemory.num_bytes(group.world_size), secrets.token_hex(32)
    file = shared_memory.make_file(size, token) if group.is_main else None
    path, token = group.broadcast_json([None if file is None else f"/proc/{os.getpid()}/fd/{file}", token])
    # Names of machines need not be different: another's file is not taken for this one.
    buffer = None if path is None else shared_memory.map_file(path, size, token)
    is_missing = group.any(buffer is None)
    if file is not None:
        os.close(file)
    if is_missing:
        return None
    return SharedMemory(buffer, rank=group.rank, world_size=group.world_size, timeout_seconds=timeout_seconds)
