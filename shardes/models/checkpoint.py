"""Reading a model directory: safetensors headers, and any range of any parameter's elements.

Only safetensors is read. A rank reads the bytes of its own elements, and of others only what is between short
rows of its own, as a shard of a matrix's columns has them.
"""

import hashlib
import json
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch

from shardes.config.schema import FETCH_HINT
from shardes.errors import UserError
from shardes.models.stored_rows import Block, DifferentStridesError, Rows, shared
from shardes.noise.region import Region
from shardes.utils.files import read_exactly

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 100_000_000
_READ_BYTES = 1 << 28
# Rows are read with what is between them, in blocks of so many bytes at most, which processors have room for,
# if what is between two of them is no more than the second number: that takes less time than another call.
_BLOCK_BYTES = 1 << 22
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
        return torch.Size(self.shape).numel()

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
        most_rows = 1 if has_gaps else max(1, _BLOCK_BYTES // (stride * width))
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
        directory: A directory with ``*.safetensors`` files.

    Attributes:
        tensors: Stored tensors by name; after ``join``, parameters by name.
        header_sha256: Hash of all headers: names, shapes, dtypes and offsets.

    Raises:
        UserError: No safetensors files, or a damaged one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tensors: dict[str, StoredTensor] = {}
        digest = hashlib.sha256()
        for path in _weight_files(directory):
            tensors |= stored_tensors(path, on_header=digest.update)
        super().__init__(tensors)
        self._pieces: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        self.header_sha256 = digest.hexdigest()

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
        UserError: The file is damaged or cut short, or holds a dtype that is no float.
        OSError: It cannot be read.
    """
    header = _read_header(path)
    on_header(header)
    base, size = 8 + len(header), path.stat().st_size
    tensors: dict[str, StoredTensor] = {}
    for name, entry in json.loads(header).items():
        if name == "__metadata__":
            continue
        where = f"model.path: {path}: {name}"
        if not _is_entry(entry):
            raise UserError(f"{where}: its entry in the header is damaged; fetch the file again")
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{where} is stored as {entry['dtype']}; wanted one of {sorted(DTYPES)}. Quantised "
                "weights cannot be perturbed: use the model's unquantised version"
            )
        begin, end = entry["data_offsets"]
        stored = StoredTensor(path, base + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        wanted = stored.num_elements * stored.dtype.itemsize
        if end - begin != wanted:
            raise UserError(
                f"{where} has {end - begin} bytes, but its shape {stored.shape} and dtype "
                f"{entry['dtype']} take {wanted}; fetch the file again"
            )
        if base + end > size:
            raise UserError(
                f"{where} should end at byte {base + end}, but the file is cut short at {size}; fetch or "
                "copy it again"
            )
        tensors[name] = stored
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise UserError(f"model.path: {directory} is not a directory; {FETCH_HINT}")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({directory / name for name in _indexed_files(index)})
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(
            f"model.path: {directory}: {index.name} names files that are missing: {_listed(missing)}"
        )
    if not files:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        hint = (
            f"; {pickled[0]} is a pickle, which is never loaded: convert it to safetensors" if pickled else ""
        )
        raise UserError(f"model.path: {directory} has no *.safetensors files, so no weights{hint}")
    return files


def _indexed_files(index: Path) -> list[str]:
    """Return the file names in an index.

    Raises:
        UserError: The file is not an index.
    """
    try:
        names = list(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"model.path: {index} is damaged: it has no weight_map of file names; fetch it again")
    return names


def _is_entry(entry: Any) -> bool:
    """Return whether an entry of a header has a dtype, a shape and two offsets."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    numbers = [entry.get("shape"), entry.get("data_offsets")]
    if not all(isinstance(n, list) and all(type(i) is int and i >= 0 for i in n) for n in numbers):
        return False
    return len(entry["data_offsets"]) == 2


def _read_header(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"model.path: {path} is not a safetensors file, or is cut short; fetch it again")
        header = file.read(length)
    try:
        is_object = isinstance(json.loads(header), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise UserError(f"model.path: {path}: its header is not a JSON object; fetch the file again")
    return header


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
