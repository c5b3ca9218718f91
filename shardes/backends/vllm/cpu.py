"""What vLLM's CPU build needs to be told, so that its weights can be perturbed and jobs do not meet."""

import functools
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardes.distributed.group import Group

# How names of shared memory begin.
_SHARED_MEMORY = "shardes-vllm-"


def prepare(group: Group) -> None:
    """Change what vLLM does on CPUs, before an engine is started; a collective of the ranks of ``group``."""
    keep_weights_unpacked()
    _find_kernels_beside_llvmlite()
    _name_shared_memory(group)


def keep_weights_unpacked() -> None:
    """Have layers multiply by weights as they are.

    oneDNN and AMX kernels pack every linear layer's weight when it has been loaded, and vLLM throws the
    weight itself away: there would be nothing to perturb.
    """
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False


def _find_kernels_beside_llvmlite() -> None:
    """Let the search for Triton's kernels pass in a process that has imported numba.

    It looks through the namespaces of all objects in all modules. What an object of llvmlite returns for its
    own is none, on which vLLM 0.32 fails.
    """
    from vllm.triton_utils import dispatcher

    def namespace(value: object) -> Mapping[str, Any]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = namespace


def _name_shared_memory(group: Group) -> None:
    """Have ranks share memory under a name that no other job has, and that is gone at once; a collective.

    vLLM's own name is the same for all jobs of a machine, and that of a killed job is in the next one's way.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    token = group.broadcast_json(secrets.token_hex(8))

    def name(communicator: Any) -> str:
        return f"{_SHARED_MEMORY}{token}-{communicator.unique_name}"

    _CPUSHMDistributed.make_group_name = staticmethod(name)
    share = _CPUSHMDistributed._init_cpu_shm
    if hasattr(share, "__wrapped__"):  # by an engine before
        return

    @functools.wraps(share)
    def share_and_unlink(communicator: Any) -> Any:
        handle = share(communicator)
        _unlink_shared_memory()
        return handle

    _CPUSHMDistributed._init_cpu_shm = share_and_unlink


def _unlink_shared_memory() -> None:
    """Remove the names of this process's shared memory, once all ranks have mapped it."""
    maps = Path("/proc/self/maps")
    for name in set(re.findall(rf"/dev/shm/{_SHARED_MEMORY}\S+", maps.read_text() if maps.exists() else "")):
        Path(name).unlink(missing_ok=True)
