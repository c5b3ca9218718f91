"""The process group: how it is made, and the few collectives that the rest needs."""

import datetime
import json
import os
import platform
import secrets
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from shardes.distributed import shared_memory
from shardes.distributed.failure_monitor import FailureMonitor
from shardes.distributed.shared_memory import SharedMemory
from shardes.distributed.stop import Stop, Stopped
from shardes.errors import UserError

# Where rank 0 writes the name of the attempt that it has begun.
_ATTEMPT = "attempt"
# What launchers set on every rank, and what DeepSpeed reads even when it adopts a group.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How often ranks look for each other while they meet.
_MEETING_SECONDS = 0.02


@dataclass(frozen=True)
class Group:
    """Ranks that work together, all of a job or some. With one rank, every collective is the identity.

    Attributes:
        rank: This process's index among them.
        world_size: Number of processes.
        device: Where this rank's tensors live.
        process_group: What its collectives run over; None is torch's default group, or no group at all.
        store: What all ranks of the job can read and write at any time; None without a process group.
        memory: What they gather tensors through, if that is not the process group.
    """

    rank: int
    world_size: int
    device: torch.device
    process_group: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    memory: SharedMemory | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def sum_float64(self, values: list[float]) -> list[float]:
        """The element-wise sum over ranks. Exact when at most one rank has a non-zero entry at each index."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.process_group)
        return total.tolist()

    def sum_int64(self, value: int) -> int:
        """The sum over ranks modulo 2**64, as an unsigned number."""
        wrapped = value & 0xFFFFFFFFFFFFFFFF
        if self.world_size > 1:
            total = torch.tensor([wrapped - (wrapped >> 63 << 64)], dtype=torch.int64, device=self.device)
            dist.all_reduce(total, group=self.process_group)
            wrapped = int(total.item()) & 0xFFFFFFFFFFFFFFFF
        return wrapped

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world_size == 1:
            return flag
        total = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.process_group)
        return bool(total.item())

    def gather_int64(self, values: list[int]) -> list[list[int]]:
        """Every rank's values, of which all have equally many, by rank."""
        if self.world_size == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(found, mine, group=self.process_group)
        return [each.tolist() for each in found]

    def min(self, value: int) -> int:
        """The smallest of the ranks' values."""
        if self.world_size == 1:
            return value
        least = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.process_group)
        return int(least.item())

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value on every rank; it must be representable as JSON. Nothing is pickled."""
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
        """Every rank's value, on every rank; they must be representable as JSON. Nothing is pickled."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(payload)
        dist.all_reduce(sizes, group=self.process_group)
        buffer = torch.zeros(int(sizes.max().item()), dtype=torch.uint8, device=self.device)
        buffer[: len(payload)] = payload.to(self.device)
        parts = [torch.empty_like(buffer) for _ in range(self.world_size)]
        dist.all_gather(parts, buffer, group=self.process_group)
        return [
            json.loads(bytes(part[:size].cpu().numpy()))
            for part, size in zip(parts, sizes.tolist(), strict=True)
        ]

    def gather_tensor(self, local: torch.Tensor, output: torch.Tensor) -> None:
        """Puts the ranks' tensors one behind the other; with one rank, too.

        Args:
            local: This rank's, flat; equally long on all ranks.
            output: Flat, as long as all together.
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
        """The sum of the ranks' tensors, the same bits on all ranks; the argument may be overwritten.

        Made for the activations of tensor parallelism: small and many.
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
        """Waits until every rank is here."""
        self.any(False)


@dataclass(frozen=True)
class Mesh:
    """The ranks of a job as replicas of the model, each spread over as many ranks as the others.

    Replicas evaluate different members at the same time. Weights cross between the ranks of one replica only.

    Attributes:
        world: All ranks. Replica i is the i-th run of consecutive ones, so that a replica stays on one
            machine if it fits there.
        shard: The ranks that hold one replica together, this one among them.
    """

    world: Group
    shard: Group

    @property
    def num_replicas(self) -> int:
        """How many times the model is held."""
        return self.world.world_size // self.shard.world_size

    @property
    def replica(self) -> int:
        """Which of them this rank helps to hold."""
        return self.world.rank // self.shard.world_size

    @property
    def alone(self) -> Group:
        """This rank by itself; its collectives are the identity."""
        return Group(0, 1, self.world.device)


