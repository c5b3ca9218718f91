"""Reading a model directory: safetensors headers, and any range of any parameter's elements.

Only safetensors is read. A rank reads the bytes of its own elements and no others.
"""

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from shardes.errors import UserError
from shardes.models.files import weight_files
from shardes.models.headers import DTYPE_NAMES, DTYPES, quantised_error, read_header
from shardes.noise.region import Region

_READ_BYTES = 1 << 28


@dataclass(frozen=True)
class StoredTensor:
    """Place of one tensor in a file.

    Attributes:
        path: File.
        offset: First byte in the file.
        dtype: Dtype in the file.
        shape: Shape of the tensor.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    def find(self, first: int, length: int) -> Iterator[tuple["StoredTensor", int, int]]:
        """Yield the stored tensors of a range of elements, each with first element and length in it."""
        yield self, first, length


@dataclass(frozen=True)
class JoinedTensor:
    """A parameter that consists of several tensors of the files, one after the other.

    Attributes:
        pieces: Tensors of the files.
        shape: Shape of the parameter; it has as many elements as all pieces.
    """

    pieces: tuple[StoredTensor, ...]
    shape: tuple[int, ...]

    @cached_property
    def _starts(self) -> list[int]:
        """Index of each piece's first element in the parameter, and the index after the last piece."""
        return list(accumulate((piece.num_elements for piece in self.pieces), initial=0))

    def find(self, first: int, length: int) -> Iterator[tuple[StoredTensor, int, int]]:
        """Yield the stored tensors of a range of elements, each with first element and length in it."""
        starts = self._starts
        for i in range(bisect_right(starts, first) - 1, len(self.pieces)):
            low, high = max(first, starts[i]), min(first + length, starts[i + 1])
            if low >= first + length:
                return
            if low < high:
                yield self.pieces[i], low - starts[i], high - low


class Found(Protocol):
    """A parameter whose elements are stored in files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""

    def find(self, first: int, length: int) -> Iterator[tuple[StoredTensor, int, int]]:
        """Yield the stored tensors of a range of elements, each with first element and length in it."""


class TensorReader:
    """Reader of ranges of parameters' elements; it reads no other bytes.

    Args:
        tensors: Parameters by name.

    Attributes:
        tensors: Parameters by name.
        bytes_read: Number of bytes of weights that this process has read.
    """

    def __init__(self, tensors: Mapping[str, Found]) -> None:
        self.tensors = dict(tensors)
        self.bytes_read = 0

    def read(self, name: str, *, region: Region, out: torch.Tensor) -> None:
        """Fill ``out`` (flat, any float dtype) with a region's elements of a tensor, reading no others."""
        filled = 0
        with ExitStack() as files:
            opened: dict[Path, int] = {}
            for row in range(region.rows):
                for stored, first, length in self.tensors[name].find(
                    region.start + row * region.stride, region.length
                ):
                    if stored.path not in opened:
                        opened[stored.path] = os.open(stored.path, os.O_RDONLY)
                        files.callback(os.close, opened[stored.path])
                    self._read_range(opened[stored.path], stored, first, out[filled : filled + length])
                    filled += length

    def _read_range(self, descriptor: int, stored: StoredTensor, first: int, out: torch.Tensor) -> None:
        width = stored.dtype.itemsize
        step = _READ_BYTES // width
        for low in range(0, out.numel(), step):
            here = out[low : low + step]
            data = _read_exactly(descriptor, here.numel() * width, stored.offset + (first + low) * width)
            self.bytes_read += len(data)
            here.copy_(torch.frombuffer(data, dtype=stored.dtype))


