"""Which elements of a parameter a rank owns, computed from how the parameter is split.

Pure arithmetic over shapes: no engine, no process group and no tensors, so that it can be checked for a
thousand ranks on one. The rule for a dimension that a number of ranks does not divide is ``torch.chunk``'s,
which FSDP2 and DTensor follow too: all parts have ceil(n / ranks) indices, but for a shorter last one and
empty ones behind it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardes.backends.shard import ShardSpan

# Indices of one dimension as (first, number), ascending.
_Intervals = list[tuple[int, int]]


@dataclass(frozen=True)
class Split:
    """One axis of a mesh splits one dimension of a tensor.

    Attributes:
        dim: The dimension, not negative.
        num_pieces: The dimension is first cut into so many pieces, each of which is then split, and a rank
            owns its part of every piece: how a matrix is split that holds several stacked ones.
    """

    dim: int
    num_pieces: int = 1


@dataclass(frozen=True)
class Layout:
    """How a parameter is spread over a mesh of ranks.

    Attributes:
        shape: The whole parameter's.
        mesh: Number of ranks along each axis of the mesh.
        splits: What each axis does, the first axis first; None: its ranks hold the same elements.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    splits: tuple[Split | None, ...]

    def __post_init__(self) -> None:
        if len(self.mesh) != len(self.splits):
            raise ValueError(
                f"{len(self.splits)} splits over a mesh of {len(self.mesh)} axes; wanted as many"
            )
        for split in self.splits:
            if split is not None and not 0 <= split.dim < max(1, len(self.shape)):
                raise ValueError(f"{split} does not fit the shape {self.shape}")

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole parameter."""
        return all(split is None or size == 1 for split, size in zip(self.splits, self.mesh, strict=True))

    @property
    def is_flat(self) -> bool:
        """Whether the parts of a one-dimensional mesh lie back to back in the whole parameter."""
        return self.splits == (Split(0),)

    def spans(self, coordinate: Sequence[int]) -> tuple[ShardSpan, ...]:
        """The elements of the rank at ``coordinate``, in the order in which its tensor holds them."""
        shape = self.shape or (1,)
        owned: list[_Intervals] = [[(0, size)] for size in shape]
        for split, size, index in zip(self.splits, self.mesh, coordinate, strict=True):
            if split is not None:
                owned[split.dim] = _part(owned[split.dim], split.num_pieces, size, index)
        return _spans(shape, owned)


def flat_layout(num_elements: int, *, world_size: int) -> Layout:
    """A parameter's elements, taken as one row, cut into equal parts: ZeRO-3's way."""
    return Layout((num_elements,), (world_size,), (Split(0),))


def _part(intervals: _Intervals, num_pieces: int, num_parts: int, index: int) -> _Intervals:
    """Part ``index`` of each of the pieces of some indices."""
    total = sum(number for _, number in intervals)
    part: _Intervals = []
    for piece in range(num_pieces):
        first, number = chunk(total, num_pieces, piece)
        low, length = chunk(number, num_parts, index)
        part += _slice(intervals, first + low, length)
    return part


def chunk(total: int, num_chunks: int, index: int) -> tuple[int, int]:
    """Where chunk ``index`` starts and how long it is."""
    size = -(-total // num_chunks)
    low = min(total, size * index)
    return low, min(total, low + size) - low


def _slice(intervals: _Intervals, low: int, length: int) -> _Intervals:
    """``length`` of the indices, from the one at position ``low`` on."""
    found: _Intervals = []
    for first, number in intervals:
        begin, end = max(0, low), min(number, low + length)
        if begin < end:
            found.append((first + begin, end - begin))
        low -= number
    return found


def _spans(shape: tuple[int, ...], owned: list[_Intervals]) -> tuple[ShardSpan, ...]:
    """The indices of every dimension, multiplied out in row-major order."""
    if math.prod(shape) == 0 or not all(owned):
        return ()
    partial = [dim for dim, indices in enumerate(owned) if indices != [(0, shape[dim])]]
    last = max(partial, default=0)
    inner = math.prod(shape[last + 1 :])
    starts = np.array([first * inner for first, _ in owned[last]], dtype=np.int64)
    lengths = np.array([number * inner for _, number in owned[last]], dtype=np.int64)
    stride = inner * shape[last]
    for dim in reversed(range(last)):
        indices = np.concatenate([np.arange(first, first + number) for first, number in owned[dim]])
        starts = (indices[:, None] * stride + starts).ravel()
        stride *= shape[dim]
    return _compress(starts, np.resize(lengths, starts.shape))


def _compress(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> tuple[ShardSpan, ...]:
    """Joins rows that touch, and makes one run of equal rows that are a fixed stride apart."""
    ends = starts + lengths
    heads = np.flatnonzero(np.concatenate([[True], starts[1:] != ends[:-1]]))
    lasts = np.append(heads[1:], len(starts)) - 1
    starts, lengths = starts[heads], ends[lasts] - starts[heads]
    steps = np.diff(starts)
    is_like_before = lengths[1:] == lengths[:-1]
    # Rows at which a run of two rows or more cannot go on: another length, or another step.
    is_other_step = np.concatenate([[True], steps[1:] != steps[:-1]])[: len(steps)]
    breaks = np.flatnonzero(is_other_step | ~is_like_before) + 1
    spans: list[ShardSpan] = []
    row = local = 0
    while row < len(starts):
        end = row + 1
        if end < len(starts) and is_like_before[row]:
            following = int(np.searchsorted(breaks, end + 1))
            end = int(breaks[following]) if following < len(breaks) else len(starts)
        rows, length = end - row, int(lengths[row])
        stride = int(starts[row + 1] - starts[row]) if rows > 1 else 0
        spans.append(ShardSpan(local, int(starts[row]), length, rows=rows, stride=stride))
        local += rows * length
        row = end
    return tuple(spans)
