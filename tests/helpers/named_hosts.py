"""Two machines that pretend to have a GPU each, and whose names stand for 127.0.1.1, as on Debian; they join.

python -m tests.helpers.named_hosts DIRECTORY BACKEND...; prints a line of JSON for each backend, in it for
each rank: what its name stands for, the backend that was asked for, and its exit status. BACKEND: "usual", or
what to ask for instead; "gloo": as if there were no GPUs.

In place of torch's groups, gloo's are made where they are asked for, and none for NCCL, which is not here: it
finds the interface by the address of rank 0, and not by names.
"""

import contextlib
import ctypes
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from shardes.distributed import launch
from shardes.distributed.stop import Stop
from tests.helpers.hosts import Hosts

LIMIT_SECONDS = 70
TIMEOUT_SECONDS = 20
_CLONE_NEWNS, _CLONE_NEWUTS = 0x00020000, 0x04000000


def take_name(name, hosts_file):
    """Gives this process a machine's name, and a hosts file in which that is a loopback address."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), "unshare")
    hosts_file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    for arguments in (["--make-rprivate", "/"], ["--bind", str(hosts_file), "/etc/hosts"]):
        subprocess.run(["mount", *arguments], check=True, capture_output=True, timeout=20)
    socket.sethostname(name)


def join(rank, report, backend):
    """Joins and leaves."""
    init = dist.init_process_group

    def stand_in(asked, **arguments):
        report.write_text(json.dumps([socket.gethostbyname(socket.gethostname()), asked]))
        if "gloo" in asked:
            init("gloo", **arguments)
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == 2

    variables = {
        "RANK": rank,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": 29400,
    }
    os.environ |= {name: str(value) for name, value in variables.items()}
    properties = SimpleNamespace(uuid=f"GPU-{rank}")
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "is_available", lambda: backend != "gloo"),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "set_device", lambda device: None),
            (torch.cuda, "get_device_properties", lambda device: properties),
            (dist, "init_process_group", stand_in),
            *([(launch, "collectives_of", lambda device: backend)] if backend else []),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        seconds = {"timeout_seconds": TIMEOUT_SECONDS, "stop_seconds": 1}
        with launch.process_group(always=True, stop=Stop(), **seconds) as world:
            # Rank 0, which has the store, hears last.
            for speaker in range(2):
                if speaker == rank:
                    world.store.set(f"has joined/{rank}", "yes")
                else:
                    world.store.wait([f"has joined/{speaker}"], datetime.timedelta(seconds=TIMEOUT_SECONDS))


def start(function):
    """Forks a process that ends with the function."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def meet(directory, backend):
    """Has both machines join; returns what each rank says, and its exit status."""
    reports = [directory / f"rank{rank}.json" for rank in range(2)]
    with Hosts(f"named{os.getpid()}") as hosts:

        def host(rank):
            hosts.enter(rank)
            take_name(f"node{rank}", directory / f"hosts{rank}")
            join(rank, reports[rank], backend)

        children = {start(lambda rank=rank: host(rank)): rank for rank in range(2)}
        statuses = [None, None]
        deadline = time.monotonic() + LIMIT_SECONDS
        while None in statuses:
            for child, rank in children.items():
                if statuses[rank] is None:
                    found, status = os.waitpid(child, os.WNOHANG)
                    statuses[rank] = os.waitstatus_to_exitcode(status) if found else None
                    if not found and time.monotonic() > deadline:
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
    return [[*json.loads(path.read_text()), status] for path, status in zip(reports, statuses, strict=True)]


def main():
    for backend in sys.argv[2:]:
        found = meet(Path(sys.argv[1]), None if backend == "usual" else backend)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
