"""Headers of safetensors files, checked as the safetensors library checks them."""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shardes.errors import UserError
from shardes.utils.reading import parse_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Those that buffers may have, and parameters may not, as well.
ANY_DTYPES = DTYPES | {
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
DTYPE_NAMES = {dtype: name for name, dtype in ANY_DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


class Entry(NamedTuple):
    """Place of one tensor in a file.

    Attributes:
        offset: First byte in the file.
        dtype: Dtype in the file.
        shape: Shape of the tensor.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[bytes, dict[str, Entry]]:
    """Return the header of a safetensors file, and the places of its tensors by name.

    Raises:
        UserError: The file is damaged or cut short, or holds a dtype that torch does not have.
        OSError: It cannot be read.
    """
    header, parsed = _parsed_header(path)
    base, size = 8 + len(header), path.stat().st_size
    entries: dict[str, Entry] = {}
    for name, entry in parsed.items():
        if name == "__metadata__":
            continue
        where = f"model.path: {path}: {name}"
        if not _is_entry(entry):
            raise UserError(f"{where}: its entry in the header is damaged; fetch the file again")
        dtype = ANY_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise quantised_error(where, entry["dtype"])
        begin, end = entry["data_offsets"]
        stored = Entry(base + begin, dtype, tuple(entry["shape"]))
        wanted = stored.num_bytes
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
        entries[name] = stored
    end = base
    for name, stored in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if stored.offset != end:
            raise UserError(
                f"model.path: {path}: {name} begins at byte {stored.offset}, but what is before it ends at "
                f"{end}; fetch the file again"
            )
        end += stored.num_bytes
    if end != size:
        raise UserError(f"model.path: {path} has {size - end} bytes that belong to no tensor; fetch it again")
    return header, entries


def quantised_error(where: str, dtype: str) -> UserError:
    """Return the error for a parameter of a dtype that is no float."""
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


def _parsed_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the header of a file as it is, and its entries by name, not checked yet."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"model.path: {path} is not a safetensors file, or is cut short; fetch it again")
        header = file.read(length)
    try:
        entries = parse_json(header, refuse_repeats=True)
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise UserError(
            f"model.path: {path}: its header is not a JSON object with different names; fetch the file again"
        )
    return header, entries
