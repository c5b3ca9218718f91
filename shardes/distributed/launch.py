"""Launching: joining the job that a launcher has started, and leaving it."""

import datetime
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from shardes.distributed.devices import check_devices_differ, choose_device, collectives_of
from shardes.distributed.failure_monitor import FailureMonitor
from shardes.distributed.group import Group
from shardes.distributed.interface import choose_interface
from shardes.distributed.stop import Stop, Stopped

# Key under which rank 0 writes the name of the attempt that it has begun.
_ATTEMPT = "attempt"
# Variables that launchers set on every rank, and that DeepSpeed and gloo read.
_JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
# Interval at which ranks look for each other while they meet.
_MEETING_SECONDS = 0.02


@contextmanager
def process_group(*, timeout_seconds: int, always: bool, stop: Stop, stop_seconds: int) -> Iterator[Group]:
    """Join the job that the launcher's environment describes, and leave it at the end.

    A rank that leaves with an exception ends all ranks, with the exit status that the exception means, and
    the message of the first one is printed once (see ``FailureMonitor``).

    Args:
        timeout_seconds: Seconds that a collective waits for a rank.
        always: Whether to make a process group even for one rank.
        stop: Requests to stop the job.
        stop_seconds: Seconds that members in flight may go on after such a request.

    Yields:
        The group of all ranks. The accelerator of this rank is made the current device.

    Raises:
        UserError: There are more ranks than GPUs on this machine, or two have the same.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(rank=rank, local_rank=local_rank)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    watch = FailureMonitor(
        rank=rank,
        world_size=world_size,
        stop=stop,
        stop_seconds=stop_seconds,
        timeout_seconds=timeout_seconds,
    )
    watch.start()
    own_variables = [name for name in _JOB_VARIABLES if name not in os.environ]
    try:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        store = None
        if world_size > 1 or always:
            store = _meet(rank, world_size, timeout)
            if world_size > 1:
                watch.connect(store, host=os.environ["MASTER_ADDR"])
            check_devices_differ(store, device, rank=rank, world_size=world_size)
            backend = collectives_of(device)
            if backend == "gloo":
                choose_interface(os.environ["MASTER_ADDR"])
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
    """Meet the other ranks at the launcher's address, and return a store of this attempt alone."""
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
    """Open the part of a store that only the ranks of this attempt use; a collective.

    torchrun keeps its store when it starts ranks anew, after a failure or because nodes have come or gone.
    There they would find the addresses of the dead. No variable that torchrun sets is the same on all ranks
    of an attempt and another in the next: each node counts its own restarts, and changes of membership are
    not counted. So rank 0 makes up a name. A rank cannot tell an old name from the new one, but only the
    living rank 0 answers, so a rank without an answer looks for another name.

    Args:
        store: Store of the launcher.
        rank: Index of this process.
        world_size: Number of ranks.
        timeout: Time that a rank waits for another.

    Raises:
        TimeoutError: A rank did not come in time.
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
