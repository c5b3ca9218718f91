"""Reading a model directory: safetensors headers, and any range of any parameter's elements.

Only safetensors is read. A rank reads the bytes of its own elements and no others.
"""

import hashlib
import json
import math
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch

from shardes.errors import UserError
from shardes.models.files import weight_files
from shardes.noise.region import Region

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Dtypes that buffers may have, but no parameter.
_OTHER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in (DTYPES | _OTHER_DTYPES).items()}
_MAX_HEADER_BYTES = 100_000_000
_READ_BYTES = 1 << 28
_COMPARED_ELEMENTS = 1 << 24


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
                    raise _quantised(f"model.path: {stored.path}: {name}", DTYPE_NAMES[stored.dtype])
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
    header, entries = _read_header(path)
    on_header(header)
    base, size = 8 + len(header), path.stat().st_size
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        where = f"model.path: {path}: {name}"
        if not _is_entry(entry):
            raise UserError(f"{where}: its entry in the header is damaged; fetch the file again")
        dtype = DTYPES.get(entry["dtype"]) or _OTHER_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise _quantised(where, entry["dtype"])
        begin, end = entry["data_offsets"]
        stored = StoredTensor(path, base + begin, dtype, tuple(entry["shape"]))
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
    end = base
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_elements)):
        if stored.offset != end:
            raise UserError(
                f"model.path: {path}: {name} begins at byte {stored.offset}, but what is before it ends at "
                f"{end}; fetch the file again"
            )
        end += stored.num_elements * stored.dtype.itemsize
    if end != size:
        raise UserError(f"model.path: {path} has {size - end} bytes that belong to no tensor; fetch it again")
    return tensors


def read_whole(stored: StoredTensor) -> torch.Tensor:
    """Read a whole tensor in the dtype and shape that it has in its file."""
    num_bytes = stored.num_elements * stored.dtype.itemsize
    if num_bytes == 0:
        return torch.empty(stored.shape, dtype=stored.dtype)
    descriptor = os.open(stored.path, os.O_RDONLY)
    try:
        data = _read_exactly(descriptor, num_bytes, stored.offset)
    finally:
        os.close(descriptor)
    return torch.frombuffer(data, dtype=stored.dtype).view(stored.shape)


def same_values(one: Found, other: Found, *, dtype: torch.dtype) -> bool:
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


def _quantised(where: str, dtype: str) -> UserError:
    return UserError(
        f"{where} is stored as {dtype}; wanted one of {sorted(DTYPES)}. Quantised weights cannot be "
        "perturbed: use the model's unquantised version"
    )


def _is_entry(entry: Any) -> bool:
    """Return whether an entry of a header has a dtype, a shape and two offsets."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    numbers = [entry.get("shape"), entry.get("data_offsets")]
    if not all(isinstance(n, list) and all(type(i) is int and i >= 0 for i in n) for n in numbers):
        return False
    return len(entry["data_offsets"]) == 2


def _read_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the header of a file as it is, and its entries by name."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"model.path: {path} is not a safetensors file, or is cut short; fetch it again")
        header = file.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise UserError(
            f"model.path: {path}: its header is not a JSON object with different names; fetch the file again"
        )
    return header, entries


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
