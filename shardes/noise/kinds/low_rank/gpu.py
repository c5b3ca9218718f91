"""GPU kernels of the low-rank noise, in Triton: outer products in the definition's order.

A program handles a rectangle of a tile: a thread reads few factors for many elements. The factors come from
the kernels of standard normal noise.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardes.noise import gpu
from shardes.noise.definition import BLOCK, LANES, MAX_ELEMENTS, Ints, Stream
from shardes.noise.gpu_math import as_float, perturbed, philox, round_randomly, tl, triton, widen
from shardes.noise.kinds.gaussian.gpu import FILL as NORMALS
from shardes.noise.kinds.low_rank.tables import Factors, Tile
from shardes.noise.region import Region

_LANES, _BLOCK = tl.constexpr(LANES), tl.constexpr(BLOCK)
_ROUNDING = tl.constexpr(int(Stream.ROUNDING))

# Rows and columns of a program, and its warps.
_ROWS, _COLUMNS, _WARPS = 16, 128, 4


@triton.jit
def _products(left, right, row, column, rows, columns, terms, height: tl.constexpr, width: tl.constexpr):
    """Compute the sum of the terms' products at some rows and columns: float32 of shape [height, width]."""
    total = tl.full([height, width], 0.0, tl.float32)
    for term in range(terms):
        above = tl.load(left + term * rows + row, mask=row < rows)
        beside = tl.load(right + term * columns + column, mask=column < columns)
        total += above[:, None] * beside[None, :]
    return total


@gpu.kernel
def _perturb(
    source,
    target,
    left,
    right,
    offset: tl.int64,
    pitch: tl.int64,
    rows: tl.int32,
    columns: tl.int32,
    terms: tl.int32,
    sigma_bits: tl.uint32,
    height: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0) * height + tl.arange(0, height)
    column = tl.program_id(1) * width + tl.arange(0, width)
    eps = _products(left, right, row, column, rows, columns, terms, height, width)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    place = offset + row.to(tl.int64)[:, None] * pitch + column[None, :]
    values = tl.load(source + place, mask=mask)
    moved = perturbed(values, as_float(sigma_bits.to(tl.uint32)) * eps, target.dtype.element_ty)
    tl.store(target + place, moved, mask=mask)


@gpu.kernel
def _accumulate(
    master,
    left,
    right,
    offset: tl.int64,
    pitch: tl.int64,
    rows: tl.int32,
    columns: tl.int32,
    terms: tl.int32,
    index: tl.int64,
    index_pitch: tl.int64,
    c1: tl.uint32,
    c3: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    height: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0) * height + tl.arange(0, height)
    column = tl.program_id(1) * width + tl.arange(0, width)
    total = _products(left, right, row, column, rows, columns, terms, height, width)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    place = offset + row.to(tl.int64)[:, None] * pitch + column[None, :]
    dtype = master.dtype.element_ty
    moved = widen(tl.load(master + place, mask=mask)) + total
    if dtype == tl.float32:
        tl.store(master + place, moved, mask=mask)
    else:
        # Rounding goes by the blocks of the normals.
        c1, c3, k0, k1 = c1.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
        element = index + row.to(tl.int64)[:, None] * index_pitch + column[None, :]
        lane, quarter = element % _LANES, element % _BLOCK // _LANES
        call = (element // _BLOCK * _LANES + lane).to(tl.uint32)
        c2 = tl.full([1, 1], _ROUNDING, tl.uint32)
        word0, word1, word2, word3 = philox(call, c1, c2, c3, k0, k1)
        word = tl.where(quarter < 2, tl.where(quarter == 0, word0, word1), word2)
        word = tl.where(quarter == 3, word3, word)
        tl.store(master + place, round_randomly(moved, word >> 16, dtype), mask=mask)


def table(first: int, count: int, *, factors: Factors, words2: Ints, scale: float) -> Tensor:
    """Compute rows of a factor in some directions, each element times ``scale``.

    Returns:
        float32 of shape [directions, rank, count].
    """
    # Adding to -0 keeps every bit, even the sign of a zero.
    rank, device = factors.rank, factors.device
    nothing = torch.full((count * rank,), -0.0, device=device)
    out = torch.empty(len(words2), count * rank, device=device)
    region = Region(factors.param_id, MAX_ELEMENTS, first * rank, count * rank)
    for row, word in zip(out, words2, strict=True):
        gpu.perturb(nothing, row, region, sigma=scale, fill=NORMALS, word2=word, key=factors.key)
    return out.view(-1, count, rank).transpose(1, 2).contiguous()


def perturb(source: Tensor, target: Tensor, tile: Tile, left: Tensor, right: Tensor, *, sigma: float) -> None:
    """Perturb a tile; the factors are of shape [rank, rows] and [rank, columns]."""
    sigma_bits = int(np.float32(sigma).view(np.uint32))
    _launch(_perturb, (source, target, left, right), tile, (sigma_bits,))


def accumulate(master: Tensor, tile: Tile, left: Tensor, right: Tensor, *, factors: Factors) -> None:
    """Add a weighted sum of eps to a tile; the factors are of shape [terms, rows] and [terms, columns]."""
    words = gpu.update_words(factors.param_id, factors.key)
    _launch(_accumulate, (master, left, right), tile, (*factors.place(tile), *words))


def _launch(function: Any, tensors: tuple[Tensor, ...], tile: Tile, numbers: tuple[int, ...]) -> None:
    """Run a kernel over a tile; the last of the tensors is the right factor."""
    with gpu.on_device(tensors[0].device):
        function[(-(-tile.rows // _ROWS), -(-tile.columns // _COLUMNS))](
            *tensors,
            tile.offset,
            tile.pitch,
            tile.rows,
            tile.columns,
            len(tensors[-1]),
            *numbers,
            height=_ROWS,
            width=_COLUMNS,
            num_warps=_WARPS,
            num_stages=1,
            enable_fp_fusion=False,
        )
