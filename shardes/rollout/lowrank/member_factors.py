"""Compute the low-rank factors of several members of a population, whatever iterations their noise is of."""

from collections.abc import Sequence

import torch

from shardes import noise
from shardes.backends.shard import Shard
from shardes.es.update import Perturbation
from shardes.noise import LowRank


def factors_of(
    shard: Shard, members: Sequence[Perturbation], *, kind: LowRank, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each member's left and right factors of a whole matrix, without sigma.

    Args:
        shard: Shard of the matrix; its name and shape count, not what it holds.
        members: Members of the population.
        kind: Kind of noise.
        seed: Key of the noise.
        device: Device of the factors.

    Returns:
        float32 of shape [members, ..., features, rank], of output features and of input features.
    """
    parts = []
    places: list[int] = []
    for iteration, mine in _by_iteration(members).items():
        directions = sorted({members[place].direction for place in mine})
        found = noise.factors(
            kind=kind,
            param_id=shard.param_id,
            shape=shard.shape,
            seed=seed,
            iteration=iteration,
            directions=directions,
            device=device,
        )
        index = torch.tensor([directions.index(members[place].direction) for place in mine])
        parts.append([factor[index.to(device)] for factor in found])
        places += mine
    order = torch.tensor(places).argsort().to(device)
    left, right = (torch.cat(side)[order].contiguous() for side in zip(*parts, strict=True))
    return left, right


def _by_iteration(members: Sequence[Perturbation]) -> dict[int, list[int]]:
    """Return the indices of the members by the iteration of their noise."""
    found: dict[int, list[int]] = {}
    for place, member in enumerate(members):
        found.setdefault(member.iteration, []).append(place)
    return found
