"""Building a transformers model without its weights, and naming its parameters."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from shardes.config.schema import Config, check_model_directory
from shardes.errors import UserError

_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
# Several times the largest tokenizer that is known.
_MAX_TOKENIZER_BYTES = 2**28


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
    _check_tokenizer_files(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # damaged files end in any of them, a panic of tokenizers included
        raise UserError(
            f"model.path: {path}: its tokenizer cannot be loaded: {_first_line(error)}; use the files "
            "(tokenizer.json, tokenizer_config.json) that the model was published with"
        ) from None
    if isinstance(tokenizer, PreTrainedTokenizerFast) and len(tokenizer.added_tokens_decoder) == len(
        tokenizer
    ):
        # transformers makes one of nothing where there are no files.
        raise UserError(
            f"model.path: {path}: its tokenizer has no vocabulary; put the files (tokenizer.json, "
            "tokenizer_config.json) there that the model was published with"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_tokenizer_files(path: Path) -> None:
    """Refuse files of a tokenizer that would be read for ever, or fill the memory.

    Raises:
        UserError: One is no regular file, or is too large.
    """
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        if file.name.startswith(_TOKENIZER_FILES) and file.exists() and not file.is_dir():
            if not file.is_file():
                raise UserError(f"model.path: {file} is no regular file; put the model's own there")
            if (size := file.stat().st_size) > _MAX_TOKENIZER_BYTES:
                raise UserError(
                    f"model.path: {file} has {size} bytes, and a tokenizer's file at most "
                    f"{_MAX_TOKENIZER_BYTES}; put the model's own there"
                )


def pad_token(model: Any, tokenizer: Any) -> int:
    """Return the token that fills rows where they are masked: the tokenizer's, if the model knows it.

    Some tokenizers have one that was added after the model was made, and others have none.
    """
    known = vocabulary_size(model.config)
    found = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    return next((token for token in found if token is not None and (known is None or 0 <= token < known)), 0)


def vocabulary_size(model_config: Any) -> int | None:
    """Return how many tokens a model has embeddings for; None if its configuration does not say."""
    size = getattr(model_config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


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
    return positions_of(model.config)


def positions_of(model_config: Any) -> int | None:
    """Return the same for a model's configuration."""
    positions: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return positions


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


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(": ") if str(error) else type(error).__name__
