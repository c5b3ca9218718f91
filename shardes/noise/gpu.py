"""GPU kernels of the noise, in Triton: the bits of definition.py, in one pass over the tensor.

A thread takes a Philox call, computes the call's noise and handles the call's elements. These lie LANES
apart, so sixteen neighbouring threads read and write sixteen neighbouring elements, and no data moves between
threads. A region's borders are masked.

What changes between members, iterations, parameters and seeds are plain numbers to the kernels. Triton
compiles them once for each kind of noise, formats of the tensors, and one row or several.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from shardes.noise.definition import BLOCK, LANES, SIGN_BLOCK, NoiseKind, Stream
from shardes.noise.gpu_math import (
    as_bits,
    as_float,
    four_normals,
    perturbed,
    philox,
    round_randomly,
    tl,
    triton,
    widen,
)
from shardes.noise.region import Region

_LANES, _BLOCK, _SIGN_BLOCK = tl.constexpr(LANES), tl.constexpr(BLOCK), tl.constexpr(SIGN_BLOCK)
_ROUNDING = tl.constexpr(int(Stream.ROUNDING))

# Calls of a program, and its warps. Normals: two calls a thread, which are two independent chains for the
# schedulers to choose from, in 40 registers, of which a multiprocessor has enough for 48 warps. Signs: one
# call a thread, because the sums of its 128 elements stay in registers during an update.
_CALLS, _SIGN_CALLS, _WARPS = 256, 128, 4

# Slots of one launch over several rows; with those that the last program has too many, below 2**32.
_MAX_SLOTS = 2**31


def kernel(function: Callable[..., None]) -> Any:
    """``triton.jit`` for a kernel that is not to be compiled again when an argument changes.

    By default Triton compiles anew for integers that are 1, and for integers and addresses that are multiples
    of 16. Integers also need a type in the kernel's signature, or those of more than 31 bits get another.
    """
    parameters = inspect.signature(function).parameters.values()
    plain = [parameter.name for parameter in parameters if parameter.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=plain)


@triton.jit
def place(
    start,
    stride,
    length,
    first_row,
    end_row,
    blocks_per_row,
    size: tl.constexpr,
    calls: tl.constexpr,
    strided: tl.constexpr,
):
    """Which calls a program makes, and where their elements lie.

    Each row touches up to ``blocks_per_row`` blocks of ``size`` elements. These slots are numbered row by
    row; a program makes the LANES calls of each of ``calls / LANES`` of them.

    Returns:
        The number of each call: its low 32 bits, for MAX_ELEMENTS leaves the others zero.
        Two numbers, 64-bit and 32-bit, whose sum is the index in the tensor of each call's first element.
        Two bounds: what lies ``offset`` after that element is in the region if low <= offset < high.
    """
    slots: tl.constexpr = calls // _LANES
    thread = tl.arange(0, calls)
    lane = thread % _LANES
    if strided:
        # 32 bits are enough for the slots of a launch, and a 64-bit division would cost more than Philox.
        slot = tl.program_id(0).to(tl.uint32) * slots + (thread // _LANES).to(tl.uint32)
        row_of_launch = slot // blocks_per_row.to(tl.uint32)
        block_of_row = slot - row_of_launch * blocks_per_row.to(tl.uint32)
        row = first_row + row_of_launch.to(tl.int64)
        row_start = start + row * stride
        block = row_start // size + block_of_row.to(tl.int64)
        begin = block * size - row_start
        call = (block * _LANES).to(tl.uint32) + lane.to(tl.uint32)
        base = row * length + begin
        inner = lane
        low = tl.maximum(-begin, 0).to(tl.int32)
        high = tl.where(row < end_row, tl.minimum(length - begin, size), 0).to(tl.int32)
    else:
        # What is 64-bit here is the same for the whole program, and computed once a warp.
        block = start // size + tl.program_id(0).to(tl.int64) * slots
        base = block * size - start
        call = (block * _LANES).to(tl.uint32) + thread.to(tl.uint32)
        inner = thread // _LANES * size + lane
        low = tl.maximum(-base, 0).to(tl.int32)
        high = tl.minimum(length - base, slots * size).to(tl.int32)
    return call, base, inner, low - inner, high - inner


@triton.jit
def within(offset, low, high):
    """Whether what lies ``offset`` after a call's first element is in the region."""
    return (low <= offset) & (offset < high)


