"""Text of a row that is the same for equal rows, in every process and at any time.

Rows are told apart by it, and a run is tied to its rows by its hash. Objects are described by what they
contain, never by where they lie in memory.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Collection, Mapping
from typing import Any

# Numpy and torch show the first and the last elements alone of more than these.
_MAX_SHOWN = 1000
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}")


def canonical(row: Mapping[str, Any]) -> str:
    """Return a text for a row, which equal rows share and others do not.

    Raises:
        ValueError: It holds an object of which nothing is known but its address.
    """
    try:
        return json.dumps(row, sort_keys=True, default=_described)
    except TypeError:  # keys that are no texts, or of several kinds
        return json.dumps(_with_text_keys(row), sort_keys=True, default=_described)


def is_plain(value: Any) -> bool:
    """Return True for a value that surely has a text, as all values of JSON have."""
    return value is None or isinstance(value, str | int | float | bytes)


def _described(value: Any) -> Any:
    """Return something that JSON can hold instead of an object."""
    if isinstance(value, set | frozenset):
        return sorted(canonical({"": each}) for each in value)
    if isinstance(value, Mapping):
        return _with_text_keys(value)
    if isinstance(value, memoryview):
        return _sha256(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _array(value)
    if all(hasattr(value, name) for name in ("mode", "size", "tobytes", "getpalette")):
        return ["image", value.mode, list(value.size), _sha256(value.tobytes()), value.getpalette()]
    text = str(value)
    return text if _ADDRESS.search(text) is None else _contents(value)


def _array(value: Any) -> Any:
    """Describe an array of numpy, or a tensor of torch."""
    num_elements = 1
    for length in value.shape:
        num_elements *= length
    if num_elements <= _MAX_SHOWN:
        return str(value)
    if value.dtype == object:
        return value.tolist()
    if hasattr(value, "numpy"):
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        value = value.numpy()
    return ["array", str(value.dtype), list(value.shape), _sha256(value.tobytes())]


def _contents(value: Any) -> Any:
    """Describe an object that would be shown with its address."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    try:
        if isinstance(value, Collection):
            return [kind, *value]
        if not callable(value) and (attributes := getattr(value, "__dict__", None)):
            return [kind, _with_text_keys(attributes)]
        return [kind, _sha256(pickle.dumps(value, protocol=4))]
    except Exception as error:
        raise ValueError(f"{value!r:.200} cannot be compared with others ({error})") from None


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else repr(k): _with_text_keys(v) for k, v in value.items()}
    return [_with_text_keys(each) for each in value] if isinstance(value, list | tuple) else value


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
