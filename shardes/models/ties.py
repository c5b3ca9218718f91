"""Weights that config.json ties, while the files may hold different ones."""

import math

import torch

from shardes.models.checkpoint import Checkpoint, Found, TensorReader
from shardes.models.conversion import Conversion
from shardes.noise.region import Region

_COMPARED_ELEMENTS = 1 << 24


def different_ties(conversion: Conversion, checkpoint: Checkpoint, *, dtype: torch.dtype) -> list[str]:
    """Return the further names of tied weights whose values in the files are not those of the first name.

    Args:
        conversion: Conversion of a model with ties.
        checkpoint: Files, to which no conversion was applied yet.
        dtype: Dtype of the model, in which transformers compares them.
    """
    joined = conversion.join(checkpoint.tensors)
    return [
        alias
        for alias, name in conversion.aliases.items()
        if alias in joined
        and name in joined
        and not _are_same(joined[alias], joined[name], checkpoint, dtype)
    ]


def _are_same(ones: list[str], others: list[str], checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Return whether the tensors that make up one parameter have the values of another's."""
    return len(ones) == len(others) and all(
        _same_values(checkpoint.tensors[one], checkpoint.tensors[other], dtype=dtype)
        for one, other in zip(ones, others, strict=True)
    )


def _same_values(one: Found, other: Found, *, dtype: torch.dtype) -> bool:
    """Return whether two stored tensors have the same shape, and the same values once they are rounded.

    Args:
        one: A tensor of the files.
        other: Another.
        dtype: Dtype in which they are compared.
    """
    if one.shape != other.shape:
        return False
    reader, size = TensorReader({"one": one, "other": other}), math.prod(one.shape)
    for start in range(0, size, _COMPARED_ELEMENTS):
        length = min(_COMPARED_ELEMENTS, size - start)
        region, parts = Region(0, size, start, length), []
        for name in reader.tensors:
            parts.append(torch.empty(length, dtype=dtype))
            reader.read(name, region=region, out=parts[-1])
        if not torch.equal(*parts):
            return False
    return True
