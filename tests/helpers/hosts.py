"""Machines, as network namespaces joined by a cable, and what torchrun does on each; for root on Linux.

python -m tests.helpers.hosts CASE.json, {"config": path, "num_nodes": "2:2", "max_restarts": 3, "journal":
path, "steps": [[what, number], ...]}; writes {"statuses": [...], "output": ...} to CASE.json.found. Steps:
"lines": wait until the journal has so many more; "cut": the cable, for so many seconds; "kill": all processes
of that host; "start": them again.

Both hosts are forked from this process, which has imported everything, and their agents, which are
torchrun's, fork the ranks.
"""

import contextlib
import ctypes
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from shardes import cli
from shardes.config.loading import load_config
from tools.soak import fork, preload

LIMIT_SECONDS = 200
_CLONE_NEWNET = 0x40000000


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)


class Hosts:
    """Two machines and a cable."""

    def __init__(self, name):
        self.names = [f"{name}-{number}" for number in (0, 1)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self):
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)

    def set_cable(self, state):
        ip("-n", self.names[1], "link", "set", "cable", state)

    def enter(self, number):
        """Makes this process one of that machine."""
        with Path(f"/run/netns/{self.names[number]}").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


def why_not():
    """Why there can be no hosts here; None if there can."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need Linux, root and the command ip"
    try:
        with Hosts(f"try{os.getpid()}"):
            return None
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces are not allowed here: {error}"


def rank(config, journal):
    """Like ``launch/train.py``, but a finished run returns: torchrun's agent waits for what is returned."""
    sys.argv = ["train", "--config", config]
    status = cli.run(cli.train)
    updates = sum(b'"type":"update"' in line for line in Path(journal).read_bytes().splitlines())
    if status or updates < load_config(Path(config), []).es.iterations:
        os._exit(status)


def agent(hosts, number, case):
    """What ``torchrun --nnodes ... launch/train.py`` does, but that ranks are forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setsid()
    hosts.enter(number)
    os.environ["GLOO_SOCKET_IFNAME"] = "cable"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/durability.md
    least, most = map(int, case["num_nodes"].split(":"))
    launch = LaunchConfig(
        min_nodes=least,
        max_nodes=most,
        nproc_per_node=1,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{hosts.addresses[0]}:29400",
        # Which host has the store is found out by name otherwise, and both have the name of this machine.
        rdzv_configs={"last_call_timeout": 3, "is_host": number == 0},
        max_restarts=case["max_restarts"],
        local_addr=hosts.addresses[number],
        start_method="fork",
    )
    elastic_launch(launch, rank)(case["config"], case["journal"])
    sys.exit(0)


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def play(case, hosts, log):
    """Starts both hosts, has the steps happen, and waits for the end."""
    journal = Path(case["journal"])
    begin = time.monotonic()
    statuses = [None, None]

    def start(number):
        return fork(functools.partial(agent, hosts, number, case), log)

    def look():
        for number, child in enumerate(children):
            if statuses[number] is None:
                found, status = os.waitpid(child, os.WNOHANG)
                statuses[number] = os.waitstatus_to_exitcode(status) if found else None
        if time.monotonic() - begin > LIMIT_SECONDS:
            raise TimeoutError
        time.sleep(0.01)

    children = [start(number) for number in (0, 1)]
    try:
        for what, number in case["steps"]:
            with log.open("a") as stream:
                stream.write(f"--- {time.strftime('%H:%M:%S')} {what} {number}\n")
            match what:
                case "lines":
                    wanted = num_lines(journal) + number
                    while num_lines(journal) < wanted and None in statuses:
                        look()
                case "cut":
                    hosts.set_cable("down")
                    time.sleep(number)
                    hosts.set_cable("up")
                case "kill":
                    end(hosts, number)
                    while statuses[number] is None:
                        look()
                case "start":
                    statuses[number] = None
                    children[number] = start(number)
        while None in statuses:
            look()
    except TimeoutError:
        pass
    finally:
        for number in (0, 1):
            end(hosts, number)
    return statuses


def end(hosts, number):
    """Kills what runs on a host."""
    found = subprocess.run(
        ["ip", "netns", "pids", hosts.names[number]], check=True, capture_output=True, text=True, timeout=20
    )
    for process in found.stdout.split():
        # A worker may end by itself between the listing and this, now that its peers are gone.
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def main():
    path = Path(sys.argv[1])
    case = json.loads(path.read_text())
    preload([])
    log = path.with_name(f"{path.name}.log")
    with Hosts(f"host{os.getpid()}") as hosts:
        statuses = play(case, hosts, log)
    found = {"statuses": statuses, "output": log.read_text(errors="replace")}
    path.with_name(f"{path.name}.found").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
