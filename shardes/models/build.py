"""Building a transformers model without its weights, and naming its parameters."""

import functools
import re
import string
from collections.abc import Mapping
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

from shardes.config.old_keys import warn_once
from shardes.config.schema import Config
from shardes.errors import UserError
from shardes.models.checkpoint import Checkpoint, Found, StoredTensor, read_whole
from shardes.models.conversion import Conversion
from shardes.models.files import kernel_on_hub, read_json_object, read_model_config
from shardes.models.limits import MOST_BYTES, MOST_PARAMETERS, limited
from shardes.models.ties import different_ties
from shardes.utils.messages import one_line

_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
# Several times the largest tokenizer that is known.
_MAX_TOKENIZER_BYTES = 2**28
# Every generated token is compared with each of them.
_MAX_END_TOKENS = 1000


def load_model_config(path: Path, *, trust_remote_code: bool) -> Any:
    """Load the architecture of a model directory, or of a ``config.json`` by itself.

    Raises:
        UserError: No usable config.json.
    """
    file = path if path.is_file() else path / "config.json"
    found = read_model_config(file)
    if not trust_remote_code and (kernel := kernel_on_hub(found)):
        raise UserError(
            f"model.path: {file} names the kernel {kernel!r:.80}, which is code that would be fetched over "
            "the network, and run; remove that entry, or consent to it by model.trust_remote_code=true (for "
            "a run of somebody else, by --trust-remote-code)"
        )
    with limited(f"model.path: {file} cannot be used"):
        # The dtype in the file may be what torch does not have, such as auto; model.dtype decides.
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, dtype="float32")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        raise UserError(
            f"model.path: {file} has a quantization_config; quantised weights cannot be perturbed: use the "
            "model's unquantised version, or remove that entry if the weights are not quantised"
        )
    return config


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
            f"model.path: {path}: its tokenizer cannot be loaded: {one_line(error)}; use the files "
            "(tokenizer.json, tokenizer_config.json) that the model was published with"
        ) from None
    # transformers makes one of nothing where there are no files, or one with a few tokens of its class.
    has_added = isinstance(tokenizer, PreTrainedTokenizerFast)
    if has_added and (len(tokenizer.added_tokens_decoder) == len(tokenizer) or _knows_nothing(tokenizer)):
        raise UserError(
            f"model.path: {path}: its tokenizer has no vocabulary; put the files (tokenizer.json, "
            "tokenizer_config.json) there that the model was published with"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _knows_nothing(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether no printable character of ASCII is anything to a tokenizer."""
    return not tokenizer.backend_tokenizer.encode(string.printable, add_special_tokens=False).ids


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
    """Load the model's generation config, which names the tokens that end an answer.

    Raises:
        UserError: It cannot be used.
    """
    file = path / "generation_config.json"
    if file.is_file():
        read_json_object(file, key="model.path")
        with limited(f"model.path: {file} cannot be used"):
            config = GenerationConfig.from_pretrained(path)
    else:
        file = path / "config.json"
        with limited(f"model.path: {file} cannot be used"):
            config = GenerationConfig.from_model_config(model_config)
    ends = config.eos_token_id
    tokens = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if len(tokens) > _MAX_END_TOKENS:
        raise UserError(
            f"model.path: {file}: eos_token_id has {len(tokens)} ids, and no model more than "
            f"{_MAX_END_TOKENS}; fetch the file again"
        )
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise UserError(
            f"model.path: {file}: eos_token_id is {ends!r}; wanted the id of a token, or a list of ids"
        )
    return config


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


def build_skeleton(
    model_config: Any,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    most_parameters: int = MOST_PARAMETERS,
    most_bytes: int = MOST_BYTES,
) -> PreTrainedModel:
    """Build a model whose parameters are on the meta device and whose buffers are real.

    Buffers such as the rotary frequencies are computed by the constructors, so they cannot be on meta.

    Args:
        model_config: Architecture.
        dtype: Dtype of the parameters.
        trust_remote_code: Whether the model's own Python code may run.
        most_parameters: Number of parameters beyond which the architecture is refused.
        most_bytes: Memory that building it may take, in bytes.

    Raises:
        UserError: No model can be built of it.
    """
    what = f"model.path: no model can be built as config.json of {model_config.name_or_path} describes it"
    try:
        with limited(what, most_parameters=most_parameters, most_bytes=most_bytes):
            model_config.return_dict = True  # models answer with tuples otherwise
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    model_config, dtype=dtype, trust_remote_code=trust_remote_code
                )
            model.tie_weights()
    except UserError as error:
        if not isinstance(error.__cause__, KeyError):
            raise
        # A table of names was asked for one that it does not have.
        names = _entries_with(model_config.to_dict(), error.__cause__.args[0])
        raise UserError(f"{error}; this is the value of {' and '.join(names) or 'nothing'}") from None
    return model.eval()


def _entries_with(tree: dict[str, Any], value: Any) -> list[str]:
    """Return the names in a tree of dictionaries that have a value, dotted."""
    found = [name for name, each in tree.items() if isinstance(each, str | int) and each == value]
    parts = {name: part for name, part in tree.items() if isinstance(part, dict)}
    return found + [f"{name}.{inner}" for name, part in parts.items() for inner in _entries_with(part, value)]


def build_model(config: Config, checkpoint: Checkpoint) -> tuple[PreTrainedModel, Conversion]:
    """Build a run's model without weights, as transformers would build it for the files that there are.

    Weights that config.json ties are not tied if the files hold different ones. Buffers have the files'
    values.

    Args:
        config: Configuration of the run.
        checkpoint: Weights of ``model.path``; their tensors become the model's parameters.

    Returns:
        The model, its parameters on meta, and the conversion that was applied to the checkpoint.

    Raises:
        UserError: config.json cannot be used, or describes another model than the files hold.
    """
    path, trust = config.model.directory, config.model.trust_remote_code
    model_config = load_model_config(path, trust_remote_code=trust)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    build = functools.partial(
        build_skeleton,
        dtype=dtype,
        trust_remote_code=trust,
        # Each tensor of the files becomes one parameter, or a few of them.
        most_parameters=min(MOST_PARAMETERS, 1000 + 4 * len(checkpoint.tensors)),
        most_bytes=2**32 + checkpoint.num_bytes,
    )
    model = build(model_config)
    conversion = Conversion(model)
    apart = different_ties(conversion, checkpoint, dtype=dtype)
    if apart:
        warn_once(
            f"model.path: {path}: config.json ties {apart[0]} to another weight, but the files hold two that "
            "differ; as in transformers, they are not tied"
        )
        for part in (model_config, model_config.get_text_config()):
            part.tie_word_embeddings = False
        model = build(model_config)
        conversion = Conversion(model)
        conversion.is_untied = True
    held = conversion.find_buffers(checkpoint.tensors)
    buffers = {name: checkpoint.tensors[stored] for name, stored in held.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    conversion.apply(checkpoint, shapes=shapes)
    checkpoint.check_matches(shapes, aliases=set(conversion.aliases))
    _fill_buffers(model, buffers, dtype=dtype)
    return model, conversion


def _fill_buffers(model: PreTrainedModel, found: Mapping[str, Found], *, dtype: torch.dtype) -> None:
    """Give buffers the values in the files, in the dtype that transformers keeps them in.

    Raises:
        UserError: One has another shape.
    """
    wide = [re.escape(name).replace(r"\*", ".*") for name in model._get_dtype_plan(dtype)]
    modules = dict(model.named_modules())
    for name, tensor in found.items():
        assert isinstance(tensor, StoredTensor), "nothing is joined yet"
        owner, _, key = name.rpartition(".")
        buffer = modules[owner]._buffers[key]
        if buffer is None or tuple(buffer.shape) != tensor.shape:
            raise UserError(
                f"model.path: {tensor.path}: the buffer {name} has shape {tensor.shape}; config.json asks "
                f"for {None if buffer is None else tuple(buffer.shape)}"
            )
        is_wide = any(re.search(pattern, name) for pattern in wide)
        modules[owner]._buffers[key] = read_whole(tensor).to(torch.float32 if is_wide else buffer.dtype)


def skeleton_of(config: Config, *, source: Path | None = None) -> PreTrainedModel:
    """Build a run's model without weights, its parameters on meta.

    Args:
        config: Configuration of the run.
        source: ``config.json``, or its directory; None for that of ``model.path``.
    """
    trust = config.model.trust_remote_code
    model_config = load_model_config(source or config.model.directory, trust_remote_code=trust)
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
