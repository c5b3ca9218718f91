"""Where the rows of a region are in files: few blocks of equal rows instead of one place for each row."""

from collections.abc import Iterator
from dataclasses import dataclass

Rows = tuple[int, int, int, int]
"""Elements of a parameter: the first one, the length of a row, the number of rows, and their stride."""


@dataclass(frozen=True)
class Block:
    """Rows of equal length at equal distances, both where they are stored and where they go to.

    Attributes:
        source: Index of the first element in the stored tensor.
        source_stride: Elements from the start of a row to that of the next one, there.
        target: Index of the first element in what the region is read into.
        target_stride: Elements from the start of a row to that of the next one, there.
        length: Number of elements of a row.
        rows: Number of rows.
    """

    source: int
    source_stride: int
    target: int
    target_stride: int
    length: int
    rows: int

    @property
    def num_elements(self) -> int:
        """Number of elements of all rows."""
        return self.length * self.rows


class DifferentStridesError(Exception):
    """Two sets of rows have different strides, so that what they share is not made of few blocks."""


def shared(wanted: Rows, stored: Rows, *, place: int) -> Iterator[Block]:
    """Yield the blocks of a region that are among stored elements.

    Args:
        wanted: Elements of the region, which are read into a flat tensor row by row.
        stored: Elements that follow each other in a stored tensor, row by row.
        place: Index of the first of them in the stored tensor.

    Raises:
        DifferentStridesError: Both have several rows, at different strides, or the stored ones overlap.
    """
    if stored[2] > 1 and stored[3] < stored[1]:
        raise DifferentStridesError  # rows that overlap are in no file of ours
    if wanted[2] > 1 and stored[2] > 1:
        yield from _rows_in_rows(wanted, stored, place)
    elif stored[2] > 1:
        first, length, _, _ = wanted
        for low, rows, start, number in _rows_within(stored, first, length):
            at = stored[0] + low * stored[3] + start
            yield Block(place + low * stored[1] + start, stored[1], at - first, stored[3], number, rows)
    else:
        first, length, _, _ = stored
        for low, rows, start, number in _rows_within(wanted, first, length):
            at = wanted[0] + low * wanted[3] + start
            yield Block(place + at - first, wanted[3], low * wanted[1] + start, wanted[1], number, rows)


def _rows_within(rows: Rows, first: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield what a range of elements has of some rows: first row, number of rows, first column and length.

    The rows at its two ends may be cut.
    """
    start, size, count, stride = rows
    end, row = first + length, 0
    if count > 1:
        row = max(0, (first - start - size) // stride + 1)
    while row < count:
        low = start + row * stride
        cut, stop = max(first, low), min(end, low + size)
        if cut >= end:
            return
        number = 1
        if (cut, stop) == (low, low + size) and count > 1:
            number = min(count - row, (end - low - size) // stride + 1)
        if cut < stop:
            yield row, number, cut - low, stop - cut
        row += number


def _rows_in_rows(wanted: Rows, stored: Rows, place: int) -> Iterator[Block]:
    start, size, count, stride = wanted
    first, length, rows, distance = stored
    if stride != distance:
        raise DifferentStridesError
    # Stored row k begins ``column`` elements after wanted row k + shift, and may reach into the next one.
    shift, column = divmod(first - start, stride)
    for ahead, offset in ((shift, column), (shift + 1, column - stride)):
        low, high = max(0, offset), min(size, offset + length)
        begin, end = max(0, ahead), min(count, rows + ahead)
        if low < high and begin < end:
            source = place + (begin - ahead) * length + low - offset
            yield Block(source, length, begin * size + low, size, high - low, end - begin)
