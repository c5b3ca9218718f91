"""How a member's weights become a model that answers: what ``rollout.gather`` chooses.

The modes that evaluate members one by one compute the same bits, and so do the batched ones. They differ in
who holds what, and in when ranks have to talk.
"""

import gc
import logging
from abc import ABC, abstractmethod

import torch
from torch import nn

from shardes.backends.base import Backend
from shardes.distributed.group import Group, Mesh
from shardes.es.update import Perturbation
from shardes.rollout.lowrank.hooks import LowRankHooks
from shardes.rollout.memory import free_bytes, is_shortage, mode_bytes
from shardes.weights.gathered import GatheredWeights
from shardes.weights.master import Weights

logger = logging.getLogger(__name__)

# What ``auto`` chooses from, for members one by one and for several in a forward: the fastest, which takes
# the most memory, to the one that takes none.
_BY_SPEED = ("iteration", "member", "layer")
_BY_SPEED_BATCHED = ("iteration", "layer")


class GatherMode(ABC):
    """A way to evaluate a member.

    Args:
        name: As in ``rollout.gather``.
        backend: The model.
        weights: Its weights.
        team: The ranks that evaluate one member together.

    Attributes:
        name: The same.
        team: The same.
    """

    def __init__(self, name: str, *, backend: Backend, weights: Weights, team: Group) -> None:
        self.name = name
        self.team = team
        self._backend = backend
        self._weights = weights

    @property
    def forward_is_collective(self) -> bool:
        """Whether the ranks of a replica must call the model equally often."""
        return False

    def reserve(self) -> None:  # noqa: B027 - modes need not hold anything
        """Allocates what the mode holds; no collective."""

    def release(self) -> None:  # noqa: B027
        """Frees it."""

    def begin(self) -> None:  # noqa: B027
        """What is done once for all members of an iteration; a collective of the ranks of a replica."""

    def perturb(self, perturbation: Perturbation) -> None:
        """Makes the member ``direction`` the one to evaluate."""
        self._weights.perturb(perturbation)

    def centre(self) -> None:
        """Makes the centre the one to evaluate."""
        self._weights.centre()

    @abstractmethod
    def model(self) -> nn.Module:
        """The model to generate with; a collective of the team, unless there is nothing to gather."""


class LayerGather(GatherMode):
    """Shards are perturbed; the engine gathers, layer by layer, in every forward."""

    @property
    def forward_is_collective(self) -> bool:
        """Where a forward is a collective."""
        return self._backend.is_sharded

    def model(self) -> nn.Module:
        """The engine's own."""
        return self._backend.sharded_model


class MemberGather(GatherMode):
    """Shards are perturbed and gathered once a member, into a whole model on every rank."""

    def reserve(self) -> None:
        """The whole model."""
        self._backend.reserve()

    def release(self) -> None:
        """The whole model."""
        self._backend.release()

    def model(self) -> nn.Module:
        """The whole model, gathered anew."""
        return self._backend.gathered()


class IterationGather(GatherMode):
    """The centre is gathered once an iteration; every rank by itself adds members' noise to a copy of it."""

    def __init__(self, name: str, *, backend: Backend, weights: Weights, team: Group) -> None:
        super().__init__(name, backend=backend, weights=weights, team=team)
        self._whole = GatheredWeights(backend, weights)

    def reserve(self) -> None:
        """The whole model and the centre."""
        self._whole.reserve()

    def release(self) -> None:
        """Both."""
        self._whole.release()
        self._backend.release()

    def begin(self) -> None:
        """Gathers the centre."""
        self._whole.refresh()

    def perturb(self, perturbation: Perturbation) -> None:
        """Perturbs this rank's copy; no collective."""
        self._whole.perturb(perturbation)

    def centre(self) -> None:
        """Makes this rank's copy the centre; no collective."""
        self._whole.centre()

    def model(self) -> nn.Module:
        """This rank's copy."""
        return self._whole.model


class BatchedGather(GatherMode):
    """The model stays the centre; many members at a time are terms added to what its layers compute.

    Args:
        name: ``iteration``: the centre is gathered once an iteration, into a whole model on every rank.
            ``layer``: the backend gathers it, layer by layer, in every forward.
        backend: The model.
        weights: Its weights.
        team: The ranks that evaluate one chunk of members together.

    Attributes:
        terms: The members.
    """

    def __init__(self, name: str, *, backend: Backend, weights: Weights, team: Group) -> None:
        super().__init__(name, backend=backend, weights=weights, team=team)
        self._gathers = name == "iteration"
        self._version: int | None = None
        self._terms: LowRankHooks | None = None

    @property
    def hooks(self) -> LowRankHooks:
        """Known once ``begin`` was called."""
        assert self._terms is not None, "begin comes first"
        return self._terms

    @property
    def forward_is_collective(self) -> bool:
        """Where a forward is a collective."""
        return self._backend.is_sharded and not self._gathers

    def reserve(self) -> None:
        """The whole model, if there is to be one."""
        if self._gathers:
            self._backend.reserve()

    def release(self) -> None:
        """The same."""
        self._version = None
        if self._gathers:
            self._backend.release()

    def begin(self) -> None:
        """Makes the model the centre, if the weights have changed since the last time."""
        if self._version == self._weights.version:
            return
        self._weights.centre()
        if self._terms is None:
            self._terms = LowRankHooks(self._backend, self._weights)
        self._model = self._backend.gathered() if self._gathers else self._backend.sharded_model
        self._version = self._weights.version

    def perturb(self, perturbation: Perturbation) -> None:
        """Nothing: members are given to the terms."""

    def centre(self) -> None:
        """Nothing: the model never is anything else."""

    def model(self) -> nn.Module:
        """The centre."""
        return self._model


