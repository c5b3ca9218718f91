"""When and where weights are gathered for members to be evaluated: what ``rollout.gather`` chooses.

The modes that evaluate members one by one compute the same bits, and so do those of members that share
forwards. They differ in who holds what, and in when ranks have to talk.
"""

import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import nn

from shardes.backends.base import Backend
from shardes.backends.registry import BACKENDS
from shardes.distributed.group import Group, Mesh
from shardes.es.update import Perturbation
from shardes.rollout.lowrank.hooks import LowRankHooks
from shardes.rollout.memory import free_bytes, is_shortage, mode_bytes, reserved_bytes
from shardes.weights.gathered import GatheredWeights
from shardes.weights.master import Weights

logger = logging.getLogger(__name__)

# Values of ``rollout.gather`` for several members in a forward.
BATCHED_GATHERS = ("iteration", "layer")


class GatherMode(ABC):
    """A way to turn perturbed shards into a model that answers.

    Args:
        name: The value of ``rollout.gather``.
        backend: The model.
        weights: Its master weights.
        group: The ranks that load and answer together.

    Attributes:
        name: The value of ``rollout.gather``.
        group: The ranks that load and answer together.
    """

    def __init__(self, name: str, *, backend: Backend, weights: Weights, group: Group) -> None:
        self.name = name
        self.group = group
        self._backend = backend
        self._weights = weights

    @property
    def forward_is_collective(self) -> bool:
        """Return whether the ranks of a replica must call the model equally often."""
        return False

    def reserve(self) -> None:  # noqa: B027 - modes need not hold anything
        """Allocate what the mode holds; no collective."""

    def release(self) -> None:  # noqa: B027
        """Free what ``reserve`` allocated."""

    def begin(self) -> None:  # noqa: B027
        """Do what is done once for all members of an iteration; a collective of a replica's ranks."""

    def load(self, members: Sequence[Perturbation]) -> None:
        """Make a member the one to evaluate.

        Args:
            members: One member; several only where members share forwards.
        """
        (member,) = members
        self._weights.perturb(member)

    def load_centre(self) -> None:
        """Make the centre what is evaluated."""
        self._weights.centre()

    @abstractmethod
    def model(self) -> nn.Module:
        """Return the model to generate with; a collective of ``group``, unless nothing is gathered."""


class LayerGather(GatherMode):
    """Shards are perturbed; the backend gathers layer by layer in every forward."""

    @property
    def forward_is_collective(self) -> bool:
        """Return whether there is anything to gather."""
        return self._backend.is_sharded

    def model(self) -> nn.Module:
        """Return the backend's own model."""
        return self._backend.sharded_model


class MemberGather(GatherMode):
    """Shards are perturbed and gathered once a member, into a whole model on every rank."""

    def reserve(self) -> None:
        """Allocate the whole model."""
        self._backend.reserve()

    def release(self) -> None:
        """Free the whole model."""
        self._backend.release()

    def model(self) -> nn.Module:
        """Gather the whole model anew."""
        return self._backend.gathered()


class IterationGather(GatherMode):
    """The centre is gathered once an iteration; every rank by itself adds members' noise to its copy."""

    def __init__(self, name: str, *, backend: Backend, weights: Weights, group: Group) -> None:
        super().__init__(name, backend=backend, weights=weights, group=group)
        self._gathered = GatheredWeights(backend, weights)

    def reserve(self) -> None:
        """Allocate the whole model and the centre."""
        self._gathered.reserve()

    def release(self) -> None:
        """Free the whole model and the centre."""
        self._gathered.release()
        self._backend.release()

    def begin(self) -> None:
        """Gather the centre, if the weights have changed since the last time."""
        self._gathered.refresh()

    def load(self, members: Sequence[Perturbation]) -> None:
        """Perturb this rank's copy; no collective."""
        (member,) = members
        self._gathered.perturb(member)

    def load_centre(self) -> None:
        """Make this rank's copy the centre; no collective."""
        self._gathered.centre()

    def model(self) -> nn.Module:
        """Return this rank's copy."""
        return self._gathered.model


