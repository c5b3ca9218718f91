"""Rademacher noise on a GPU, in Triton."""

from shardes.noise.definition import BLOCK, LANES, SIGN_BLOCK, Stream
from shardes.noise.gpu import Fill, move, within
from shardes.noise.gpu_math import as_bits, as_float, perturbed, philox, tl, triton

_LANES, _BLOCK, _SIGN_BLOCK = tl.constexpr(LANES), tl.constexpr(BLOCK), tl.constexpr(SIGN_BLOCK)
_ROUNDING = tl.constexpr(int(Stream.ROUNDING))

# Calls of a program: one a thread, because the sums of its 128 elements stay in registers during an update.
_CALLS = 128


@triton.jit
def _signed(scale_bits, word):
    """Return ``scale * sign`` for the 32 signs in each word, in order: float32 of shape [32, calls]."""
    bit = tl.arange(0, 32)[:, None]
    return as_float(scale_bits ^ ((word[None, :] << (31 - bit)) & 0x80000000))


@triton.jit
def _perturb_word(source, target, sigma_bits, random_word, low, high, which: tl.constexpr):
    """Perturb the 32 elements that the ``which``-th word of each call has the signs of."""
    dtype = target.dtype.element_ty
    offset = (which * 32 + tl.arange(0, 32))[:, None] * _LANES
    mask = within(offset, low[None, :], high[None, :])
    values = tl.load(source[None, :] + offset, mask=mask)
    step = _signed(sigma_bits, random_word)
    tl.store(target[None, :] + offset, perturbed(values, step, dtype), mask=mask)


@triton.jit
def _perturb_signs(source, target, sigma_bits, call, c1, c2, c3, k0, k1, low, high, bordered: tl.constexpr):
    """Perturb the 128 elements of each call; ``source`` and ``target`` point to the first of them."""
    word0, word1, word2, word3 = philox(call, c1, c2, c3, k0, k1)
    _perturb_word(source, target, sigma_bits, word0, low, high, 0)
    _perturb_word(source, target, sigma_bits, word1, low, high, 1)
    _perturb_word(source, target, sigma_bits, word2, low, high, 2)
    _perturb_word(source, target, sigma_bits, word3, low, high, 3)


@triton.jit
def _move_word(master, total, call, c1, c3, k0, k1, low, high, which: tl.constexpr):
    """Add to the 32 elements that the ``which``-th word of each call has the signs of; see ``move``."""
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
    move(master[None, :] + offset, total, random_word, within(offset, low[None, :], high[None, :]))


@triton.jit
def _accumulate_signs(master, table, num_directions, call, c1, c3, k0, k1, low, high):
    """Add weighted noise to the 128 elements of each call; ``master`` points to the first of them."""
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


FILL = Fill(
    perturb_calls=_perturb_signs,
    accumulate_calls=_accumulate_signs,
    size=SIGN_BLOCK,
    calls=_CALLS,
    always_masked=True,
    part_chunk=SIGN_BLOCK,
)