def make_mode(name: str, *, is_batched: bool, backend: Backend, weights: Weights, mesh: Mesh) -> GatherMode:
    """The mode of a name, ``auto`` excepted."""
    if is_batched:
        team = mesh.shard if backend.needs_same_batch else mesh.alone
        return BatchedGather(name, backend=backend, weights=weights, team=team)
    if name == "layer":
        return LayerGather(name, backend=backend, weights=weights, team=mesh.shard)
    if name == "member":
        return MemberGather(name, backend=backend, weights=weights, team=mesh.shard)
    if backend.is_sharded:
        return IterationGather(name, backend=backend, weights=weights, team=mesh.alone)
    # Every rank holds a whole model already: it is perturbed where it is.
    return MemberGather(name, backend=backend, weights=weights, team=mesh.alone)


class GatherModeSelector:
    """The mode in use, and, where memory decides, which one that is.

    Args:
        wanted: The value of ``rollout.gather``.
        is_batched: Whether several members share a forward.
        backend: The model.
        weights: Its weights.
        mesh: The ranks.
    """

    def __init__(
        self, wanted: str, *, is_batched: bool, backend: Backend, weights: Weights, mesh: Mesh
    ) -> None:
        by_speed: tuple[str, ...] = _BY_SPEED_BATCHED if is_batched else _BY_SPEED
        self._by_speed = by_speed if wanted == "auto" else ()
        self._is_batched = is_batched
        self._backend = backend
        self._weights = weights
        self._mesh = mesh
        self._is_reserved = False
        self._current = None if self._by_speed else self._make(wanted)

    def _make(self, name: str) -> GatherMode:
        return make_mode(
            name,
            is_batched=self._is_batched,
            backend=self._backend,
            weights=self._weights,
            mesh=self._mesh,
        )

    @property
    def current(self) -> GatherMode:
        """The mode in use."""
        assert self._current is not None, "settle comes first"
        return self._current

    @property
    def name(self) -> str | None:
        """Its name; None before ``choose`` where memory decides."""
        return None if self._current is None else self._current.name

    @property
    def are_batched(self) -> bool:
        """Whether members are evaluated many at a time."""
        return self._is_batched

    @property
    def can_step_down(self) -> bool:
        """Whether there is a mode that takes less memory, and it is ours to choose."""
        return bool(self._by_speed) and self.current.name != self._by_speed[-1]

    def choose(self, generation_bytes: int) -> None:
        """Chooses the mode, if that is still to do, and allocates what it holds; a collective of all ranks.

        Args:
            generation_bytes: What a micro-batch takes besides weights.
        """
        if self._current is None:
            self._current = self._make(self._choose(generation_bytes))
        while not self._is_reserved:
            try:
                self.current.reserve()
                is_short = False
            except (RuntimeError, MemoryError) as error:
                if not (self.can_step_down and is_shortage(error)):
                    raise
                is_short = True
            if self.can_step_down and self._mesh.world.any(is_short):
                self.step_down()
            else:
                self._is_reserved = True

    def step_down(self) -> None:
        """Goes on with the mode that takes less memory; all ranks must do so at the same place."""
        old = self.current
        old.release()
        self._is_reserved = False
        self._current = self._make(self._by_speed[self._by_speed.index(old.name) + 1])
        gc.collect()
        if self._backend.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._mesh.world.is_main:
            logger.warning(
                "memory ran out with rollout.gather %s, so this run goes on with %s; a smaller "
                "rollout.micro_batch_size might keep the faster mode",
                old.name,
                self._current.name,
            )

    def _choose(self, generation_bytes: int) -> str:
        """The fastest mode for which every rank has the memory."""
        itemsize = self._backend.dtype.itemsize
        copy = sum(shard.num_elements for shard in self._backend.shards) * itemsize
        centre = sum(shard.num_elements for shard in self._weights.trained) * itemsize
        held = mode_bytes(copy=copy, centre=centre, is_sharded=self._backend.is_sharded)
        if self._is_batched:
            held = {"iteration": copy * self._backend.is_sharded}
        needs = {name: need + generation_bytes for name, need in held.items()}
        free = self._mesh.world.min(free_bytes(self._backend.device))
        name = next((name for name, need in needs.items() if need <= free), self._by_speed[-1])
        wants = ", ".join(f"{other} needs {_gib(need)}" for other, need in needs.items())
        here = f"{_gib(generation_bytes)} of it to generate; {_gib(free)} are free on every rank"
        logger.info("rollout.gather: auto is %s: %s, %s", name, wants, here)
        return name


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