def make_mesh(world: Group, *, shard_size: int | None, timeout_seconds: int) -> Mesh:
    """Parts the ranks into replicas; a collective.

    Args:
        world: All ranks.
        shard_size: Ranks that hold one replica; None: all.
        timeout_seconds: How long a collective waits for a rank.

    Raises:
        UserError: The ranks cannot be parted so.
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
    """What the ranks of a group can gather through; a collective of them.

    Returns:
        None on all ranks, if there is only one, or if they compute on GPUs or are on several machines.
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


@contextmanager
def process_group(*, timeout_seconds: int, always: bool, stop: Stop, stop_seconds: int) -> Iterator[Group]:
    """Joins the job that the launcher's environment describes, and leaves it at the end.

    A rank that leaves with an exception ends all ranks, with the exit status that the exception means, and
    the message of the first one is printed once (see ``FailureMonitor``).

    Args:
        timeout_seconds: How long a collective waits for a rank.
        always: Make a process group even for one rank (DeepSpeed needs one).
        stop: What the job is asked to stop by.
        stop_seconds: How long it may go on after that.

    Yields:
        The group. The accelerator of this rank is made the current device.

    Raises:
        UserError: There are more ranks than GPUs on this machine.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPU(s), but rank {rank} is number "
                f"{local_rank + 1} on it; start one rank per GPU, or hide them with CUDA_VISIBLE_DEVICES= "
                "to run on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    watch = FailureMonitor(
        rank=rank,
        world_size=world_size,
        stop=stop,
        stop_seconds=stop_seconds,
        timeout_seconds=timeout_seconds,
    )
    watch.start()
    own_variables = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    try:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        store = None
        if world_size > 1 or always:
            store = _meet(rank, world_size, timeout)
            if world_size > 1:
                watch.connect(store, host=os.environ["MASTER_ADDR"])
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        yield Group(rank, world_size, device, store=store)
    except Stopped:
        stop.wait_for_launcher()
        raise
    except BaseException as error:
        watch.report(error)
        raise
    finally:
        watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        # A process that goes on must not be taken for one that a launcher started.
        for name in own_variables:
            os.environ.pop(name, None)


def _meet(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """Meets the other ranks at the launcher's address; returns a store of this attempt alone."""
    if "MASTER_ADDR" not in os.environ:
        # Started by hand as one process.
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
        return dist.HashStore()
    agent_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not agent_hosts_store,
        timeout=timeout,
    )
    return open_attempt(store, rank=rank, world_size=world_size, timeout=timeout)


def open_attempt(store: dist.Store, *, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The part of a store in which the ranks of this attempt are among themselves; a collective.

    torchrun keeps its store when it starts ranks anew, after a failure or because nodes have come or gone.
    There they would find the addresses of the dead. No variable that torchrun sets is the same on all ranks
    of an attempt and another in the next: nodes count the restarts each for itself, and changes of membership
    not at all. So rank 0 makes a name up. A rank cannot tell an old name from the new one, but only the
    living rank 0 answers: who is not answered looks for another name.

    Args:
        store: The launcher's.
        rank: This process's.
        world_size: Number of ranks.
        timeout: How long a rank waits for another.

    Raises:
        TimeoutError: A rank did not come.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    mine = uuid.uuid4().hex
    missing = set(range(1, world_size)) if rank == 0 else {0}
    name = mine
    if rank == 0:
        store.set(_ATTEMPT, name)
    while missing:
        if rank == 0:
            for other in [each for each in missing if store.check([f"{name}/here/{each}"])]:
                store.set(f"{name}/welcome/{other}", store.get(f"{name}/here/{other}").decode())
                missing.remove(other)
        elif store.check([_ATTEMPT]):
            name = store.get(_ATTEMPT).decode()
            store.set(f"{name}/here/{rank}", mine)
            welcome = f"{name}/welcome/{rank}"
            if store.check([welcome]) and store.get(welcome).decode() == mine:
                missing.clear()
        if missing and time.monotonic() > deadline:
            raise TimeoutError(
                f"rank {rank} has waited {timeout.total_seconds():.0f} s (parallel.timeout_seconds) for "
                f"rank(s) {', '.join(map(str, sorted(missing)))} to join"
            )
        if missing:
            time.sleep(_MEETING_SECONDS)
    return dist.PrefixStore(name, store)
