"""Low-rank noise on any region of a parameter, from tables of the factors that are filled once a call.

A region is cut into tiles, rectangles of one matrix each. A tile needs the rows of A for its own rows, the
rows of B for its own columns, and no others. Every element is computed by itself, so the cut changes no bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from shardes.noise.definition import Floats, Ints, NoiseKey, Stream
from shardes.noise.kinds.low_rank.matrices import matrix_shape
from shardes.noise.region import Region

# Numbers of a table of factors: 32 MiB of float32.
MAX_TABLE = 1 << 23


@dataclass(frozen=True)
class Tile:
    """A rectangle of one matrix, and its place in a flat tensor.

    Attributes:
        matrix: Index of the matrix in the parameter.
        first_row: First row of the rectangle, counted over the rows of all matrices.
        rows: Number of rows.
        first_column: First column of the rectangle.
        columns: Number of columns.
        offset: Index of its first element in the tensor.
        pitch: Elements of the tensor from the start of one row to the start of the next.
    """

    matrix: int
    first_row: int
    rows: int
    first_column: int
    columns: int
    offset: int
    pitch: int

    def cut(self, side: int) -> Iterator["Tile"]:
        """Yield the tile in pieces of at most ``side`` rows and columns."""
        for row in range(0, self.rows, side):
            for column in range(0, self.columns, side):
                yield replace(
                    self,
                    first_row=self.first_row + row,
                    rows=min(side, self.rows - row),
                    first_column=self.first_column + column,
                    columns=min(side, self.columns - column),
                    offset=self.offset + row * self.pitch + column,
                )


def tiles(region: Region) -> Iterator[Tile]:
    """Yield the rectangles of which a region of matrices consists.

    Raises:
        ValueError: The region's parameter is not a matrix.
    """
    view = None if region.shape is None else matrix_shape(region.shape)
    if view is None:
        raise ValueError(f"{region} is of no matrix")
    _, height, width = view
    start, length, rows, stride = region.start, region.length, region.rows, region.stride
    if rows == 1 or stride == length:
        yield from _of_stretch(start, rows * length, offset=0, height=height, width=width)
    elif stride == width and start % width + length <= width:
        first = Tile(0, start // width, rows, start % width, length, 0, length)
        yield from _by_matrix(first, height)
    else:
        for row in range(rows):
            yield from _of_stretch(
                start + row * stride, length, offset=row * length, height=height, width=width
            )


def _of_stretch(start: int, length: int, *, offset: int, height: int, width: int) -> Iterator[Tile]:
    """Yield the tiles of consecutive elements: the end of a row, whole rows, the beginning of one."""
    if start % width:
        head = min(width - start % width, length)
        yield Tile(start // (height * width), start // width, 1, start % width, head, offset, width)
        start, length, offset = start + head, length - head, offset + head
    if whole := length // width:
        yield from _by_matrix(Tile(0, start // width, whole, 0, width, offset, width), height)
        start, length, offset = start + whole * width, length - whole * width, offset + whole * width
    if length:
        yield Tile(start // (height * width), start // width, 1, 0, length, offset, width)


def _by_matrix(tile: Tile, height: int) -> Iterator[Tile]:
    """Yield a tile cut where one matrix ends and the next begins."""
    row, end = tile.first_row, tile.first_row + tile.rows
    while row < end:
        rows = min(height - row % height, end - row)
        offset = tile.offset + (row - tile.first_row) * tile.pitch
        yield replace(tile, matrix=row // height, first_row=row, rows=rows, offset=offset)
        row += rows


@dataclass(frozen=True)
class Factors:
    """Tables of the factors of a parameter's noise in some directions.

    Attributes:
        kernels: Module of the device's kernels.
        device: Device of the tables.
        rank: Columns of A and of B.
        scale: Factor of the elements of A.
        param_id: Index of the parameter in the name-sorted list.
        width: Columns of its matrices.
        key: Key of the noise.
        directions: Directions within the iteration.
    """

    kernels: ModuleType
    device: torch.device
    rank: int
    scale: float
    param_id: int
    width: int
    key: NoiseKey
    directions: Ints

    def left(self, tile: Tile) -> Tensor:
        """Return A / sqrt(rank) at a tile's rows: float32 of shape [directions, rank, rows]."""
        return self._table(Stream.LEFT, tile.first_row, tile.rows, scale=self.scale)

    def right(self, tile: Tile) -> Tensor:
        """Return B at a tile's columns: float32 of shape [directions, rank, columns]."""
        first = tile.matrix * self.width + tile.first_column
        return self._table(Stream.RIGHT, first, tile.columns, scale=1.0)

    def _table(self, stream: Stream, first: int, count: int, *, scale: float) -> Tensor:
        words2 = [direction << 8 | stream for direction in self.directions]
        table: Tensor = self.kernels.table(first, count, factors=self, words2=words2, scale=scale)
        return table

    def place(self, tile: Tile) -> tuple[int, int]:
        """Return the index in the parameter of a tile's first element, and the distance to the one below."""
        return tile.first_row * self.width + tile.first_column, self.width


def perturb(source: Tensor, target: Tensor, *, region: Region, sigma: float, factors: Factors) -> None:
    """Write ``round(centre + sigma * eps)`` of a region of matrices to ``target``."""
    side = max(MAX_TABLE // factors.rank, 1)
    for tile in (part for whole in tiles(region) for part in whole.cut(side)):
        left, right = factors.left(tile), factors.right(tile)
        factors.kernels.perturb(source, target, tile, left.flatten(0, 1), right.flatten(0, 1), sigma=sigma)


def accumulate(master: Tensor, *, region: Region, coefficients: Floats, factors: Factors) -> None:
    """Add a weighted sum of eps to a region of matrices."""
    side = max(MAX_TABLE // (factors.rank * max(len(coefficients), 1)), 1)
    scales = torch.tensor(coefficients, dtype=torch.float32, device=master.device).view(-1, 1, 1)
    for tile in (part for whole in tiles(region) for part in whole.cut(side)):
        left, right = factors.left(tile).mul_(scales), factors.right(tile)
        factors.kernels.accumulate(master, tile, left.flatten(0, 1), right.flatten(0, 1), factors=factors)
