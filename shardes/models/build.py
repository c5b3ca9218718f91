"""Building a transformers model without its weights, and naming its parameters."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from shardes.config.schema import Config, check_model_directory
from shardes.errors import UserError


def load_model_config(path: Path, *, trust_remote_code: bool) -> Any:
    """Load the architecture of a model directory, or of a ``config.json`` by itself.

    Raises:
        UserError: No usable config.json.
    """
    file = path if path.is_file() else path / "config.json"
    if file != path:
        check_model_directory(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"model.path: {file} cannot be used: {_first_line(error)} (a model with code of its "
            "own needs model.trust_remote_code: true)"
        ) from None


def load_tokenizer(path: Path, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a model directory, padding on the left.

    Raises:
        UserError: No usable tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"model.path: {path}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_generation_config(path: Path, model_config: Any) -> GenerationConfig:
    """Load the model's generation config, which names the tokens that end an answer."""
    if (path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(path)
    return GenerationConfig.from_model_config(model_config)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the model's end-of-sequence tokens, from its generation config or else the tokenizer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def max_positions(model: Any) -> int | None:
    """Return the model's maximum number of tokens, prompt and answer together; None if it has none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def last_positions(count: int, *, width: int, device: torch.device) -> int | torch.Tensor:
    """Return the ``logits_to_keep`` with which a model computes the logits of the last positions only.

    transformers copies positions that are given as a tensor. A number gives a slice, which is not contiguous;
    torch then multiplies each piece by weights without gradients separately, and on CPUs copies the weights
    every time.

    Args:
        count: Number of last positions.
        width: Number of positions that go through the model.
        device: Device of the model.
    """
    return count if count == width else torch.arange(width - count, width, device=device)


def largest_layer(model: PreTrainedModel) -> int:
    """Return the number of elements of the largest block, embedding or head."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for several in lists for layer in several]
    layers += [model.get_input_embeddings(), model.get_output_embeddings()]
    return max(sum(p.numel() for p in layer.parameters()) for layer in layers if layer is not None)


def largest_parameter(model: PreTrainedModel) -> int:
    """Return the number of elements of the largest parameter, not counting a tied embedding."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    held = [id(parameter) for module in ends if module is not None for parameter in module.parameters()]
    return max(p.numel() for p in model.parameters() if held.count(id(p)) < 2)


def build_skeleton(model_config: Any, *, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model whose parameters are on the meta device and whose buffers are real.

    Buffers such as the rotary frequencies are computed by the constructors, so they cannot be on meta.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model.eval()


def skeleton_of(config: Config, *, source: Path | None = None) -> PreTrainedModel:
    """Build a run's model without weights, its parameters on meta.

    Args:
        config: Configuration of the run.
        source: ``config.json``, or its directory; None for that of ``model.path``.
    """
    trust = config.model.trust_remote_code
    model_config = load_model_config(source or config.model.path, trust_remote_code=trust)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    return build_skeleton(model_config, dtype=dtype, trust_remote_code=trust)


def fill_parameters(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Set each named parameter, in every module that it is tied to, to the given storage."""
    replaced: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        replaced[id(parameter)] = nn.Parameter(tensors[name], requires_grad=False)
    for module in model.modules():
        for key, held in module._parameters.items():
            if held is not None and id(held) in replaced:
                module._parameters[key] = replaced[id(held)]


def parameter_aliases(model: nn.Module) -> set[str]:
    """Return the names of tied weights besides the first of each."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def parameter_ids(names: list[str]) -> dict[str, int]:
    """Return the index of each name in the sorted list, which is the noise's parameter id."""
    return {name: index for index, name in enumerate(sorted(names))}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
