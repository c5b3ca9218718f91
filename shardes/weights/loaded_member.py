"""The member that working tensors are, so that only the elements which differ are written for the next."""

from dataclasses import dataclass
from typing import Any

import torch

from shardes import noise
from shardes.es.update import Perturbation
from shardes.noise import NoiseKind, Region
from shardes.noise.parts import part_of_direction


@dataclass(frozen=True)
class Change:
    """Writes that make a member of working tensors; see ``LoadedMember.next``.

    Attributes:
        seed: Key of the noise.
        kind: Kind of noise.
        to: The member.
        restores_all: Whether every element has to be restored first.
        restored: Member whose part has to be restored first; None: no part.
    """

    seed: int
    kind: NoiseKind
    to: Perturbation
    restores_all: bool = False
    restored: Perturbation | None = None

    def write(self, region: Region, *, source: torch.Tensor, target: torch.Tensor) -> None:
        """Write the member's elements of a region to ``target``; ``source`` has the centre or the master."""
        address: dict[str, Any] = {"region": region, "seed": self.seed, "kind": self.kind}
        if self.restores_all:
            target.copy_(source)
        elif self.restored is not None:
            old = self.restored
            noise.restore(source, target, iteration=old.iteration, direction=old.direction, **address)
        noise.perturb(source, target, **vars(self.to), **address)


class LoadedMember:
    """Keeps which member working tensors are, for noise that covers a part of the parameters.

    A member is made of the centre or of another member by writing the parts in which they differ. Noise that
    covers all parameters writes every element in any case, and nothing has to be known.

    Args:
        seed: Key of the noise.
        kind: Kind of noise.
    """

    def __init__(self, seed: int, kind: NoiseKind) -> None:
        self._seed, self._kind = seed, kind
        self._version: int | None = None
        self._member: Perturbation | None = None

    def next(self, perturbation: Perturbation, *, version: int) -> Change:
        """Return what has to be written to make a member; until ``set``, no element is known any more.

        Args:
            perturbation: The member.
            version: Version of the master.
        """
        is_known, old = self._version == version, self._member
        self.forget()
        if self._kind.num_parts == 1:
            return Change(self._seed, self._kind, perturbation)
        if not is_known:
            return Change(self._seed, self._kind, perturbation, restores_all=True)
        if old is not None and self._part(old) == self._part(perturbation):
            old = None  # the same elements are written again
        return Change(self._seed, self._kind, perturbation, restored=old)

    def _part(self, member: Perturbation) -> tuple[int, int]:
        return member.iteration, part_of_direction(member.direction, self._kind.num_parts)

    def set(self, member: Perturbation | None, *, version: int) -> None:
        """Keep that the working tensors are a member, or the centre, of this version of the master."""
        self._member, self._version = member, version

    def forget(self) -> None:
        """Keep that nothing is known of the working tensors."""
        self._member = self._version = None
