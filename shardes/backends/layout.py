"""Layouts: the elements of a parameter that a rank owns, computed from the splits of the parameter.

Pure arithmetic over shapes: no backend, no process group and no tensors, so that it can be checked for a
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
    """A split of one dimension of a tensor over one axis of a mesh.

    Attributes:
        dim: Index of the dimension, not negative.
        num_pieces: Number of pieces into which the dimension is cut first. Each is then split, and a rank
            owns its part of every piece, as for a matrix that holds several stacked ones.
    """

    dim: int
    num_pieces: int = 1


@dataclass(frozen=True)
class Layout:
    """The distribution of a parameter over a mesh of ranks.

    Attributes:
        shape: Shape of the whole parameter.
        mesh: Number of ranks along each axis of the mesh.
        splits: Split of each axis, in the order of ``mesh``; None if its ranks hold the same elements.

    Raises:
        ValueError: A split does not fit the shape, or there is not one split an axis.
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
        """Return whether every rank holds the whole parameter."""
        return all(split is None or size == 1 for split, size in zip(self.splits, self.mesh, strict=True))

    @property
    def is_flat(self) -> bool:
        """Return whether the parts over a one-dimensional mesh lie back to back in the parameter."""
        return self.splits == (Split(0),)

    def spans(self, coordinate: Sequence[int]) -> tuple[ShardSpan, ...]:
        """Return the elements of the rank at ``coordinate`` of the mesh, in the order of its tensor."""
        shape = self.shape or (1,)
        owned: list[_Intervals] = [[(0, size)] for size in shape]
        for split, size, index in zip(self.splits, self.mesh, coordinate, strict=True):
            if split is not None:
                owned[split.dim] = _part(owned[split.dim], split.num_pieces, size, index)
        return _spans(shape, owned)


def flat_layout(num_elements: int, *, world_size: int) -> Layout:
    """Return the layout of ZeRO-3: the elements, taken as one row, are cut into equal parts."""
    return Layout((num_elements,), (world_size,), (Split(0),))


def _part(intervals: _Intervals, num_pieces: int, num_parts: int, index: int) -> _Intervals:
    """Return part ``index`` of ``num_parts`` of each of the pieces of some indices."""
    total = sum(number for _, number in intervals)
    part: _Intervals = []
    for piece in range(num_pieces):
        first, number = chunk(total, num_pieces, piece)
        low, length = chunk(number, num_parts, index)
        part += _slice(intervals, first + low, length)
    return part


def chunk(total: int, num_chunks: int, index: int) -> tuple[int, int]:
    """Return the start and the length of chunk ``index`` when ``total`` indices are chunked."""
    size = -(-total // num_chunks)
    low = min(total, size * index)
    return low, min(total, low + size) - low


def _slice(intervals: _Intervals, low: int, length: int) -> _Intervals:
    """Return ``length`` of the indices, from the one at position ``low`` on."""
    found: _Intervals = []
    for first, number in intervals:
        begin, end = max(0, low), min(number, low + length)
        if begin < end:
            found.append((first + begin, end - begin))
        low -= number
    return found


def _spans(shape: tuple[int, ...], owned: list[_Intervals]) -> tuple[ShardSpan, ...]:
    """Multiply the indices of all dimensions out in row-major order."""
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
    return compress(starts, np.resize(lengths, starts.shape))


def compress(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> tuple[ShardSpan, ...]:
    """Join rows that touch, and make one span of equal rows that are a fixed stride apart.

    Args:
        starts: Row-major index of each row's first element in the whole parameter, int64.
        lengths: Elements of each row, int64.

    Returns:
        Spans of a shard in which the rows lie back to back, in this order.
    """
    ends = starts + lengths
    heads = np.flatnonzero(np.concatenate([[True], starts[1:] != ends[:-1]]))
    lasts = np.append(heads[1:], len(starts)) - 1
    starts, lengths = starts[heads], ends[lasts] - starts[heads]
    steps = np.diff(starts)
    is_like_before = lengths[1:] == lengths[:-1]
    # Rows at which a span of two rows or more cannot go on: another length, or another step.
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
