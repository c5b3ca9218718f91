"""Every backend and gather on one GPU, with and without graphs, and its journals replayed on the CPU.

Runs are compared by the rewards, coefficients and digests of their journals.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gpu_check import replay, training
from gpu_check.part import ROOT, Context, is_installed

# Backend, gather, changes.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "zero3, layer": ("zero3", "layer", {}),
    "zero3, layer, master in host memory": ("zero3", "layer", {"weights__master_device": "cpu"}),
    "zero3, member": ("zero3", "member", {}),
    "fsdp, layer": ("fsdp", "layer", {}),
    "fsdp, layer, master in host memory": ("fsdp", "layer", {"weights__master_device": "cpu"}),
    "fsdp, member": ("fsdp", "member", {}),
    "tensor_parallel, layer": ("tensor_parallel", "layer", {}),
    "single, master in host memory": ("single", "member", {"weights__master_device": "cpu"}),
}
# Replayed on the CPU, besides the run that all are compared with.
UPDATES: dict[str, dict[str, Any]] = {
    "adam": {"es__optimizer": "adam"},
    "momentum": {"es__optimizer": "momentum"},
    "rademacher": {"es__noise": "rademacher", "es__antithetic": True},
    "low_rank, master in the model's dtype": {
        "es__noise": "low_rank",
        "es__rank": 2,
        "weights__master": "model",
    },
}
_REPLAY_SECONDS = 60


def run(context: Context) -> None:
    """Train the cases, compare them with one process over plain tensors, and replay journals."""
    is_tiny, folder = context.is_rehearsal, context.folder
    training.make_files(folder, is_tiny=is_tiny)

    def train(name: str, *, has_graphs: bool = True, **changes: Any) -> dict[str, Any]:
        tree = training.tree(folder, name, is_tiny=is_tiny, **changes)
        training.train(tree, has_graphs=has_graphs)
        return training.outcome(Path(tree["run"]["dir"]))

    wanted = train("single")
    context.check("rewards tell members apart", training.tells_members_apart(wanted))
    with context.section("graphs"):
        found = training.differences(wanted, train("eager", has_graphs=False))
        context.check("single, graphs off: the bits of graphs on", not found, detail=f"other {found}")
    cases, updates = CASES, UPDATES
    if is_tiny:  # one of each kind
        cases = {name: case for name, case in CASES.items() if case[1] == "layer" and not case[2]}
        updates = dict(list(UPDATES.items())[::3])
    for name, (backend, gather, changes) in cases.items():
        if backend == "zero3" and not is_installed("deepspeed"):
            context.skip(name, "not installed: deepspeed")
            continue
        with context.section(name):
            told = {"parallel__backend": backend, "rollout__gather": gather} | changes
            found = training.differences(wanted, train(name.replace(", ", "-").replace(" ", "-"), **told))
            context.check(f"{name}: the bits of single", not found, detail=f"other {found}")
    dirs = {"gaussian": folder / "runs" / "single"}
    for name, changes in updates.items():
        with context.section(name):
            run_name = name.partition(",")[0]
            train(run_name, **changes)
            dirs[name] = folder / "runs" / run_name
    with context.section("replay"):
        for name, problems in replay_on_cpu(dirs).items():
            context.check(
                f"{name}: the journal gives the same weights on the CPU", not problems, detail=problems
            )


def replay_on_cpu(run_dirs: dict[str, Path]) -> dict[str, str]:
    """Replay journals on the CPU and compare digests; return the problems by name, an empty text if none."""
    if not torch.cuda.is_available():
        return replay.verify(run_dirs)
    words = [sys.executable, "-m", "gpu_check.replay", *(f"{name}={path}" for name, path in run_dirs.items())]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    done = subprocess.run(
        words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=_REPLAY_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-1000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
