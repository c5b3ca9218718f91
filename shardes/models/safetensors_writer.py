"""Writing safetensors files piece by piece, without holding all tensors, or one whole, in memory."""

import json
import math
import struct
from collections.abc import Sequence
from typing import Protocol

import torch

from shardes.models.headers import DTYPE_NAMES


class Sink(Protocol):
    """A file, or a writer in front of one."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Write all of ``data``."""


def write_header(stream: Sink, tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> None:
    """Write the header of a file; the values of its tensors must follow in the same order.

    Args:
        stream: File to write to.
        tensors: Name, dtype and shape of each tensor.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)


def write_values(stream: Sink, values: torch.Tensor) -> None:
    """Write the values of a tensor, or the next part of a larger tensor's."""
    stream.write(values.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
