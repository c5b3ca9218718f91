"""Forks ranks that come to harm, case after case, from one process that has imported everything.

python -m tests.helpers.fault_cases CASES.json, a list of {"config": path, "world_size": number, "fault":
{"kind": ..., "rank": ..., "call": ...}, "overrides": {rank: [KEY=VALUE, ...]}}; writes [{"statuses": [...],
"output": ...}, ...] to CASES.json.found. ``call`` counts what ``kind`` is about, from 0.
"""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.helpers.ranks import free_port
from tools.soak import command, fork, preload

LIMIT_SECONDS = 60


def nth_call(owner, name, call, do):
    """Has ``do`` called in place of one call of a function; what it returns None for goes on as usual."""
    original, calls = getattr(owner, name), iter(range(1_000_000))

    def wrapper(*arguments, **named):
        if next(calls) == call:
            found = do()
            if found is not None:
                return found
        return original(*arguments, **named)

    setattr(owner, name, wrapper)


def raise_one():
    raise ArithmeticError("this rank has miscounted")


def signal_self(number):
    os.kill(os.getpid(), number)


def signal_self_and_take_long(number):
    os.kill(os.getpid(), number)
    time.sleep(1000)


def set_fault(kind, call):
    import torch

    from shardes.rollout.evaluator import Evaluator
    from shardes.rollout.prompts import PromptBatch
    from shardes.weights.master import Weights
    from shardes.weights.snapshot_view import owned_tensors

    if kind == "corrupt":
        original, calls = Weights.update, iter(range(1_000_000))

        def update(self, *arguments, **keywords):
            original(self, *arguments, **keywords)
            if next(calls) == call:
                *_, master = next(iter(owned_tensors(self)))
                master.view(-1)[3] += torch.finfo(master.dtype).eps * master.view(-1)[3].abs() + 1e-6

        Weights.update = update
        return
    places = {
        "raise": (Evaluator, "start", raise_one),
        "hang": (Evaluator, "start", functools.partial(time.sleep, 1000)),
        "die": (Evaluator, "start", functools.partial(signal_self, signal.SIGKILL)),
        "freeze": (Evaluator, "start", functools.partial(signal_self, signal.SIGSTOP)),
        "interrupt": (Evaluator, "start", functools.partial(signal_self, signal.SIGINT)),
        "stop": (Evaluator, "start", functools.partial(signal_self, signal.SIGUSR1)),
        "slow_stop": (Evaluator, "start", functools.partial(signal_self_and_take_long, signal.SIGTERM)),
        "prompts": (PromptBatch, "fingerprint", lambda: b"other words"),
    }
    owner, name, do = places[kind]
    nth_call(owner, name, call, do)


def rank(number, case, port):
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(case["world_size"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    fault = case["fault"]
    if fault and fault["kind"] == "freeze":
        from shardes.distributed import silence

        silence._LEAST_SECONDS = 2.0
    if fault and fault["rank"] == number:
        set_fault(fault["kind"], fault["call"])
    command(["train", "--config", case["config"], *case.get("overrides", {}).get(str(number), [])])


def run(case, log):
    port = free_port()
    begin = time.monotonic()
    children = [
        fork(functools.partial(rank, number, case, port), log) for number in range(case["world_size"])
    ]
    statuses = {}
    while len(statuses) < len(children):
        for child in children:
            found, status = os.waitpid(child, os.WNOHANG) if child not in statuses else (0, 0)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
            elif child not in statuses and time.monotonic() - begin > LIMIT_SECONDS:
                os.kill(child, signal.SIGKILL)
        if case["fault"] and case["fault"]["kind"] == "freeze" and len(statuses) == len(children) - 1:
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGCONT)  # it is the frozen one, and nobody waits for it any more
        time.sleep(0.01)
    return {
        "statuses": [statuses[child] for child in children],
        "output": log.read_text(errors="replace"),
    }


def main():
    path = Path(sys.argv[1])
    cases = json.loads(path.read_text())
    preload([])
    found = [run(case, path.with_name(f"{path.name}.{number}.log")) for number, case in enumerate(cases)]
    path.with_name(f"{path.name}.found").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
