"""Starts real processes as a launcher would, with a hard time limit and nothing left behind."""

import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
from pathlib import Path

from tests.helpers.nursery import Nursery
from tools.gpu_check.processes import LAUNCHER_VARIABLES

ROOT = Path(__file__).parents[2]
# Below the ports that the kernel gives to connections. Each of pytest's workers takes every 16th of them.
PORTS = range(15000, 31000, 16)


def free_port():
    """One that nobody has now, nor takes before it is used."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().choice(PORTS) + worker % PORTS.step
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment(**extra):
    """This environment without a launcher's variables; one thread, so that bits can be compared."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return kept | threads | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"} | extra


@functools.cache
def nursery():
    """This process's own; the first ranks wait for its imports."""
    return Nursery(env=environment(), cwd=ROOT)


class Ranks:
    """``world_size`` processes of one Python script, in a group of their own each.

    Args:
        arguments: The script and what it is given.
        world_size: How many.
    """

    def __init__(self, arguments, *, world_size, log_dir):
        log_dir.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.logs = [log_dir / f"rank{rank}.log" for rank in range(world_size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            env = environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            self.processes.append(nursery().start(arguments, env=env, log=log))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill_group()
            process.wait()

    def wait(self, timeout_seconds):
        """The exit statuses of all ranks."""
        return [process.wait(timeout=timeout_seconds) for process in self.processes]

    def output(self):
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self.logs)


def run_ranks(arguments, *, world_size, log_dir, timeout_seconds=240):
    """Runs to the end and insists on success; returns what the ranks printed."""
    with Ranks(arguments, world_size=world_size, log_dir=log_dir) as ranks:
        statuses = ranks.wait(timeout_seconds)
        output = ranks.output()
    assert statuses == [0] * world_size, output
    return output


def run_command(arguments, *, timeout_seconds=120, **extra):
    """Runs one command in a session of its own; what it started ends with it."""
    process = subprocess.Popen(
        list(map(str, arguments)),
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)
