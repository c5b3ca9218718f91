"""The files of a model directory: which of them are read, and quick checks of them.

The weights are those that transformers would load. Nothing heavy is imported, so that a mistake is answered
at once.
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardes.config.old_keys import warn_once
from shardes.errors import UserError
from shardes.utils.messages import listed
from shardes.utils.paths import describe_path
from shardes.utils.reading import read_regular, repeated_names

FETCH_HINT = "give a model directory, or the name of a model on the hub (ORGANISATION/MODEL)"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_JSON_BYTES = 1 << 26
# More layers, experts or heads than any model has; a loop over such a number would not end.
_MAX_COUNT = 100_000
_COUNTS = re.compile(r"(^|_)(layers?|blocks?|experts?|heads?|groups?|depth|labels)$")
_NUMBERS = re.compile(r"(^|_)(size|dim|heads|layers|experts|window|eps|theta)$")
# Sizes of which every model has at least one.
_POSITIVE = re.compile(
    r"(hidden_size|d_model|n_embd|vocab_size|head_dim|num(_attention|_key_value)?_heads|n_heads?"
    r"|num_hidden_layers|n_layers?)"
)
# What transformers' own distributed saving writes.
_RANK_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# What is read besides weights, by transformers or by the tokenizer.
_READ = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "*.py",
)


def check_model_directory(path: Path) -> None:
    """Refuse a ``model.path`` that is no model directory; quick, and no weights are read.

    Raises:
        UserError: There is no usable config.json, there are no weights, or a file that will be read is a
            broken link or no file.
    """
    try:
        _check_files(path)
    except OSError as error:  # a directory on the way may not be entered
        raise UserError(f"model.path: {path} cannot be read ({error.strerror}); {FETCH_HINT}") from None


def _check_files(path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"model.path: {describe_path(path)}; {FETCH_HINT}")
    read_model_config(path / "config.json")
    weight_files(path)
    for pattern in _READ:
        for file in sorted(path.glob(pattern)):
            if not file.is_file() and not file.is_dir():
                raise UserError(f"model.path: {describe_path(file)}; fetch it again, or remove it")


def kernel_on_hub(config: Mapping[str, Any]) -> str | None:
    """Return the first repository of kernels that a ``config.json`` names for transformers to fetch."""
    for name, value in config.items():
        values = value.values() if isinstance(value, dict) else [value]
        if name.endswith("_implementation"):
            for each in values:
                if isinstance(each, str) and "/" in each:
                    return each
        elif isinstance(value, dict) and (kernel := kernel_on_hub(value)):
            return kernel
    return None


def read_model_config(file: Path) -> dict[str, Any]:
    """Read a ``config.json``, as JSON alone.

    Raises:
        UserError: It is not there, is not a JSON object, or asks for numbers of layers and the like that no
            model has.
    """
    if not file.is_file():
        is_adapter = (file.parent / "adapter_config.json").is_file()
        raise UserError(
            f"model.path: {describe_path(file)}; {file.parent} holds an adapter, and no model: merge it into "
            "its base model (merge_and_unload of peft), and give the directory of the result"
            if is_adapter
            else f"model.path: {describe_path(file)}; {_inner_model(file.parent) or FETCH_HINT}"
        )
    config = read_json_object(file, key="model.path")
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for name, value in part.items():
            is_wrong = isinstance(value, str) and _NUMBERS.search(name)
            if is_wrong or (type(value) is int and value <= 0 and _POSITIVE.fullmatch(name)):
                wanted = "a number" if is_wrong else "a positive number"
                raise UserError(
                    f"model.path: {file}: {name} is {value!r:.80}; wanted: {wanted}. Fetch the file again"
                )
    for name, value in _numbers(config):
        if _COUNTS.search(name) and abs(value) > _MAX_COUNT:
            raise UserError(
                f"model.path: {file}: {name} is {value}; no model has more than {_MAX_COUNT}. Fetch the file "
                "again"
            )
    return config


def _inner_model(directory: Path) -> str | None:
    """Return which directory to give where one holds models, as a cache or a training directory does."""
    found = [file for pattern in ("*", "snapshots/*") for file in directory.glob(f"{pattern}/config.json")]
    return (
        f"there is one in {listed(sorted(str(file.parent) for file in found))}: give that" if found else None
    )


def _numbers(tree: Any) -> Iterator[tuple[str, float]]:
    """Yield names and values of all numbers in a tree of JSON, of any depth."""
    rest = [("", tree)]
    while rest:
        name, value = rest.pop()
        if isinstance(value, dict):
            rest += value.items()
        elif isinstance(value, list):
            rest += [(name, each) for each in value]
        elif isinstance(value, int | float):
            yield name, value


def read_json_object(file: Path, *, key: str) -> dict[str, Any]:
    """Read a file that holds one JSON object; a name that it has twice is warned of, and the last one counts.

    Args:
        file: The file.
        key: Configuration key that it belongs to, for messages.

    Raises:
        UserError: It cannot be read, is too large, or holds something else.
    """
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend(repeated_names(pairs))
        return found

    try:
        found = json.loads(read_regular(file, max_bytes=_MAX_JSON_BYTES).decode(), object_pairs_hook=collect)
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"{key}: {file}: its JSON is nested too deeply; fetch it again") from None
    except ValueError as error:
        raise UserError(f"{key}: {file} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file} holds a JSON {type(found).__name__}, but wanted is an object")
    if twice:
        warn_once(f"{key}: {file}: {listed(twice)} given twice; the last counts")
    return found


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a model's weights, in the order in which later ones replace tensors.

    These are the files that transformers loads: the one that ``transformers_weights`` in config.json names,
    or else model.safetensors, or else the files in its index. Pickles are never loaded.

    Raises:
        UserError: There are none, one of those in the index is missing, or transformers would load something
            besides.
    """
    if not directory.is_dir():
        raise UserError(f"model.path: {directory} is not a directory; {FETCH_HINT}")
    of_ranks = sorted(file.name for file in directory.iterdir() if _RANK_FILE.fullmatch(file.name))
    if of_ranks:
        raise UserError(
            f"model.path: {directory}: {of_ranks[0]} is a part of a distributed checkpoint; load it with "
            "transformers, and save it again as one model"
        )
    _check_adapter(directory)
    named = _named_in_config(directory)
    if named is not None:
        return [named] if named.name.endswith(".safetensors") else _indexed_files(directory, named)
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        return _indexed_files(directory, directory / INDEX)
    raise UserError(f"model.path: {directory} {_what_it_has(directory)}")