@triton.jit
def _signed(scale_bits, word):
    """``scale * sign`` for the 32 signs in each word, in order: float32 of shape [32, calls]."""
    bit = tl.arange(0, 32)[:, None]
    return as_float(scale_bits ^ ((word[None, :] << (31 - bit)) & 0x80000000))


# Perturb.


@triton.jit
def _perturb_normals(source, target, sigma, call, c1, c2, c3, k0, k1, low, high, bordered: tl.constexpr):
    """Perturbs the four elements of each call; ``source`` and ``target`` point to the first of them."""
    dtype = target.dtype.element_ty
    mask0 = within(0, low, high) if bordered else None
    mask1 = within(_LANES, low, high) if bordered else None
    mask2 = within(2 * _LANES, low, high) if bordered else None
    mask3 = within(3 * _LANES, low, high) if bordered else None
    # All loads come first: the long computation hides their latency.
    source0 = tl.load(source, mask=mask0)
    source1 = tl.load(source + _LANES, mask=mask1)
    source2 = tl.load(source + 2 * _LANES, mask=mask2)
    source3 = tl.load(source + 3 * _LANES, mask=mask3)
    eps0, eps1, eps2, eps3 = four_normals(call, c1, c2, c3, k0, k1)
    tl.store(target, perturbed(source0, sigma * eps0, dtype), mask=mask0)
    tl.store(target + _LANES, perturbed(source1, sigma * eps1, dtype), mask=mask1)
    tl.store(target + 2 * _LANES, perturbed(source2, sigma * eps2, dtype), mask=mask2)
    tl.store(target + 3 * _LANES, perturbed(source3, sigma * eps3, dtype), mask=mask3)


@triton.jit
def _perturb_word(source, target, sigma_bits, random_word, low, high, which: tl.constexpr):
    """Perturbs the 32 elements that the ``which``-th word of each call has the signs of."""
    dtype = target.dtype.element_ty
    offset = (which * 32 + tl.arange(0, 32))[:, None] * _LANES
    mask = within(offset, low[None, :], high[None, :])
    values = tl.load(source[None, :] + offset, mask=mask)
    step = _signed(sigma_bits, random_word)
    tl.store(target[None, :] + offset, perturbed(values, step, dtype), mask=mask)


