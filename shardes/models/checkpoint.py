"""Reading a model directory: safetensors headers, and any range of any parameter's elements.

Only safetensors is read. A rank reads the bytes of its own elements, and of others only what is between short
rows of its own, as a shard of a matrix's columns has them.
"""

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from shardes.errors import UserError
from shardes.models.files import weight_files
from shardes.models.headers import DTYPE_NAMES, DTYPES, quantised_error, read_header
from shardes.models.stored_rows import Block, DifferentStridesError, Rows, shared
from shardes.noise.region import Region
from shardes.utils.files import read_exactly
from shardes.utils.messages import listed

_READ_BYTES = 1 << 28
# Rows are read with what is between them, in blocks of so many bytes at most, which processors have room for,
# if what is between two of them is no more than the second number: that takes less time than another call.
BLOCK_BYTES = 1 << 22
_GAP_BYTES = 1 << 17


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

    def places(self) -> Iterator[tuple["StoredTensor", Sequence[Rows]]]:
        """Yield the stored tensors, each with the parameter's elements that it holds, one after the other."""
        yield self, [(0, self.num_elements, 1, 0)]


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

    def places(self) -> Iterator[tuple[StoredTensor, Sequence[Rows]]]:
        """Yield the stored tensors, each with the parameter's elements that it holds, one after the other."""
        for start, piece in zip(self._starts, self.pieces, strict=False):
            yield piece, [(start, piece.num_elements, 1, 0)]


class Found(Protocol):
    """A parameter whose elements are stored in files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""

    def find(self, first: int, length: int) -> Iterator[tuple[StoredTensor, int, int]]:
        """Yield the stored tensors of a range of elements, each with first element and length in it."""

    def places(self) -> Iterator[tuple[StoredTensor, Sequence[Rows]]]:
        """Yield the stored tensors, each with the parameter's elements that it holds, one after the other."""


class TensorReader:
    """Reader of ranges of parameters' elements; it reads no others, but for what is between short rows.

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
        """Fill ``out`` (flat, any float dtype) with a region's elements of a tensor."""
        with ExitStack() as files:
            opened: dict[Path, int] = {}
            for stored, block in self._blocks(self.tensors[name], region):
                if stored.path not in opened:
                    opened[stored.path] = os.open(stored.path, os.O_RDONLY)
                    files.callback(os.close, opened[stored.path])
                self._read_block(opened[stored.path], stored, block, out)

    def _blocks(self, found: Found, region: Region) -> Iterator[tuple[StoredTensor, Block]]:
        """Yield the blocks that make up a region, each with the stored tensor that has it."""
        wanted = (region.start, region.length, region.rows, region.stride)
        blocks: list[tuple[StoredTensor, Block]] = []
        with suppress(DifferentStridesError):
            for stored, places in found.places():
                place = 0
                for rows in places:
                    blocks += [(stored, block) for block in shared(wanted, rows, place=place)]
                    place += rows[1] * rows[2]
        if sum(block.num_elements for _, block in blocks) == region.num_elements:
            yield from blocks
            return
        # Row by row, where files have other strides; it also tells which element no file has.
        target = 0
        for row in range(region.rows):
            for stored, first, length in found.find(region.start + row * region.stride, region.length):
                yield stored, Block(first, length, target, length, length, 1)
                target += length

    def _read_block(self, descriptor: int, stored: StoredTensor, block: Block, out: torch.Tensor) -> None:
        """Read a block's rows: all at once, in parts with what is between them, or row by row."""
        stride, width = block.source_stride, stored.dtype.itemsize
        is_dense = block.rows == 1 or stride == block.length == block.target_stride
        if is_dense:
            target = out[block.target : block.target + block.num_elements]
            self._read_range(descriptor, stored, block.source, target)
            return
        has_gaps = (stride - block.length) * width > _GAP_BYTES
        most_rows = 1 if has_gaps else max(1, min(block.rows, BLOCK_BYTES // (stride * width)))
        buffer = torch.empty((most_rows - 1) * stride + block.length, dtype=stored.dtype)
        for row in range(0, block.rows, most_rows):
            count = min(most_rows, block.rows - row)
            values = buffer[: (count - 1) * stride + block.length]
            self._fill(descriptor, stored, block.source + row * stride, values)
            place = out.storage_offset() + block.target + row * block.target_stride
            target = out.as_strided((count, block.length), (block.target_stride, 1), place)
            target.copy_(values.as_strided((count, block.length), (stride, 1)))

    def _read_range(self, descriptor: int, stored: StoredTensor, first: int, out: torch.Tensor) -> None:
        """Fill a flat tensor of any dtype and device with consecutive elements."""
        if out.dtype == stored.dtype and out.device.type == "cpu":
            self._fill(descriptor, stored, first, out)
            return
        step = _READ_BYTES // stored.dtype.itemsize
        buffer = torch.empty(min(step, out.numel()), dtype=stored.dtype)
        for low in range(0, out.numel(), step):
            here = out[low : low + step]
            values = buffer[: here.numel()]
            self._fill(descriptor, stored, first + low, values)
            here.copy_(values)

    def _fill(self, descriptor: int, stored: StoredTensor, first: int, out: torch.Tensor) -> None:
        """Fill a flat tensor of the stored dtype, on the CPU, with consecutive elements."""
        view = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        read_exactly(descriptor, view, offset=stored.offset + first * stored.dtype.itemsize)
        self.bytes_read += out.numel() * stored.dtype.itemsize


class Checkpoint(TensorReader):
    """The weights of a model directory.

    Args:
        directory: A directory with safetensors files; those are read that transformers would load.
        tensors: Stored tensors by name, if they are known from elsewhere and not to be read.

    Attributes:
        tensors: Stored tensors by name; after ``join``, parameters by name.
        buffers: Stored tensors of the model's buffers by name in the files; set by ``Conversion.apply``.
        num_bytes: Size of the files.
        header_sha256: Hash of all headers: names, shapes, dtypes and offsets.

    Raises:
        UserError: No safetensors files, or a damaged one.
    """

    def __init__(self, directory: Path, *, tensors: Mapping[str, StoredTensor] | None = None) -> None:
        self.directory = directory
        digest = hashlib.sha256()
        if tensors is None:
            files, tensors = weight_files(directory), {}
            self.num_bytes = sum(path.stat().st_size for path in files)
            for path in files:
                tensors |= stored_tensors(path, on_header=digest.update)
        else:
            self.num_bytes = sum(each.num_elements * each.dtype.itemsize for each in tensors.values())
        super().__init__(dict(tensors))
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
            for stored, _ in found.places():
                if stored.dtype not in DTYPES.values():
                    raise quantised_error(f"model.path: {stored.path}: {name}", DTYPE_NAMES[stored.dtype])
        missing = sorted(set(shapes) - set(self.tensors))
        extra = sorted(set(self.tensors) - set(shapes) - aliases)
        if missing or extra:
            raise UserError(
                f"model.path: {self.directory}: its tensors are not the model's parameters"
                + (f"; missing from the files: {listed(missing)}" if missing else "")
                + (f"; unknown to the model: {listed(extra)}" if extra else "")
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
