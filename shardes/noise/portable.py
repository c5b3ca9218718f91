"""The noise in plain torch operations, for devices that have no kernel of their own.

Every step is one IEEE operation on whole tensors, so the bits are those of definition.py; it is many times
slower than a kernel because every step goes through memory.
"""

from collections.abc import Sequence

import torch

from shardes.noise.definition import (
    BLOCK,
    COS_TURNS,
    LANES,
    LN2_HI,
    LN2_LO,
    LOG_TAIL,
    PHILOX_M0,
    PHILOX_M1,
    PHILOX_ROUNDS,
    PHILOX_W0,
    PHILOX_W1,
    SIN_TURNS,
    SQRT_HALF_BITS,
)

_WORD = 0xFFFFFFFF
# Elements per pass: bounds the memory of the intermediate int64 tensors.
_CHUNK = 1 << 20


def _philox(
    call: torch.Tensor, c1: int, c2: int, c3: int, k0: int, k1: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    a = call & _WORD
    b = (call >> 32) | c1
    c, d = torch.full_like(call, c2), torch.full_like(call, c3)
    for _ in range(PHILOX_ROUNDS):
        # The products wrap in int64, but as bit patterns they are the unsigned 64-bit products.
        product0, product1 = a * PHILOX_M0, c * PHILOX_M1
        a, b, c, d = (
            (product1 >> 32 & _WORD) ^ b ^ k0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ d ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + PHILOX_W0) & _WORD, (k1 + PHILOX_W1) & _WORD
    return a, b, c, d


def _signed(word: torch.Tensor) -> torch.Tensor:
    """A 32-bit word in int64 as the int32 of the same bits."""
    return (word - ((word >> 31) << 32)).to(torch.int32)


def _horner(x: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def _radius(word: torch.Tensor) -> torch.Tensor:
    u = (word >> 1).to(torch.int32).float() * 2.0**-31 + 2.0**-32
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    z = (bits - (exponent << 23)).view(torch.float32) - 1.0
    square = z * z
    e = exponent.float()
    small = (square * z) * _horner(z, LOG_TAIL) + e * LN2_LO
    # torch.sqrt is not correctly rounded in float32 on every CPU; through float64 it is.
    return torch.sqrt((0.0 - 2.0 * (((small - 0.5 * square) + z) + e * LN2_HI)).double()).float()


def _cos_sin(word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quadrant = ((word + 0x20000000) & _WORD) >> 30
    turns = _signed((word - (quadrant << 30)) & _WORD).float() * 2.0**-32
    square = turns * turns
    sine = turns * _horner(square, SIN_TURNS)
    cosine = square * _horner(square, COS_TURNS) + 1.0
    odd = quadrant & 1 != 0
    real, imaginary = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    real = torch.where((quadrant + 1) & 2 != 0, -real, real)
    imaginary = torch.where(quadrant & 2 != 0, -imaginary, imaginary)
    return real, imaginary


def _normals(
    device: torch.device, start: int, length: int, c1: int, c2: int, c3: int, k0: int, k1: int
) -> torch.Tensor:
    first = start // BLOCK
    num_blocks = -(-(start + length) // BLOCK) - first
    call = torch.arange(first * LANES, (first + num_blocks) * LANES, dtype=torch.int64, device=device)
    a, b, c, d = _philox(call, c1, c2, c3, k0, k1)
    radius0, (cosine0, sine0) = _radius(a), _cos_sin(b)
    radius1, (cosine1, sine1) = _radius(c), _cos_sin(d)
    quarters = (radius0 * cosine0, radius0 * sine0, radius1 * cosine1, radius1 * sine1)
    eps = torch.stack([quarter.view(num_blocks, LANES) for quarter in quarters], dim=1).view(-1)
    return eps[start - first * BLOCK :][:length]


def perturb(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    start: int,
    sigma: float,
    words: tuple[int, int, int],
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.perturb``; ``words`` are the counter words 1 to 3."""
    for low in range(0, source.numel(), _CHUNK):
        here, there = source[low : low + _CHUNK], target[low : low + _CHUNK]
        eps = _normals(source.device, start + low, here.numel(), *words, *key)
        there.copy_(here.to(there.dtype).float() + eps * sigma)


def accumulate(
    master: torch.Tensor,
    *,
    start: int,
    coefficients: Sequence[float],
    word1: int,
    direction_words: Sequence[int],
    word3: int,
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.accumulate``; the words are those of the counter."""
    for low in range(0, master.numel(), _CHUNK):
        here = master[low : low + _CHUNK]
        total = torch.zeros_like(here)
        for word2, coefficient in zip(direction_words, coefficients, strict=True):
            total += (
                _normals(master.device, start + low, here.numel(), word1, word2, word3, *key) * coefficient
            )
        here += total