@kernel
def _perturb(
    source,
    target,
    start: tl.int64,
    stride: tl.int64,
    length: tl.int64,
    first_row: tl.int64,
    end_row: tl.int64,
    blocks_per_row: tl.int32,
    sigma_bits: tl.uint32,
    c1: tl.uint32,
    c2: tl.uint32,
    c3: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    size: tl.constexpr,
    calls: tl.constexpr,
    strided: tl.constexpr,
):
    # Under the interpreter an argument has whatever type its value fits.
    sigma_bits = sigma_bits.to(tl.uint32)
    c1, c2, c3 = c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    call, base, inner, low, high = place(
        start, stride, length, first_row, end_row, blocks_per_row, size, calls, strided
    )
    source = source + base + inner
    target = target + base + inner
    sigma = as_float(sigma_bits)
    if size == _SIGN_BLOCK:
        word0, word1, word2, word3 = philox(call, c1, c2, c3, k0, k1)
        _perturb_word(source, target, sigma_bits, word0, low, high, 0)
        _perturb_word(source, target, sigma_bits, word1, low, high, 1)
        _perturb_word(source, target, sigma_bits, word2, low, high, 2)
        _perturb_word(source, target, sigma_bits, word3, low, high, 3)
    elif strided:
        _perturb_normals(source, target, sigma, call, c1, c2, c3, k0, k1, low, high, True)
    elif (base >= 0) & (base + calls // _LANES * size <= length):
        # Few programs have a border; the masks would cost all of them a tenth of their instructions.
        _perturb_normals(source, target, sigma, call, c1, c2, c3, k0, k1, low, high, False)
    else:
        _perturb_normals(source, target, sigma, call, c1, c2, c3, k0, k1, low, high, True)


# Update.


@triton.jit
def _move(master, total, random_word, mask):
    """Adds ``total`` to the elements pointed to; a narrow format is rounded by the word's top 16 bits."""
    dtype = master.dtype.element_ty
    moved = widen(tl.load(master, mask=mask)) + total
    if dtype == tl.float32:
        tl.store(master, moved, mask=mask)
    else:
        tl.store(master, round_randomly(moved, random_word >> 16, dtype), mask=mask)


@triton.jit
def _move_four(master, total0, total1, total2, total3, call, c1, c3, k0, k1, low, high):
    """As ``_move``, for the four elements of each call of a block of normals."""
    word0, word1, word2, word3 = call, call, call, call  # for float32, which needs none
    if master.dtype.element_ty != tl.float32:
        word0, word1, word2, word3 = philox(call, c1, tl.full([1], _ROUNDING, tl.uint32), c3, k0, k1)
    _move(master, total0, word0, within(0, low, high))
    _move(master + _LANES, total1, word1, within(_LANES, low, high))
    _move(master + 2 * _LANES, total2, word2, within(2 * _LANES, low, high))
    _move(master + 3 * _LANES, total3, word3, within(3 * _LANES, low, high))


@triton.jit
def _accumulate_normals(master, table, num_directions, call, c1, c3, k0, k1, low, high):
    """Updates the four elements of each call; ``master`` points to the first of them."""
    total0 = tl.full(call.shape, 0.0, tl.float32)
    total1 = total0
    total2 = total0
    total3 = total0
    for n in range(num_directions):
        coefficient = as_float(tl.load(table + n))
        c2 = as_bits(tl.load(table + num_directions + n))
        eps0, eps1, eps2, eps3 = four_normals(call, c1, c2, c3, k0, k1)
        total0 += coefficient * eps0
        total1 += coefficient * eps1
        total2 += coefficient * eps2
        total3 += coefficient * eps3
    _move_four(master, total0, total1, total2, total3, call, c1, c3, k0, k1, low, high)


@triton.jit
def _move_word(master, total, call, c1, c3, k0, k1, low, high, which: tl.constexpr):
    """As ``_move``, for the 32 elements that the ``which``-th word of each call has the signs of."""
    step = (which * 32 + tl.arange(0, 32))[:, None]
    random_word = as_bits(total)  # for float32, which needs none
    if master.dtype.element_ty != tl.float32:
        # Rounding goes by the blocks of the normals: four steps share a call, and take one word each.
        block = (call // _LANES * (_SIGN_BLOCK // _BLOCK))[None, :] + (step // 4).to(tl.uint32)
        rounding_call = block * _LANES + (call % _LANES)[None, :]
        c2 = tl.full([1, 1], _ROUNDING, tl.uint32)
        word0, word1, word2, word3 = philox(rounding_call, c1, c2, c3, k0, k1)
        one_of_first_two = tl.where(step % 4 == 0, word0, word1)
        random_word = tl.where(step % 4 < 2, one_of_first_two, tl.where(step % 4 == 2, word2, word3))
    offset = step * _LANES
    _move(master[None, :] + offset, total, random_word, within(offset, low[None, :], high[None, :]))


@triton.jit
def _accumulate_signs(master, table, num_directions, call, c1, c3, k0, k1, low, high):
    """Updates the 128 elements of each call; ``master`` points to the first of them."""
    total0 = tl.full([32, call.shape[0]], 0.0, tl.float32)
    total1 = total0
    total2 = total0
    total3 = total0
    for n in range(num_directions):
        coefficient_bits = as_bits(tl.load(table + n))
        c2 = as_bits(tl.load(table + num_directions + n))
        word0, word1, word2, word3 = philox(call, c1, c2, c3, k0, k1)
        total0 += _signed(coefficient_bits, word0)
        total1 += _signed(coefficient_bits, word1)
        total2 += _signed(coefficient_bits, word2)
        total3 += _signed(coefficient_bits, word3)
    _move_word(master, total0, call, c1, c3, k0, k1, low, high, 0)
    _move_word(master, total1, call, c1, c3, k0, k1, low, high, 1)
    _move_word(master, total2, call, c1, c3, k0, k1, low, high, 2)
    _move_word(master, total3, call, c1, c3, k0, k1, low, high, 3)


@kernel
def _accumulate(
    master,
    table,
    start: tl.int64,
    stride: tl.int64,
    length: tl.int64,
    first_row: tl.int64,
    end_row: tl.int64,
    blocks_per_row: tl.int32,
    num_directions: tl.int32,
    c1: tl.uint32,
    c3: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    size: tl.constexpr,
    calls: tl.constexpr,
    strided: tl.constexpr,
):
    c1, c3, k0, k1 = c1.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    call, base, inner, low, high = place(
        start, stride, length, first_row, end_row, blocks_per_row, size, calls, strided
    )
    master = master + base + inner
    if size == _SIGN_BLOCK:
        _accumulate_signs(master, table, num_directions, call, c1, c3, k0, k1, low, high)
    else:
        _accumulate_normals(master, table, num_directions, call, c1, c3, k0, k1, low, high)


@kernel
def _add(
    master,
    delta,
    start: tl.int64,
    stride: tl.int64,
    length: tl.int64,
    first_row: tl.int64,
    end_row: tl.int64,
    blocks_per_row: tl.int32,
    c1: tl.uint32,
    c3: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    size: tl.constexpr,
    calls: tl.constexpr,
    strided: tl.constexpr,
):
    c1, c3, k0, k1 = c1.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    call, base, inner, low, high = place(
        start, stride, length, first_row, end_row, blocks_per_row, size, calls, strided
    )
    master, delta = master + base + inner, delta + base + inner
    delta0 = tl.load(delta, mask=within(0, low, high))
    delta1 = tl.load(delta + _LANES, mask=within(_LANES, low, high))
    delta2 = tl.load(delta + 2 * _LANES, mask=within(2 * _LANES, low, high))
    delta3 = tl.load(delta + 3 * _LANES, mask=within(3 * _LANES, low, high))
    _move_four(master, delta0, delta1, delta2, delta3, call, c1, c3, k0, k1, low, high)


# The elements of a block of each kind of noise, and the calls of a program.
_SIZES = {NoiseKind.GAUSSIAN: (BLOCK, _CALLS), NoiseKind.RADEMACHER: (SIGN_BLOCK, _SIGN_CALLS)}


def perturb(
    source: torch.Tensor,
    target: torch.Tensor,
    region: Region,
    *,
    sigma: float,
    kind: NoiseKind,
    words: tuple[int, int, int],
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.perturb``; ``words`` are the counter words 1 to 3."""
    # As bits: every version of Triton, and its interpreter, passes an integer unchanged.
    sigma_bits = int(np.float32(sigma).view(np.uint32))
    launch(_perturb, *_SIZES[kind], (source, target), region, (sigma_bits, *words, *key))


def accumulate(
    master: torch.Tensor,
    region: Region,
    *,
    coefficients: Sequence[float],
    kind: NoiseKind,
    word1: int,
    direction_words: Sequence[int],
    word3: int,
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.accumulate``; the words are those of the counter."""
    numbers = (
        np.asarray(coefficients, np.float32).tobytes() + np.asarray(direction_words, np.uint32).tobytes()
    )
    with on_device(master.device):
        stream = torch.cuda.current_stream().cuda_stream if master.is_cuda else 0
        table = _table(numbers, master.device, stream)
    numbers_of_kernel = (len(direction_words), word1, word3, *key)
    launch(_accumulate, *_SIZES[kind], (master, table), region, numbers_of_kernel)


def add(
    master: torch.Tensor,
    delta: torch.Tensor,
    region: Region,
    *,
    word1: int,
    word3: int,
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.add``, for a bfloat16 or float16 master; the words are those of the counter."""
    launch(_add, *_SIZES[NoiseKind.GAUSSIAN], (master, delta), region, (word1, word3, *key))


@functools.lru_cache(maxsize=4)
def _table(numbers: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """32-bit numbers on a device; kept, because an update asks for the same ones for every parameter.

    The key has the stream that the copy was queued on: another one would not wait for it.
    """
    host = torch.from_numpy(np.frombuffer(numbers, np.int32).copy())
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def launch(
    function: Any,
    size: int,
    calls: int,
    tensors: tuple[torch.Tensor, torch.Tensor],
    region: Region,
    numbers: tuple[int, ...],
) -> None:
    """Runs a kernel over the blocks of ``size`` elements that a region's rows touch; see ``place``."""
    rows, length, stride = region.rows, region.length, region.stride
    if rows == 1 or stride == length:
        rows, length, stride = 1, region.num_elements, 0
    # Where in a block can a row start? Where the first one does, or multiples of this away.
    unit = math.gcd(stride, size)
    latest = region.start % unit + size - unit
    blocks_per_row = (latest + length - 1) // size + 1
    rows_at_once = max(_MAX_SLOTS // blocks_per_row, 1)
    with on_device(tensors[0].device):
        for first_row in range(0, rows, rows_at_once):
            end_row = min(first_row + rows_at_once, rows)
            programs = -(-(end_row - first_row) * blocks_per_row * LANES // calls)
            function[(programs,)](
                *tensors,
                region.start,
                stride,
                length,
                first_row,
                end_row,
                blocks_per_row,
                *numbers,
                size=size,
                calls=calls,
                strided=rows > 1,
                num_warps=_WARPS,
                num_stages=1,
                enable_fp_fusion=False,
            )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one, for that is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
