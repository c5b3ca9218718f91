"""eps, the noise: a pure function of (seed, iteration, direction, parameter, element).

The two operations below are all that the rest of the program needs. They pick the kernel that fits the
device; every kernel gives the bits of ``definition.py``.
"""

from collections.abc import Sequence

import torch

from shardes.noise import cpu, portable
from shardes.noise.definition import NOISE_VERSION, Stream, data_order, seed_key

__all__ = ["NOISE_VERSION", "accumulate", "data_order", "perturb"]


def perturb(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    sigma: float,
    seed: int,
    iteration: int,
    direction: int,
    param_id: int,
    start: int,
) -> None:
    """Writes ``round(centre + sigma * eps)`` to ``target``; the centre is ``source`` rounded to its dtype.

    Args:
        source: The master, flat and contiguous; float32, bfloat16 or float16.
        target: The working tensor, of the same length; any of the three dtypes. ``source`` is not written.
        sigma: Noise scale, used as float32.
        seed: The run's seed.
        iteration: Below 2**32.
        direction: Below 2**24.
        param_id: Below 2**24.
        start: Row-major index, in the whole parameter, of the first element.
    """
    if source.numel() == 0:
        return
    words = (param_id << 8, direction << 8 | Stream.GAUSSIAN, iteration)
    implementation = cpu.perturb if source.device.type == "cpu" else portable.perturb
    implementation(source, target, start=start, sigma=sigma, words=words, key=seed_key(seed))


def accumulate(
    master: torch.Tensor,
    *,
    coefficients: Sequence[float],
    directions: Sequence[int],
    seed: int,
    iteration: int,
    param_id: int,
    start: int,
) -> None:
    """Adds ``sum_n coefficients[n] * eps(directions[n])`` to ``master``, in one pass.

    The sum starts at 0 and goes in the order given, in float32, one multiplication and one addition a term.

    Args:
        master: float32, flat and contiguous; changed in place.
        coefficients: One per direction, used as float32.
        directions: Each below 2**24.
        seed: The run's seed.
        iteration: Below 2**32.
        param_id: Below 2**24.
        start: Row-major index, in the whole parameter, of the first element.
    """
    if master.numel() == 0:
        return
    implementation = cpu.accumulate if master.device.type == "cpu" else portable.accumulate
    implementation(
        master,
        start=start,
        coefficients=coefficients,
        word1=param_id << 8,
        direction_words=[direction << 8 | Stream.GAUSSIAN for direction in directions],
        word3=iteration,
        key=seed_key(seed),
    )
