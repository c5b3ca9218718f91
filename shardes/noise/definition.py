"""Shared definitions of all kinds of noise, in NumPy: counters, Philox, Box-Muller, rounding.

Kernels are compared with this and with the kinds' definitions (``kinds``), bit for bit. docs/noise.md states
the same in words. Nothing here may change without a new ``NOISE_VERSION``: a journal
can only be replayed under the definition it was written with. The kernels import the constants from here.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOISE_VERSION = 1

Floats = Sequence[float]
Ints = Sequence[int]

# Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
PHILOX_ROUNDS = 10
PHILOX_M0 = 0xD2511F53
PHILOX_M1 = 0xCD9E8D57
PHILOX_W0 = 0x9E3779B9
PHILOX_W1 = 0xBB67AE85

# A block is LANES calls, and each call yields four elements, one in each quarter of the block.
LANES = 16
BLOCK = 4 * LANES
# One bit an element: a call's 4 * 32 bits serve elements LANES apart.
SIGN_BLOCK = 128 * LANES
# Calls between the first random numbers of a turn of an episode and those of the next.
CALLS_PER_TURN = 2**20

MAX_ELEMENTS = 2**34
MAX_ITERATION = 2**32 - 1
MAX_DIRECTION = 2**24 - 1
MAX_PARAM_ID = 2**24 - 1

# Polynomials of the Box-Muller transform, all exact float32 values (tools/derive_noise_polynomials.py).
SQRT_HALF_BITS = 0x3F3504F3
LN2_HI = 0.693145751953125
LN2_LO = 1.4286068098954274e-06
LOG_TAIL = (
    0.333333283662796,
    -0.2500084638595581,
    0.20001448690891266,
    -0.16622772812843323,
    0.1419726312160492,
    -0.1316087394952774,
    0.12789621949195862,
    -0.07666336745023727,
)
SIN_TURNS = (6.283185005187988, -41.34154510498047, 81.5790023803711, -74.93680572509766)
COS_TURNS = (-19.739208221435547, 64.93917083740234, -85.42823791503906, 58.76472473144531)

# The weights digest: the finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
# number generators") and two odd constants of 2**64/phi and 2**64/e.
DIGEST_MIX_A, DIGEST_MIX_B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
DIGEST_INDEX_FACTOR, DIGEST_PARAM_FACTOR = 0x9E3779B97F4A7C15, 0x5E2D58D8B3BCDF1B


class Stream(IntEnum):
    """Use of a counter; streams never share a counter."""

    GAUSSIAN = 0
    DATA_ORDER = 1
    RADEMACHER = 2
    ROUNDING = 3
    SAMPLING = 4
    LEFT = 5
    RIGHT = 6
    PARTS = 7


class Draw(IntEnum):
    """Purpose of a draw of ``data_order``; different draws of an iteration are independent."""

    PROBLEMS = 0
    SCREENED = 1


class NoiseKey(NamedTuple):
    """Key of the noise of an iteration.

    Attributes:
        seed: The run's seed, below 2**64.
        iteration: Iteration, below 2**32.
    """

    seed: int
    iteration: int


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Compute Philox4x32-10.

    Args:
        counter: Counters c0 to c3, uint32 of shape [4, n].
        key: Two 32-bit key words.

    Returns:
        uint32 of shape [4, n].
    """
    c0, c1, c2, c3 = (row.copy() for row in counter)
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product0 = c0.astype(np.uint64) * np.uint64(PHILOX_M0)
        product1 = c2.astype(np.uint64) * np.uint64(PHILOX_M1)
        high0, low0 = (product0 >> np.uint64(32)).astype(np.uint32), product0.astype(np.uint32)
        high1, low1 = (product1 >> np.uint64(32)).astype(np.uint32), product1.astype(np.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint32(k0), low1, high0 ^ c3 ^ np.uint32(k1), low0
        k0 = (k0 + PHILOX_W0) & 0xFFFFFFFF
        k1 = (k1 + PHILOX_W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def seed_key(seed: int) -> tuple[int, int]:
    """Return the Philox key of a run's 64-bit seed: low word, high word."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF


def call_words(
    call: NDArray[np.uint64], *, seed: int, iteration: int, direction: int, param_id: int, stream: Stream
) -> NDArray[np.uint32]:
    """Compute the four words of each ``call`` (below 2**40), as uint32 of shape [4, n]."""
    counter = np.empty((4, call.size), np.uint32)
    counter[0] = call.astype(np.uint32)
    counter[1] = (call >> np.uint64(32)).astype(np.uint32) | np.uint32(param_id << 8)
    counter[2] = direction << 8 | stream
    counter[3] = iteration
    return philox(counter, seed_key(seed))


def box_muller(
    radius_bits: NDArray[np.uint32], angle_bits: NDArray[np.uint32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute two standard normals from two 32-bit words (Box and Muller 1958), float32 throughout."""
    radius = np.sqrt(minus_two_log(radius_uniform(radius_bits)))
    quadrant, turns = angle_uniform(angle_bits)
    cosine, sine = cos_sin_turns(quadrant, turns)
    return radius * cosine, radius * sine


def radius_uniform(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Return float32 in [2**-32, 1]: the top 31 bits, rounded to float32, plus half a step."""
    top = (bits >> np.uint32(1)).astype(np.int32).astype(np.float32)
    return top * np.float32(2.0**-31) + np.float32(2.0**-32)


def angle_uniform(bits: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return the nearest quadrant (0 to 3) and the rest of the angle in turns, float32 in [-1/8, 1/8]."""
    quadrant = (bits + np.uint32(0x20000000)) >> np.uint32(30)
    rest = (bits - (quadrant << np.uint32(30))).view(np.int32)
    return quadrant, rest.astype(np.float32) * np.float32(2.0**-32)


def minus_two_log(u: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute -2 log u for u in [2**-32, 1]: u = m 2**e, m in [sqrt(1/2), sqrt(2)), polynomial in m - 1."""
    bits = u.view(np.int32)
    exponent = (bits - np.int32(SQRT_HALF_BITS)) >> np.int32(23)
    z = (bits - (exponent << np.int32(23))).view(np.float32) - np.float32(1)
    square = z * z
    e = exponent.astype(np.float32)
    small = (square * z) * _polynomial(LOG_TAIL, z) + e * np.float32(LN2_LO)
    log = ((small - np.float32(0.5) * square) + z) + e * np.float32(LN2_HI)
    # From 0, so that u = 1 gives +0 and not -0.
    return np.float32(0) - np.float32(2) * log


def cos_sin_turns(
    quadrant: NDArray[np.uint32], turns: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute cosine and sine of 2 pi (quadrant/4 + turns)."""
    square = turns * turns
    sine = turns * _polynomial(SIN_TURNS, square)
    cosine = square * _polynomial(COS_TURNS, square) + np.float32(1)
    odd = (quadrant & np.uint32(1)) != 0
    real = np.where(odd, sine, cosine)
    imaginary = np.where(odd, cosine, sine)
    real = np.where(((quadrant + np.uint32(1)) & np.uint32(2)) != 0, -real, real)
    imaginary = np.where((quadrant & np.uint32(2)) != 0, -imaginary, imaginary)
    return real, imaginary


def _polynomial(coefficients: Floats, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the polynomial with these coefficients, that of the highest power last, by Horner's rule."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + np.float32(coefficient)
    return value


def element_words(
    *, start: int, length: int, stream: Stream, block: int = BLOCK, **address: int
) -> NDArray[np.uint32]:
    """Compute the four words of every call of the blocks that a range of elements touches.

    Args:
        start: Row-major index of the first element in the whole parameter.
        length: Number of elements.
        stream: Counters to draw from.
        block: Elements of a block.
        **address: seed, iteration, direction and param_id, as for ``gaussian.normals``.

    Returns:
        uint32 of shape [4, blocks, LANES].
    """
    first_block = start // block
    num_blocks = -(-(start + length) // block) - first_block
    call = np.arange(num_blocks * LANES, dtype=np.uint64) + np.uint64(first_block * LANES)
    return call_words(call, stream=stream, **address).reshape(4, num_blocks, LANES)


def rounding_bits(*, start: int, length: int, **address: int) -> NDArray[np.uint32]:
    """Compute the 16 random bits with which an update rounds each element.

    Args:
        start: Row-major index of the first element in the whole parameter.
        length: Number of elements.
        **address: seed, iteration and param_id, as for ``gaussian.normals``.

    Returns:
        uint32 of shape [length], each below 2**16.
    """
    words = element_words(start=start, length=length, direction=0, stream=Stream.ROUNDING, **address)
    return words.transpose(1, 0, 2).reshape(-1)[start % BLOCK :][:length] >> np.uint32(16)


def round_to_bfloat16(values: NDArray[np.float32], bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Round stochastically: up with a probability of the distance to the lower neighbour.

    A finite value stays finite. The payload of a NaN is not defined.

    Args:
        values: Values to round, float32.
        bits: Random bits, uint32 below 2**16, of the same shape.

    Returns:
        The bits of bfloat16, as uint16 of the same shape.
    """
    pattern = values.view(np.uint32)
    magnitude = pattern & np.uint32(0x7FFFFFFF)
    rounded = np.minimum((magnitude + bits) >> np.uint32(16), np.uint32(0x7F7F))
    rounded = np.where(magnitude >= np.uint32(0x7F800000), magnitude >> np.uint32(16), rounded)
    rounded = np.where(magnitude > np.uint32(0x7F800000), np.uint32(0x7FC0), rounded)
    return (rounded | pattern >> np.uint32(16) & np.uint32(0x8000)).astype(np.uint16)


def round_to_float16(values: NDArray[np.float32], bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Round as ``round_to_bfloat16``; below 2**-14, where float16 has steps of 2**-24, to within 2**-40."""
    pattern = values.view(np.uint32)
    magnitude = pattern & np.uint32(0x7FFFFFFF)
    # 13 bits of the significand go; the exponent's bias falls from 127 to 15.
    normal = (magnitude - np.uint32(0x38000000) + (bits >> np.uint32(3))) >> np.uint32(13)
    normal = np.minimum(normal, np.uint32(0x7BFF))
    is_small = magnitude < np.uint32(0x38800000)
    steps = np.where(is_small, magnitude, np.uint32(0)).view(np.float32) * np.float32(2.0**40)
    small = (steps.astype(np.int32).astype(np.uint32) + bits) >> np.uint32(16)
    rounded = np.where(is_small, small, normal)
    rounded = np.where(magnitude == np.uint32(0x7F800000), np.uint32(0x7C00), rounded)
    rounded = np.where(magnitude > np.uint32(0x7F800000), np.uint32(0x7E00), rounded)
    return (rounded | pattern >> np.uint32(16) & np.uint32(0x8000)).astype(np.uint16)


def part_shifts(
    *, first: int, count: int, num_parts: int, seed: int, iteration: int, param_id: int
) -> NDArray[np.int64]:
    """Compute by how much the parts are shifted in each of some groups of blocks of one parameter.

    A group is ``num_parts`` neighbouring blocks. The part of its block j is (j + shift) modulo ``num_parts``,
    so each part has one block of every whole group.

    Args:
        first: Number of the first group.
        count: Number of groups.
        num_parts: Number of parts, below 2**16.
        seed: The run's seed, below 2**64.
        iteration: Iteration, below 2**32.
        param_id: Index of the parameter in the name-sorted list, below 2**24.

    Returns:
        int64 of shape [count], each below ``num_parts``.
    """
    calls = np.arange(first // 4, (first + count + 3) // 4, dtype=np.uint64)
    words = call_words(
        calls, seed=seed, iteration=iteration, direction=0, param_id=param_id, stream=Stream.PARTS
    )
    in_order = words.T.reshape(-1)[first % 4 :][:count].astype(np.uint64)
    return (in_order * np.uint64(num_parts) >> np.uint64(32)).astype(np.int64)


def data_order(
    size: int, *, seed: int, iteration: int, count: int, draw: Draw = Draw.PROBLEMS
) -> NDArray[np.int64]:
    """Return ``count`` different indices below ``size`` in random order, a pure function of the arguments.

    Each index gets a 64-bit random key, and the ``count`` smallest keys win (ties by index).
    """
    call = np.arange(size, dtype=np.uint64)
    words = call_words(
        call, seed=seed, iteration=iteration, direction=0, param_id=draw, stream=Stream.DATA_ORDER
    )
    keys = words[0].astype(np.uint64) << np.uint64(32) | words[1].astype(np.uint64)
    return np.argsort(keys, kind="stable")[:count].astype(np.int64)


def sampling_uniforms(
    *, seed: int, iteration: int, prompt: int, sample: int, count: int, turn: int = 0
) -> NDArray[np.float32]:
    """Return the random numbers that draw the tokens of one answer, a pure function of the arguments.

    Args:
        seed: The run's seed, below 2**64.
        iteration: Iteration, below 2**32.
        prompt: Index in the batch of problems, below 2**24.
        sample: Index among the answers to one prompt, below 2**24.
        count: Number of token positions, at most ``4 * CALLS_PER_TURN``, so that no turns share numbers.
        turn: Number of the answers before in the same episode, below 2**20; 0 where there are no turns.

    Returns:
        float32 in [0, 1), multiples of 2**-24, of shape [count].
    """
    call = np.arange(-(-count // 4), dtype=np.uint64) + np.uint64(turn * CALLS_PER_TURN)
    words = call_words(
        call, seed=seed, iteration=iteration, direction=sample, param_id=prompt, stream=Stream.SAMPLING
    )
    return (words.T.reshape(-1)[:count] >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
