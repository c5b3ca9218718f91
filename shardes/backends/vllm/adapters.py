"""Arguments by which vLLM has adapters (LoRA), so that members share its forwards, and what these change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shardes.config.schema import Config
from shardes.errors import UserError

# Ranks for which vLLM has slots.
_RANKS = (1, 8, 16, 32, 64, 128, 256)


def adapter_arguments(config: Config, skeleton: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` by which it has a slot for each member of a forward.

    Args:
        config: Configuration of the run.
        skeleton: Model, whose linear layers get slots, but for the head: vLLM cannot score prompts with an
            adapter there.

    Raises:
        UserError: vLLM has no slots like that.
    """
    count = config.rollout.members_per_forward
    if count == 1:
        return {}
    if count == "auto":
        raise UserError(
            "rollout.members_per_forward: got auto; vLLM takes the memory of its slots when it starts, so "
            "that it has to be told their number: set one, such as 8"
        )
    rank = next((rank for rank in _RANKS if rank >= config.es.rank), None)
    if rank is None:
        raise UserError(
            f"es.rank: got {config.es.rank}; with rollout.members_per_forward: {count} and "
            f"parallel.backend: vllm at most {_RANKS[-1]}"
        )
    head = skeleton.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return {
        "enable_lora": True,
        "max_loras": count,
        "max_cpu_loras": count,
        "max_lora_rank": rank,
        "lora_target_modules": sorted(linear),
    }


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Have a model be as it was before its layers were wrapped for adapters, within the context.

    vLLM's weight loaders know the names of parameters by which they are called without adapters alone.
    """
    from vllm.lora.layers import BaseLayerWithLoRA

    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseLayerWithLoRA)]
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    for name in wrapped:
        parent, _, key = name.rpartition(".")
        owner, wrapper = model.get_submodule(parent), model.get_submodule(name)
        undo.append((owner, key, wrapper))
        setattr(owner, key, wrapper.base_layer)
    try:
        yield
    finally:
        for owner, key, wrapper in undo:
            setattr(owner, key, wrapper)
