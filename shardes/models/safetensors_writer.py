"""Writing safetensors files piece by piece, so that no tensor needs to be held whole, nor all at a time."""

import json
import math
import struct
from collections.abc import Sequence
from typing import Protocol

import torch

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Sink(Protocol):
    """What takes bytes: a file, or something before one."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Takes them all."""


def write_header(stream: Sink, tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> None:
    """Begins a file; the values of its tensors must follow in the same order.

    Args:
        stream: Where to.
        tensors: Name, dtype and shape of each.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)


def write_values(stream: Sink, values: torch.Tensor) -> None:
    """Writes a tensor's values, or some that come next of a larger one's."""
    stream.write(values.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
