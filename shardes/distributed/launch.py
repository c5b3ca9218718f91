"""Launching: joining the job that a launcher has started, and leaving it."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from shardes.distributed.devices import check_devices_differ, choose_device, collectives_of
from shardes.distributed.failure_monitor import FailureMonitor
from shardes.distributed.group import Group
from shardes.distributed.interface import choose_interface
from shardes.distributed.meeting import meet
from shardes.distributed.place import read_place
from shardes.distributed.stop import Stop, Stopped

# Variables that launchers set on every rank, and that DeepSpeed and gloo read.
_JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
# What DeepSpeed reads of a process that nothing launched.
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


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
        UserError: Ranks and GPUs do not go together (see ``choose_device`` and ``check_devices_differ``), or
            the launcher's variables are half set.
        JobError: The ranks did not meet in time.
    """
    place = read_place()
    rank, world_size = place.rank, place.world_size
    device = choose_device(place)
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
        os.environ.setdefault("LOCAL_RANK", str(place.local_rank or 0))
        store = None
        if world_size > 1 or always:
            if world_size > 1:
                store = meet(watch, place, timeout_seconds=timeout_seconds)
            else:
                store = dist.HashStore()
                for name, value in _ALONE.items():
                    os.environ.setdefault(name, value)
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
