"""GPU kernels of elementwise noise, in Triton: the definition's bits, in one pass over the tensor.

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
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardes.noise.definition import BLOCK, LANES, Floats, Ints, NoiseKey, Stream, seed_key
from shardes.noise.gpu_math import philox, round_randomly, tl, triton, widen
from shardes.noise.region import Region

_LANES = tl.constexpr(LANES)
_ROUNDING = tl.constexpr(int(Stream.ROUNDING))

# Warps of a program, and the calls of one that handles four elements a call: two calls a thread, which are
# two independent chains for the schedulers to choose from, in 40 registers, of which a multiprocessor has
# enough for 48 warps.
WARPS = 4
CALLS = 256

# Slots of one launch over several rows; with those that the last program has too many, below 2**32.
_MAX_SLOTS = 2**31


@dataclass(frozen=True)
class Fill:
    """Triton functions with which a kind of noise handles the Philox calls of a program.

    Attributes:
        perturb_calls: ``(source, target, sigma_bits, call, c1, c2, c3, k0, k1, low, high, bordered)``
            perturbs the elements of each call. ``source`` and ``target`` point to the first of them; if
            ``bordered``, only those ``within`` the bounds low and high are in the region, else all are.
        accumulate_calls: ``(master, table, num_directions, call, c1, c3, k0, k1, low, high)`` adds the noise
            of every direction times its coefficient; the table has the coefficients, then the counter words.
        size: Elements of a block, which is LANES calls.
        calls: Calls of a program.
        always_masked: Whether programs without a border are not worth code of their own.
        part_chunk: Elements of a program where the noise covers a part of the parameters.
    """

    perturb_calls: Any
    accumulate_calls: Any
    size: int
    calls: int
    always_masked: bool
    part_chunk: int


def kernel(function: Callable[..., None]) -> Any:
    """Apply ``triton.jit`` to a kernel that is not to be compiled again when an argument changes.

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
    """Compute the calls that a program makes, and where their elements lie.

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
    """Return whether what lies ``offset`` after a call's first element is in the region."""
    return (low <= offset) & (offset < high)


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
    always_masked: tl.constexpr,
    perturb_calls: tl.constexpr,
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
    if strided or always_masked:
        perturb_calls(source, target, sigma_bits, call, c1, c2, c3, k0, k1, low, high, True)
    elif (base >= 0) & (base + calls // _LANES * size <= length):
        # Few programs have a border; the masks would cost all of them a tenth of their instructions.
        perturb_calls(source, target, sigma_bits, call, c1, c2, c3, k0, k1, low, high, False)
    else:
        perturb_calls(source, target, sigma_bits, call, c1, c2, c3, k0, k1, low, high, True)


@triton.jit
def move(master, total, random_word, mask):
    """Add ``total`` to the elements pointed to; a narrow format is rounded by the word's top 16 bits."""
    dtype = master.dtype.element_ty
    moved = widen(tl.load(master, mask=mask)) + total
    if dtype == tl.float32:
        tl.store(master, moved, mask=mask)
    else:
        tl.store(master, round_randomly(moved, random_word >> 16, dtype), mask=mask)


@triton.jit
def move_four(master, total0, total1, total2, total3, call, c1, c3, k0, k1, low, high):
    """Add to the four elements of each call of a block of normals; see ``move``."""
    word0, word1, word2, word3 = call, call, call, call  # for float32, which needs none
    if master.dtype.element_ty != tl.float32:
        word0, word1, word2, word3 = philox(call, c1, tl.full([1], _ROUNDING, tl.uint32), c3, k0, k1)
    move(master, total0, word0, within(0, low, high))
    move(master + _LANES, total1, word1, within(_LANES, low, high))
    move(master + 2 * _LANES, total2, word2, within(2 * _LANES, low, high))
    move(master + 3 * _LANES, total3, word3, within(3 * _LANES, low, high))


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
    accumulate_calls: tl.constexpr,
):
    c1, c3, k0, k1 = c1.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    call, base, inner, low, high = place(
        start, stride, length, first_row, end_row, blocks_per_row, size, calls, strided
    )
    master = master + base + inner
    accumulate_calls(master, table, num_directions, call, c1, c3, k0, k1, low, high)


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
    move_four(master, delta0, delta1, delta2, delta3, call, c1, c3, k0, k1, low, high)


def perturb(
    source: Tensor, target: Tensor, region: Region, *, fill: Fill, sigma: float, word2: int, key: NoiseKey
) -> None:
    """Perturb as ``shardes.noise.perturb`` does, with counter word 2 given."""
    # As bits: every version of Triton, and its interpreter, passes an integer unchanged.
    sigma_bits = int(np.float32(sigma).view(np.uint32))
    numbers = (sigma_bits, region.param_id << 8, word2, key.iteration, *seed_key(key.seed))
    functions = {"perturb_calls": fill.perturb_calls, "always_masked": fill.always_masked}
    launch(_perturb, fill.size, fill.calls, (source, target), region, numbers, **functions)


def accumulate(
    master: Tensor, region: Region, *, fill: Fill, coefficients: Floats, words2: Ints, key: NoiseKey
) -> None:
    """Accumulate as ``shardes.noise.accumulate`` does, with counter words 2 given."""
    terms = np.asarray(coefficients, np.float32).tobytes() + np.asarray(words2, np.uint32).tobytes()
    with on_device(master.device):
        stream = torch.cuda.current_stream().cuda_stream if master.is_cuda else 0
        table = copy_table(terms, master.device, stream)
    numbers = (len(words2), *update_words(region.param_id, key))
    function = {"accumulate_calls": fill.accumulate_calls}
    launch(_accumulate, fill.size, fill.calls, (master, table), region, numbers, **function)


def add(master: Tensor, delta: Tensor, region: Region, *, key: NoiseKey) -> None:
    """Add to a narrow master as ``shardes.noise.add`` does."""
    launch(_add, BLOCK, CALLS, (master, delta), region, update_words(region.param_id, key))


def update_words(param_id: int, key: NoiseKey) -> tuple[int, ...]:
    """Return the counter words 1 and 3 of an update, and the key words."""
    return param_id << 8, key.iteration, *seed_key(key.seed)


@functools.lru_cache(maxsize=4)
def copy_table(numbers: bytes, device: torch.device, stream: int) -> Tensor:
    """Copy 32-bit numbers to a device; kept, because an update asks for the same ones for every parameter.

    The key has the stream that the copy was queued on: another one would not wait for it.
    """
    host = torch.from_numpy(np.frombuffer(numbers, np.int32).copy())
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def launch(
    function: Any,
    size: int,
    calls: int,
    tensors: tuple[Tensor, Tensor],
    region: Region,
    numbers: tuple[int, ...],
    **constants: Any,
) -> None:
    """Run a kernel over the blocks of ``size`` elements that a region's rows touch; see ``place``.

    Args:
        function: Kernel.
        size: Elements of a block.
        calls: Calls of a program.
        tensors: First arguments of the kernel, on one device.
        region: Elements that the tensors hold.
        numbers: Arguments after those of ``place``.
        **constants: Further compile-time constants.
    """
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
                **constants,
                num_warps=WARPS,
                num_stages=1,
                enable_fp_fusion=False,
            )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one, where Triton launches; nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
