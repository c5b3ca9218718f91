"""Derive the polynomial coefficients of the noise definition (docs/noise.md) and print them.

The coefficients are part of the definition and never change; this script documents where they come from.
Each polynomial is the weighted least-squares fit at Chebyshev nodes, in extended precision, which is close to
the minimax fit. Coefficients are rounded to float32 one at a time from the lowest order up, and the
higher orders are fitted again to absorb the error of each rounding.

    python tools/derive_noise_polynomials.py
"""

from collections.abc import Callable

import click
import numpy as np

Array = np.ndarray


def fit(function: Callable[[Array], Array], low: float, high: float, num_terms: int, weight: Array) -> list:
    """Fit ``sum_k c_k x^k`` to ``function`` on [low, high] with float32 coefficients, lowest order first."""
    nodes = np.cos(np.pi * (np.arange(weight.size) + 0.5) / weight.size).astype(np.longdouble)
    x = (high + low) / 2 + (high - low) / 2 * nodes
    target = function(x)
    fixed: list[np.float32] = []
    while len(fixed) < num_terms:
        rest = target - sum((np.longdouble(c) * x**k for k, c in enumerate(fixed)), np.zeros_like(x))
        powers = np.stack([x**k for k in range(len(fixed), num_terms)], axis=1) * weight[:, None]
        solution = np.linalg.lstsq(powers.astype(np.float64), (rest * weight).astype(np.float64), rcond=None)
        fixed.append(np.float32(solution[0][0]))
    return fixed


def series(
    function: Callable[[Array], Array], limit: Callable[[Array], Array], *, near: float
) -> Callable[[Array], Array]:
    """Return ``function``, with its series ``limit`` for |x| < ``near``, where division loses all digits."""
    return lambda x: np.where(np.abs(x) < near, limit(x), function(np.where(np.abs(x) < near, 1.0, x)))


@click.command()
def main() -> None:
    """Print each coefficient in decimal and as a float32 hexadecimal literal."""
    nodes = 4000
    two_pi = 2 * np.pi * np.ones(1, np.longdouble)[0]
    # log(1+z) = z - z^2/2 + z^3 L(z) on [sqrt(1/2)-1, sqrt(2)-1]
    log_tail = series(
        lambda z: (np.log1p(z) - z + z * z / 2) / z**3,
        lambda z: 1 / 3 - z / 4 + z * z / 5 - z**3 / 6 + z**4 / 7,
        near=1e-3,
    )
    # sin(2 pi t) = t (S0 + t^2 S(t^2)), cos(2 pi t) = 1 + t^2 C(t^2), for |t| <= 1/8; s = t^2
    sine = series(
        lambda s: np.sin(two_pi * np.sqrt(s)) / np.sqrt(s),
        lambda s: two_pi * (1 - two_pi**2 * s / 6),
        near=1e-7,
    )
    cosine = series(
        lambda s: (np.cos(two_pi * np.sqrt(s)) - 1) / s,
        lambda s: -(two_pi**2) / 2 * (1 - two_pi**2 * s / 12),
        near=1e-7,
    )
    chebyshev = np.cos(np.pi * (np.arange(nodes) + 0.5) / nodes)
    z_nodes = (2**0.5 + 0.5**0.5) / 2 - 1 + (2**0.5 - 0.5**0.5) / 2 * chebyshev
    s_nodes = (1 + chebyshev) / 128
    tables = {
        "L": fit(log_tail, 0.5**0.5 - 1, 2**0.5 - 1, 8, np.abs(z_nodes) ** 2 + 1e-9),
        "S": fit(sine, 0.0, 1 / 64, 4, np.sqrt(s_nodes)),
        "C": fit(cosine, 0.0, 1 / 64, 4, s_nodes),
    }
    for name, coefficients in tables.items():
        for order, coefficient in enumerate(coefficients):
            bits = np.float32(coefficient).view(np.uint32)
            click.echo(f"{name}{order} = {float(coefficient)!r}  # bits 0x{bits:08x}")


if __name__ == "__main__":
    main()
