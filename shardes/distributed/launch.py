"""Launching: joining the job that a launcher has started, and leaving it."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from shardes.distributed.failure_monitor import FailureMonitor
from shardes.distributed.group import Group
from shardes.distributed.meeting import meet
from shardes.distributed.place import read_place
from shardes.distributed.stop import Stop, Stopped
from shardes.errors import UserError

# Variables that launchers set on every rank, and that DeepSpeed reads even when it adopts a group.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
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
        UserError: There are more ranks than GPUs on this machine, or the launcher's variables are half set.
        JobError: The ranks did not meet in time.
    """
    place = read_place()
    rank, world_size, local_rank = place.rank, place.world_size, place.local_rank or 0
    if torch.cuda.is_available():
        if place.local_rank is None and world_size > 1 and torch.cuda.device_count() > 1:
            raise UserError(
                f"LOCAL_RANK: it is not set, so rank {rank} of {world_size} cannot know which of the "
                f"{torch.cuda.device_count()} GPUs is its own; start the ranks with torchrun, deepspeed or "
                "accelerate launch, set it to the rank's number on its machine, or show each rank one GPU "
                "with CUDA_VISIBLE_DEVICES"
            )
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
            if world_size > 1:
                store = meet(watch, place, timeout_seconds=timeout_seconds)
            else:
                store = dist.HashStore()
                for name, value in _ALONE.items():
                    os.environ.setdefault(name, value)
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
