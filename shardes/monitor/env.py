"""A description of the machine for bug reports: versions, devices, and usable parts, or why they are not."""

import contextlib
import importlib.metadata
import io
import os
import platform
import sys
from collections.abc import Callable

from shardes.errors import UserError
from shardes.utils.messages import one_line
from shardes.utils.version import VERSION

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "triton", "numba", "numpy", "safetensors")
# What the optional features need, as in pyproject.toml; of vLLM the line of its backend tells.
_EXTRAS = {
    "zero3": ("deepspeed",),
    "plot": ("matplotlib",),
    "data": ("datasets", "pyarrow"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "math": ("math-verify",),
    "gguf": ("gguf",),
}
# Variables that change what a job does, of those that launchers and libraries read.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "PYTORCH_",
    "DS_ACCELERATOR",
)


def describe() -> dict[str, str]:
    """Return the description by line; imports everything that a run might."""
    # Before anything is imported that sets some of its own.
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    import torch
    import torch.distributed as dist

    found = {
        "shardes": VERSION,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
    }
    found |= {name: _version(name) or "not installed" for name in _PACKAGES}
    found["cuda"] = str(torch.version.cuda or "none: torch was built without it")
    found["devices"] = "; ".join(_devices()) or f"CPU, {os.cpu_count()} cores"
    found["memory"] = f"{_machine_bytes() / 2**30:.1f} GiB in this machine"
    found["nccl"] = _available(dist.is_nccl_available(), "torch was built without it")
    found["gloo"] = _available(dist.is_gloo_available(), "torch was built without it")
    found["backend single"] = "available"
    found["backend fsdp"] = _tried(_import_fsdp)
    found["backend zero3"] = _tried(_import_zero3)
    found["backend tensor_parallel"] = _tried(_import_tensor_parallel)
    found["backend vllm"] = _tried(_import_vllm)
    for extra, packages in _EXTRAS.items():
        missing = [name for name in packages if _version(name) is None]
        verb = "is" if len(missing) == 1 else "are"
        found[f"extra {extra}"] = (
            f"{', '.join(missing)} {verb} not installed: pip install 'shardes[{extra}]'"
            if missing
            else ", ".join(f"{name} {_version(name)}" for name in packages)
        )
    return found | variables


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """Return the accelerators' names, with their memory."""
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{each.name}, {each.total_memory / 2**30:.1f} GiB" for each in properties]


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _available(is_there: bool, reason: str) -> str:
    return "available" if is_there else f"not available: {reason}"


def _tried(attempt: Callable[[], object]) -> str:
    """Return ``available`` if something can be imported, else why not; its output is dropped."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            attempt()
    except (ImportError, UserError, OSError, RuntimeError) as error:
        return _available(False, one_line(error, most=None))
    return "available"


def _import_fsdp() -> None:
    import shardes.backends.fsdp  # noqa: F401 - whether it can be


def _import_zero3() -> None:
    from shardes.backends.zero3 import import_deepspeed

    import_deepspeed()


def _import_tensor_parallel() -> None:
    import shardes.backends.tensor_parallel  # noqa: F401 - whether it can be

    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # noqa: F401
    except ImportError:
        found = _version("transformers")
        raise UserError(f"it needs transformers 5.23, whose plans it applies; this is {found}") from None


def _import_vllm() -> None:
    from shardes.backends.vllm.launch import import_vllm

    import_vllm()
