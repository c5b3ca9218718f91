"""Facts about the machine, that all figures depend on; nothing here initialises CUDA in this process."""

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from gpu_check.part import ROOT

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "accelerate",
    "vllm",
    "numba",
    "numpy",
    "pydantic",
)


def num_gpus() -> int:
    """Return the number of GPUs that torch sees; 0 if torch cannot be imported."""
    # Asks the driver's management library, which leaves CUDA uninitialised.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    try:
        import torch
    except ImportError:
        return 0
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the checkout, with a plus sign if files differ from it; None without git."""
    found = _output(["git", "rev-parse", "--short=12", "HEAD"])
    if not found:
        return None
    return found + ("+" if _output(["git", "status", "--porcelain", "--untracked-files=no"]) else "")


def machine_facts(*, is_rehearsal: bool) -> dict[str, Any]:
    """Return names, sizes and versions, JSON-able."""
    fields = "name,memory.total,driver_version"
    listed = (
        None if is_rehearsal else _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])
    )
    gpus = [[field.strip() for field in line.split(",")] for line in (listed or "").splitlines()]
    names = sorted({name for name, *_ in gpus})
    return {
        "device": ", ".join(names) if names else ("CPU" if is_rehearsal else "unknown"),
        "num_devices": len(gpus),
        "memory": gpus[0][1] if gpus else None,
        "driver": gpus[0][2] if gpus else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        **{name: version_of(name) for name in PACKAGES},
    }


def _output(command: list[str]) -> str | None:
    """Return what a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