def has_weights(directory: Path) -> bool:
    """Return whether there are weights, or something that says which files hold them."""
    return any((directory / name).is_file() for name in (WEIGHTS, INDEX)) or (
        (directory / "config.json").is_file() and _named_in_config(directory) is not None
    )


def _named_in_config(directory: Path) -> Path | None:
    """Return the file of weights, or of their index, that config.json names; None if it names none.

    Raises:
        UserError: The name is none of such a file in this directory.
    """
    config = directory / "config.json"
    name = read_model_config(config).get("transformers_weights") if config.is_file() else None
    if name is None:
        return None
    where = f"model.path: {config}: transformers_weights is {name!r}"
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{where}; wanted the name of a safetensors file, or of an index of such files")
    path = directory / name
    # As in transformers: a link may lead outside, the name may not.
    if not os.path.normpath(path.absolute()).startswith(os.path.normpath(directory.absolute()) + os.sep):
        raise UserError(f"{where}, which is not inside the directory")
    if not path.is_file():
        raise UserError(f"{where}, but {describe_path(path)}")
    return path


def _check_adapter(directory: Path) -> None:
    """Refuse an adapter that transformers would apply to the weights; otherwise say that it is left out.

    Raises:
        UserError: There is one, and peft is installed.
    """
    if not (directory / "adapter_config.json").is_file():
        return
    if importlib.util.find_spec("peft") is not None:
        raise UserError(
            f"model.path: {directory} holds an adapter (adapter_config.json), which transformers would apply "
            "to the model's weights; merge it into them (merge_and_unload of peft), or move it elsewhere"
        )
    warn_once(f"model.path: {directory} holds an adapter (adapter_config.json) as well, which is not applied")


def _indexed_files(directory: Path, index: Path) -> list[Path]:
    """Return the files that an index names.

    Raises:
        UserError: The file is not an index, or a file is missing.
    """
    weight_map = read_json_object(index, key="model.path").get("weight_map")
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    names = [name for name in named if isinstance(name, str)]
    if not names or len(names) < len(named):
        raise UserError(f"model.path: {index} is damaged: it has no weight_map of file names; fetch it again")
    files = [directory / name for name in sorted(set(names))]
    broken = [describe_path(file) for file in files if file.is_symlink() and not file.exists()]
    if broken:
        raise UserError(f"model.path: {listed(broken)}; fetch the model again")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"model.path: {directory}: {index.name} names files that are missing: {listed(missing)}"
        )
    return files


def _what_it_has(directory: Path) -> str:
    """Return what a directory without weights has instead, and what to do about it."""
    for name in (WEIGHTS, INDEX):
        if os.path.lexists(directory / name):
            return f"has no weights: {describe_path(directory / name)}; fetch it again"
    found = [path for pattern in ("*.safetensors", "*/*.safetensors") for path in directory.glob(pattern)]
    others = sorted(str(path.relative_to(directory)) for path in found)
    if others:
        return (
            f"has no {WEIGHTS} and no {INDEX}, so no weights. There is {listed(others)}, which transformers "
            f"does not load by that name: if these are the weights, rename one file to {WEIGHTS} or write "
            f"{INDEX} for several; if they lie in a directory of their own, give that"
        )
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    packed = sorted(path.name for path in directory.glob("*.gguf"))
    hint = "fetch it again"
    if pickled:
        hint = f"{pickled[0]} is a pickle, which is never loaded: convert it to safetensors"
    elif packed:
        hint = f"{packed[0]} is not read: load it with transformers (gguf_file=...), and save it again"
    return f"has no *.safetensors files, so no weights; {hint}"