class BatchedGather(GatherMode):
    """The model stays the centre; members that share forwards are terms added to what its layers compute.

    Args:
        name: ``iteration``: the centre is gathered once an iteration, into a whole model on every rank.
            ``layer``: the backend gathers it, layer by layer, in every forward.
        backend: The model.
        weights: Its master weights.
        group: The ranks that load and answer together.
    """

    def __init__(self, name: str, *, backend: Backend, weights: Weights, group: Group) -> None:
        super().__init__(name, backend=backend, weights=weights, group=group)
        self._gathers_once = name == "iteration"
        self._version: int | None = None
        self._hooks: LowRankHooks | None = None

    @property
    def hooks(self) -> LowRankHooks:
        """Return what computes the members' terms; known once ``begin`` was called."""
        assert self._hooks is not None, "begin comes first"
        return self._hooks

    @property
    def forward_is_collective(self) -> bool:
        """Return whether the centre is gathered in every forward."""
        return self._backend.is_sharded and not self._gathers_once

    def reserve(self) -> None:
        """Allocate the whole model, if there is to be one."""
        if self._gathers_once:
            self._backend.reserve()

    def release(self) -> None:
        """Free the whole model."""
        self._version = None
        if self._gathers_once:
            self._backend.release()

    def begin(self) -> None:
        """Make the model the centre, if the weights have changed since the last time."""
        if self._version == self._weights.version:
            return
        self._weights.centre()
        if self._hooks is None:
            self._hooks = LowRankHooks(self._backend, self._weights)
        self._model = self._backend.gathered() if self._gathers_once else self._backend.sharded_model
        self._version = self._weights.version

    def load(self, members: Sequence[Perturbation]) -> None:
        """Compute the members' low-rank factors; no collective, and no weight is written."""
        self.hooks.load(members)

    def load_centre(self) -> None:
        """Do nothing: the model never is anything but the centre."""

    def model(self) -> nn.Module:
        """Return the centre."""
        return self._model


_MODES = {"layer": LayerGather, "member": MemberGather, "iteration": IterationGather}


class GatherModeSelector:
    """Chooses the gather mode by the memory that is free, and steps down where that runs out.

    Args:
        wanted: The value of ``rollout.gather``.
        is_batched: Whether members share forwards.
        backend: The model.
        weights: Its master weights.
        mesh: The ranks.
    """

    def __init__(
        self, wanted: str, *, is_batched: bool, backend: Backend, weights: Weights, mesh: Mesh
    ) -> None:
        # From the fastest, which takes the most memory, to the one that takes none.
        by_speed = BACKENDS[backend.name].gathers
        if is_batched:
            by_speed = tuple(gather for gather in by_speed if gather in BATCHED_GATHERS)
        self._by_speed = by_speed if wanted == "auto" else ()
        self._is_batched, self._backend, self._weights, self._mesh = is_batched, backend, weights, mesh
        self._is_reserved = False
        self._current = None if self._by_speed else self._make(wanted)

    def _make(self, name: str) -> GatherMode:
        """Return the mode of a name."""
        backend, mesh = self._backend, self._mesh
        mode: Callable[..., GatherMode] = _MODES[name]
        group = mesh.alone if name == "iteration" else mesh.shard
        if self._is_batched:
            mode, group = BatchedGather, mesh.shard if backend.is_sharded and name == "layer" else mesh.alone
        elif mode is IterationGather and not backend.is_sharded:
            mode = MemberGather  # every rank holds a whole model already: it is perturbed where it is
        return mode(name, backend=backend, weights=self._weights, group=group)

    @property
    def current(self) -> GatherMode:
        """Return the mode in use."""
        assert self._current is not None, "choose comes first"
        return self._current

    @property
    def name(self) -> str | None:
        """Return the name of the mode in use; None before ``choose`` where memory decides."""
        return None if self._current is None else self._current.name

    @property
    def can_step_down(self) -> bool:
        """Return whether there is a mode that takes less memory, and it is ours to choose."""
        return bool(self._by_speed) and self.current.name != self._by_speed[-1]

    def choose(self, num_bytes: int) -> None:
        """Choose the mode, if that is still to do, and allocate what it holds; a collective of all ranks.

        Args:
            num_bytes: What a micro-batch takes besides weights.
        """
        if self._current is None:
            self._current = self._make(self._fastest_that_fits(num_bytes))
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
        """Go on with the mode that takes less memory; all ranks must do so at the same place."""
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

    def _fastest_that_fits(self, num_bytes: int) -> str:
        """Return the fastest mode for which every rank has the memory."""
        itemsize = self._backend.dtype.itemsize
        copy = sum(shard.num_elements for shard in self._backend.shards) * itemsize
        centre = sum(shard.num_elements for shard in self._weights.trained) * itemsize
        held = mode_bytes(copy=copy, centre=centre, is_sharded=self._backend.is_sharded)
        if self._is_batched:
            held = {"iteration": copy * self._backend.is_sharded}
        needs = {name: need + num_bytes for name, need in held.items()}
        device = self._backend.device
        reserved = reserved_bytes(device)
        free = self._mesh.world.min(free_bytes(device) - reserved)
        name = next((name for name, need in needs.items() if need <= free), self._by_speed[-1])
        wants = ", ".join(f"{other} needs {_gib(need)}" for other, need in needs.items())
        here = f"{_gib(num_bytes)} of it to generate; {_gib(free)} are free on every rank"
        here += f", besides {_gib(reserved)} that stay free" if reserved else ""
        logger.info("rollout.gather: auto is %s: %s, %s", name, wants, here)
        return name


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
