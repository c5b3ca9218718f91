"""Snapshots: the masters after some iterations, so that not all of a long journal has to be replayed.

The optimizer's states of each weight are kept with them, under the parameter's name and their own.

A snapshot is a directory: one safetensors file of each rank's own elements, and ``manifest.json``, which
says which elements of which parameter each file holds. Any number of ranks, any backend reads it by ranges.
Nothing depends on a snapshot: one that is damaged is passed over, and more of the journal is replayed.

It exists once it is whole. Files are written to a directory of another name and brought to the disk, then
rank 0 alone writes the manifest, which is the mark of a complete snapshot, and renames the directory.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import torch

from shardes.backends.shard import Shard
from shardes.errors import UserError
from shardes.models.checkpoint import StoredTensor, TensorReader, stored_tensors
from shardes.models.safetensors_writer import write_header, write_values
from shardes.models.stored_rows import Rows
from shardes.utils.files import flush_to_disk, write_atomically
from shardes.utils.reading import open_regular, parse_json, read_regular
from shardes.weights.master import CHUNK_ELEMENTS

SNAPSHOT_VERSION = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"iteration-(\d{8,})")
_READ_BYTES = 1 << 24
# Room that a snapshot leaves to the journal, which is written at the same time.
_JOURNAL_BYTES = 1 << 16
_MANIFEST_BYTES = 1 << 28


class SnapshotError(Exception):
    """A snapshot that cannot be used; the message says why."""


def snapshot_path(run_dir: Path, iteration: int) -> Path:
    """Return the directory of a run's snapshot after ``iteration`` updates."""
    return run_dir / "snapshots" / f"iteration-{iteration:08d}"


def find_snapshots(run_dir: Path) -> list[int]:
    """Return the iterations of which a run has snapshots, good or damaged, the newest first."""
    directory = run_dir / "snapshots"
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), reverse=True)