class Checkpoint(TensorReader):
    """The weights of a model directory.

    Args:
        directory: A directory with safetensors files; those are read that transformers would load.

    Attributes:
        tensors: Stored tensors by name; after ``join``, parameters by name.
        buffers: Stored tensors of the model's buffers by name in the files; set by ``Conversion.apply``.
        num_bytes: Size of the files.
        header_sha256: Hash of all headers: names, shapes, dtypes and offsets.

    Raises:
        UserError: No safetensors files, or a damaged one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tensors: dict[str, StoredTensor] = {}
        digest = hashlib.sha256()
        files = weight_files(directory)
        self.num_bytes = sum(path.stat().st_size for path in files)
        for path in files:
            tensors |= stored_tensors(path, on_header=digest.update)
        super().__init__(tensors)
        self.buffers: dict[str, StoredTensor] = {}
        self._pieces: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        self.header_sha256 = digest.hexdigest()

    def buffers_sha256(self) -> str:
        """Compute a hash of the buffers: names, dtypes, shapes and values."""
        digest = hashlib.sha256()
        for name, stored in sorted(self.buffers.items()):
            digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            digest.update(read_whole(stored).view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def join(self, pieces: Mapping[str, Sequence[str]], *, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Replace the files' tensors by the model's parameters; a second call changes nothing.

        Args:
            pieces: Names of the tensors that make up each parameter, one after the other.
            shapes: Shape of each parameter.

        Raises:
            UserError: The tensors do not add up to a parameter.
        """
        joined: dict[str, Found] = {}
        names = {
            name: [piece for part in parts for piece in self.pieces_of(part)]
            for name, parts in pieces.items()
        }
        for name, parts in pieces.items():
            if len(parts) == 1:
                joined[name] = self.tensors[parts[0]]
                continue
            tensors = tuple(
                stored for part in parts if isinstance(stored := self.tensors[part], StoredTensor)
            )
            shape = shapes[name]
            rows = {stored.shape[-1:] for stored in tensors}
            total = sum(stored.num_elements for stored in tensors)
            if rows != {shape[-1:]} or total != torch.Size(shape).numel():
                raise UserError(
                    f"model.path: {self.directory}: {name} has shape {shape} in the model, but the files "
                    f"hold {len(tensors)} tensors for it, {parts[0]} the first, with {total} elements; files "
                    "are missing, or config.json is not theirs"
                )
            joined[name] = JoinedTensor(tensors, shape)
        self.tensors, self._pieces = joined, names

    def pieces_of(self, name: str) -> list[tuple[str, tuple[int, ...]]]:
        """Return names and shapes of the files' tensors that make up a parameter, in its order."""
        return self._pieces.get(name) or [(name, self.tensors[name].shape)]

    def check_matches(self, shapes: dict[str, tuple[int, ...]], *, aliases: set[str]) -> None:
        """Check that the checkpoint's tensors are the model's parameters.

        Args:
            shapes: Shapes of the model's parameters by name, each tied weight once.
            aliases: Further names of tied weights, which a file may hold as well.

        Raises:
            UserError: Names the tensors that are missing, left over, or of another shape.
        """
        for name, found in self.tensors.items():
            for stored, *_ in found.find(0, math.prod(found.shape)):
                if stored.dtype not in DTYPES.values():
                    raise quantised_error(f"model.path: {stored.path}: {name}", DTYPE_NAMES[stored.dtype])
        missing = sorted(set(shapes) - set(self.tensors))
        extra = sorted(set(self.tensors) - set(shapes) - aliases)
        if missing or extra:
            raise UserError(
                f"model.path: {self.directory}: its tensors are not the model's parameters"
                + (f"; missing from the files: {_listed(missing)}" if missing else "")
                + (f"; unknown to the model: {_listed(extra)}" if extra else "")
                + ". Load the model with transformers and save it again with save_original_format=False, "
                "which stores tensors as the model has them; or mend config.json, if it is not the files' own"
            )
        for name, shape in shapes.items():
            if self.tensors[name].shape != shape:
                raise UserError(
                    f"model.path: {self.directory}: {name} has shape {self.tensors[name].shape}; config.json "
                    f"asks for {shape}"
                )


def stored_tensors(
    path: Path, *, on_header: Callable[[bytes], object] = lambda header: None
) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file and return its tensors by name.

    Args:
        path: Safetensors file.
        on_header: Function that is called with the header's bytes.

    Raises:
        UserError: The file is damaged or cut short, or holds a dtype that torch does not have.
        OSError: It cannot be read.
    """
    header, entries = read_header(path)
    on_header(header)
    return {name: StoredTensor(path, *entry) for name, entry in entries.items()}


def read_whole(stored: StoredTensor) -> torch.Tensor:
    """Read a whole tensor in the dtype and shape that it has in its file."""
    size = stored.num_elements
    values = torch.empty(size, dtype=stored.dtype)
    if size:
        TensorReader({"": stored}).read("", region=Region(0, size, 0, size), out=values)
    return values.view(stored.shape)


def _read_exactly(descriptor: int, num_bytes: int, offset: int) -> bytearray:
    data = bytearray(num_bytes)
    view, done = memoryview(data), 0
    while done < num_bytes:  # one call reads 2 GiB at most
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise OSError(f"unexpected end of file at byte {offset + done}")
        done += count
    return data


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