def write_part(
    path: Path,
    tensors: Iterable[tuple[str, Shard, torch.Tensor]],
    *,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Write one rank's elements, and flush them to the disk.

    A tensor on an accelerator passes through host memory a piece of 64 MiB at a time; there is no other copy.

    Args:
        path: The file.
        tensors: As ``Weights.owned_tensors`` gives them.
        is_cancelled: Called for every piece; if it returns true, the writing ends.

    Returns:
        The file's entry in the manifest.

    Raises:
        OSError: The file cannot be written.
        SnapshotError: It was cancelled.
    """
    tensors = list(tensors)
    _check_room(path.parent, sum(shard.num_owned * tensor.element_size() for _, shard, tensor in tensors))
    with path.open("wb") as stream:
        sink = _Hashing(stream)
        write_header(sink, [(name, tensor.dtype, [shard.num_owned]) for name, shard, tensor in tensors])
        for _, shard, tensor in tensors:
            for span in shard.spans:
                for part in span.parts(CHUNK_ELEMENTS):
                    if is_cancelled():
                        raise SnapshotError("it was given up")
                    write_values(sink, part.of(tensor))
        flush_to_disk(stream)
    return {
        "name": path.name,
        "num_bytes": sink.num_bytes,
        "blake2b": sink.hash.hexdigest(),
        "regions": {
            name: [[span.global_start, span.length, span.rows, span.stride] for span in shard.spans]
            for name, shard, _ in tensors
        },
    }


def _check_room(directory: Path, num_bytes: int) -> None:
    """Refuse a file for which there is no room, before it takes that of the journal, which goes on meanwhile.

    Raises:
        OSError: There is none.
    """
    if shutil.disk_usage(directory).free < num_bytes + _JOURNAL_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_manifest(
    directory: Path, *, iteration: int, digest: str, states_digest: str, files: list[dict[str, Any]]
) -> None:
    """Mark a snapshot whose files are on the disk as complete.

    Args:
        directory: The directory of the files.
        iteration: Number of updates that the weights have had.
        digest: The digest of the weights.
        states_digest: The digest of the optimizer's states.
        files: The entries that ``write_part`` returned.

    Raises:
        OSError: It cannot be written.
    """
    manifest = {
        "version": SNAPSHOT_VERSION,
        "iteration": iteration,
        "weights_digest": digest,
        "states_digest": states_digest,
        "files": files,
    }
    sealed = manifest | {"checksum": _checksum(manifest)}
    write_atomically(directory / MANIFEST, json.dumps(sealed, indent=1) + "\n")


class Snapshot(TensorReader):
    """A complete snapshot, from which ranges of the masters' elements can be read.

    Args:
        directory: The snapshot.

    Attributes:
        iteration: Number of updates that the weights have had.
        weights_digest: Their digest, as the manifest has it. Readers compare the files' own, which they
            compute anyway: sizes and headers are checked here, not every byte.
        states_digest: Likewise of the optimizer's states.

    Raises:
        SnapshotError: It is not complete, or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            manifest = parse_json(read_regular(directory / MANIFEST, max_bytes=_MANIFEST_BYTES))
            if manifest.pop("checksum") != _checksum(manifest):
                raise SnapshotError(f"the checksum of its {MANIFEST} does not match")
            if manifest["version"] != SNAPSHOT_VERSION:
                raise SnapshotError(f"its version is {manifest['version']}; wanted {SNAPSHOT_VERSION}")
            self.iteration: int = manifest["iteration"]
            self.weights_digest: str = manifest["weights_digest"]
            self.states_digest: str = manifest["states_digest"]
            self._files: list[dict[str, Any]] = manifest["files"]
            texts = (self.weights_digest, self.states_digest)
            if type(self.iteration) is not int or not all(isinstance(text, str) for text in texts):
                raise SnapshotError(f"its {MANIFEST} does not say which weights it holds")
            rows: dict[str, list[StoredRegions]] = {}
            for entry in self._files:
                for name, found in self._open(entry).items():
                    rows.setdefault(name, []).append(found)
        except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(f"{type(error).__name__}: {error}") from None
        super().__init__({name: SpreadTensor(tuple(parts)) for name, parts in rows.items()})

    def _open(self, entry: dict[str, Any]) -> dict[str, "StoredRegions"]:
        """Return the elements that one file holds, by parameter."""
        path = self._directory / entry["name"]
        if path.parent != self._directory:
            raise SnapshotError(f"its {MANIFEST} names a file outside of it")
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size != entry["num_bytes"]:
            raise SnapshotError(f"{path.name} has {size} bytes; wanted {entry['num_bytes']}")
        stored = stored_tensors(path)
        if stored.keys() != entry["regions"].keys():
            raise SnapshotError(f"{path.name} does not hold the parameters that {MANIFEST} says")
        rows = {
            name: StoredRegions(
                stored[name], tuple(cast(Rows, tuple(map(int, region))) for region in regions)
            )
            for name, regions in entry["regions"].items()
        }
        for name, found in rows.items():
            if not found.is_possible:
                raise SnapshotError(f"{path.name} does not hold the elements of {name} that {MANIFEST} says")
        return rows

    def damaged_files(self, *, part: int = 0, num_parts: int = 1) -> list[str]:
        """Return the names of files whose bytes have changed; reads all, or one of ``num_parts`` parts."""
        return [entry["name"] for entry in self._files[part::num_parts] if not self._is_whole(entry)]

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        found = _new_hash()
        try:
            with (self._directory / entry["name"]).open("rb") as stream:
                while data := stream.read(_READ_BYTES):
                    found.update(data)
        except OSError:
            return False
        return found.hexdigest() == entry["blake2b"]


@dataclass(frozen=True)
class StoredRegions:
    """Elements of one parameter that follow each other in a file.

    Attributes:
        stored: The tensor of the file that holds them.
        regions: Their places in the parameter: first element, length of a row, number of rows, and the stride
            between rows.
    """

    stored: StoredTensor
    regions: tuple[Rows, ...]

    @property
    def is_possible(self) -> bool:
        """Return whether the regions have the tensor's elements; tables of others could be endless."""
        return (
            all(len(region) == 4 and min(region) >= 0 and max(region) < 2**62 for region in self.regions)
            and all(length > 0 for _, length, rows, _ in self.regions if rows)
            and sum(length * rows for _, length, rows, _ in self.regions) == self.stored.num_elements
        )


@dataclass(frozen=True)
class SpreadTensor:
    """A parameter whose elements are spread over files.

    Attributes:
        parts: The elements that each file holds.
    """

    parts: tuple[StoredRegions, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter, flattened to one row."""
        return (sum(part.stored.num_elements for part in self.parts),)

    @cached_property
    def _table(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """All rows of all files, sorted: first elements, lengths, files, and places in these."""
        tables = [_table_of(part.regions) for part in self.parts]
        table = np.concatenate(tables, axis=1)
        files = np.repeat(np.arange(len(tables)), [each.shape[1] for each in tables])
        order = np.argsort(table[0], kind="stable")
        starts, lengths, places = table[:, order].tolist()
        return starts, lengths, files[order].tolist(), places

    def places(self) -> Iterator[tuple[StoredTensor, Sequence[Rows]]]:
        """Yield the tensors of files, each with the elements that it holds, one after the other."""
        for part in self.parts:
            yield part.stored, part.regions

    def find(self, first: int, length: int) -> Iterator[tuple[StoredTensor, int, int]]:
        """Yield the tensors of files that hold a range of elements, each with first element and length there.

        Raises:
            SnapshotError: No file holds one of them.
        """
        starts, lengths, files, local_starts = self._table
        row, end = bisect_right(starts, first) - 1, first + length
        while first < end:
            number = (
                starts[row] + lengths[row] - first if 0 <= row < len(starts) and starts[row] <= first else 0
            )
            if number <= 0:
                raise SnapshotError(f"no file holds element {first} of a parameter")
            number = min(number, end - first)
            yield self.parts[files[row]].stored, local_starts[row] + first - starts[row], number
            first += number
            row += 1


def _table_of(regions: Sequence[Rows]) -> npt.NDArray[np.int64]:
    """Return the rows of regions that follow each other in a file, int64: first elements, lengths, places."""
    tables, place = [np.empty((3, 0), dtype=np.int64)], 0
    for start, length, rows, stride in regions:
        index = np.arange(rows, dtype=np.int64)
        tables.append(np.stack([start + index * stride, np.full(rows, length), place + index * length]))
        place += rows * length
    return np.concatenate(tables, axis=1)


def _checksum(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, separators=(",", ":"), sort_keys=True)
    return _new_hash(text.encode()).hexdigest()


def _new_hash(data: bytes = b"") -> "hashlib.blake2b":
    return hashlib.blake2b(data, digest_size=16)


class _Hashing:
    """A stream that hashes the bytes which it writes to a file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.hash = _new_hash()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self.hash.update(data)
        self.num_bytes += memoryview(data).nbytes
