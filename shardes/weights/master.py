"""The master weights of a rank's shards: load, perturb, centre and update.

Only ``update`` writes the master. The centre is the master rounded to the model's dtype: what would be
exported is what is searched around. A perturbed shard is computed from the master into the backend's working
tensor in one pass, so nothing drifts. Where a member's noise covers a part of the parameters, only that part
and the last member's are written (``loaded_member``).

Frozen parameters have no master: their working tensors are read from the file, and nothing writes them again.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from shardes import noise
from shardes.backends.base import Backend
from shardes.backends.shard import Shard, ShardSpan
from shardes.errors import UserError
from shardes.es.optimizers import Decay, Optimizer, PlainStep
from shardes.es.update import Perturbation, Update
from shardes.models.checkpoint import Checkpoint
from shardes.noise import GAUSSIAN, NoiseKind, Region
from shardes.utils.device import synchronize
from shardes.utils.progress import progress
from shardes.weights.buffers import ShardedBuffers, buffer_name
from shardes.weights.digest import add_digest
from shardes.weights.loaded_member import LoadedMember
from shardes.weights.trainable import select_trainable
from shardes.weights.update_stats import UpdateStats

# Elements of a master in host memory that are on the device at a time: 64 MiB of float32.
CHUNK_ELEMENTS = 1 << 24
# Elements of the gradient that are computed at a time where an optimizer needs it.
STEP_ELEMENTS = 1 << 22


class Source(Protocol):
    """A checkpoint or a snapshot, from which ranges of elements are read."""

    def read(self, name: str, *, region: Region, out: torch.Tensor) -> None:
        """Fill ``out``, flat, with a region's elements of the parameter ``name``."""


class Weights:
    """The master shards of a rank.

    Attributes are for reading; snapshots, digests and exports (``snapshot_view``, ``master_digest``,
    ``export_view``) are functions over them.

    Args:
        backend: The engine that holds the working tensors.
        seed: Key of the noise, below 2**64.
        kind: Kind of noise.
        dtype: Dtype of the master. float32 adds updates as they are; bfloat16 and float16 are rounded
            stochastically at every update.
        trainable: Patterns of the parameters that have a master, see ``EsConfig.trainable``.
        optimizer: Rule that turns gradients into steps; None: the step is the gradient.
        decay: Weight decay; None: none.
        on_host: Whether masters and optimizer states are kept in host memory, whatever the device.
        chunk_elements: Number of elements of a master in host memory that pass through the device at a time;
            None: ``CHUNK_ELEMENTS`` where the two memories differ, and no chunks where they are the same.

    Attributes:
        backend: The engine that holds the working tensors.
        seed: Key of the noise.
        kind: Kind of noise.
        dtype: Dtype of the master.
        optimizer: Rule that turns gradients into steps.
        trained: Shards that have a master.
        frozen: Shards that have none.
        masters: The master of every trained shard.
        base: Checkpoint that was loaded; None before ``load``.
        frozen_digest: This rank's part of the digest of the frozen shards, modulo 2**64.
        version: Number that grows whenever the master changes.
        last_update: Update that was applied last; None before the first.

    Raises:
        UserError: ``trainable`` does not fit the model.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        seed: int,
        kind: NoiseKind = GAUSSIAN,
        dtype: torch.dtype = torch.float32,
        trainable: Sequence[str] = (".*",),
        optimizer: Optimizer | None = None,
        decay: Decay | None = None,
        on_host: bool = False,
        chunk_elements: int | None = None,
    ) -> None:
        self.backend = backend
        self.seed = seed
        self.kind = kind
        self.version = 0
        self._loaded = LoadedMember(seed, kind)
        self.last_update: Update | None = None
        names = select_trainable([shard.name for shard in backend.shards], trainable, aliases=backend.aliases)
        self.trained = tuple(shard for shard in backend.shards if shard.name in names)
        self.frozen = tuple(shard for shard in backend.shards if shard.name not in names)
        self.dtype = dtype
        self.optimizer = optimizer or PlainStep()
        self._decay = decay
        self._is_plain = self.optimizer.steps_are_gradients and decay is None
        self._is_offloaded = on_host and backend.device.type != "cpu"
        self._chunk_elements = chunk_elements or (CHUNK_ELEMENTS if self._is_offloaded else None)
        self.masters = self._allocate(dtype)
        # Allocated when first needed: not every user of weights updates them.
        self._states: list[ShardedBuffers] = []
        self.base: Checkpoint | None = None
        self.frozen_digest = 0

    def _allocate(self, dtype: torch.dtype) -> ShardedBuffers:
        """Return zeros for every trained weight of this rank."""
        return ShardedBuffers(
            self.trained,
            dtype=dtype,
            device=self.backend.device,
            on_host=self._is_offloaded,
            part_elements=self._chunk_elements,
        )

    def state_buffers(self) -> list[ShardedBuffers]:
        """Return the optimizer's states, float32, allocated as zeros at the first call."""
        if not self._states:
            self._states = [self._allocate(torch.float32) for _ in self.optimizer.state_names]
        return self._states

    def spans(
        self, shards: Sequence[Shard], *, most_elements: int | None = None
    ) -> Iterator[tuple[Shard, ShardSpan]]:
        """Yield every span of ``shards`` that this rank owns, in parts of at most one chunk.

        Args:
            shards: Shards to walk over, in this order.
            most_elements: Further limit on the elements of a part; None: no limit.
        """
        limits = [each for each in (self._chunk_elements, most_elements) if each is not None]
        for shard in shards:
            for span in shard.spans:
                for part in span.parts(min(limits, default=None)):
                    yield shard, part

    def on_device(self) -> Iterator[tuple[Shard, Region, torch.Tensor, torch.Tensor]]:
        """Yield every span of the trained shards: shard, region, working elements and master elements.

        The last are on the backend's device: the master itself, or a copy that lasts until the next span.
        """
        for shard, span in self.spans(self.trained):
            yield shard, shard.region(span), span.of(shard.local), self.masters.on_device(shard, span)

    def load(self, checkpoint: Checkpoint) -> None:
        """Read this rank's elements in the master's dtype, and set the model to the centre.

        Raises:
            UserError: The checkpoint does not fit the model, or the model had been loaded with other weights.
        """
        self.match_checkpoint(checkpoint)
        is_compared = self.backend.is_preloaded and self.base is None
        self.base, self._states, self.last_update = checkpoint, [], None
        self.read_buffers(self.masters, checkpoint)
        frozen = torch.zeros(1, dtype=torch.int64, device=self.backend.device)
        for shard, span in self.spans(self.frozen):
            values, region = span.of(shard.local), shard.region(span)
            before = values.clone() if is_compared else values
            checkpoint.read(shard.name, region=region, out=values)
            if is_compared:
                _check_same(shard, before, values)
            if not shard.is_copy:
                add_digest(frozen, values, region=region)
        self.frozen_digest = int(frozen.item())
        for shard, _, working, master in self.on_device() if is_compared else ():
            _check_same(shard, working, master.to(working.dtype))
        self.centre()

    def match_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Name a checkpoint's tensors as the model's parameters, joined where the model joins them.

        Raises:
            UserError: The checkpoint does not fit the model.
        """
        shapes = {shard.name: shard.shape for shard in self.backend.shards}
        if self.backend.conversion is not None:
            self.backend.conversion.apply(checkpoint, shapes=shapes)
        checkpoint.check_matches(shapes, aliases=self.backend.aliases)

    def read_buffers(self, buffers: ShardedBuffers, source: Source, *, state: str | None = None) -> None:
        """Read this rank's elements of ``buffers`` from ``source``; no collective.

        Args:
            buffers: The masters, or an optimizer state.
            source: File that has them under the names of ``buffer_name``.
            state: Name of the optimizer state; None for the masters.
        """
        synchronize(self.backend.device)  # copies from host memory, which is written here, may be queued
        parts = list(self.spans(self.trained, most_elements=CHUNK_ELEMENTS))
        what = "loading weights" if state is None else f"loading the optimizer's {state}"
        for shard, span in progress(parts, what=what, total=len(parts), unit="parts"):
            source.read(buffer_name(shard, state), region=shard.region(span), out=buffers.view(shard, span))
        self.version += 1

    @torch.no_grad()
    def perturb(self, perturbation: Perturbation) -> None:
        """Set the model to the centre plus the perturbation's sigma times its direction's noise."""
        change = self._loaded.next(perturbation, version=self.version)
        for _, region, working, master in self.on_device():
            change.write(region, source=master, target=working)
        self._loaded.set(perturbation, version=self.version)
        self.backend.commit()

    @torch.no_grad()
    def centre(self) -> None:
        """Set the model to the centre."""
        self._loaded.forget()
        for _, _, working, master in self.on_device():
            working.copy_(master)
        self._loaded.set(None, version=self.version)
        self.backend.commit()

    def moves(self, update: Update) -> bool:
        """Return whether an update changes the masters at all; one that adds nothing is not applied.

        Adding 0 to a weight that is -0 would change its bits.
        """
        return not self._is_plain or any(any(coefficients) for _, coefficients in update.terms)

    @torch.no_grad()
    def update(self, update: Update, *, stats: UpdateStats | None = None) -> None:
        """Add the optimizer's step for the gradient, the sum of the update's noise, to the masters.

        Args:
            update: Coefficients, and the iterations whose noise they belong to.
            stats: Sums to add the update's norms to; None: none. They do not change the weights.
        """
        if not self.moves(update):
            self.last_update = update
            return
        # Rounding draws on the iteration, which with noise of another is not the noise's.
        is_fused = self.dtype == torch.float32 or update.noise_of == update.iteration
        is_fused = is_fused and len(update.terms) == 1  # or the master would be rounded after each
        if self._is_plain and stats is None and is_fused:
            for shard, span in self.spans(self.trained):
                self._add_noise(self.masters.on_device(shard, span), shard.region(span), update)
                self.masters.write_back(shard, span)
        else:
            states = self.state_buffers()
            for shard, span in self.spans(self.trained, most_elements=STEP_ELEMENTS):
                self._step(shard, span, states, update, stats)
        synchronize(self.backend.device)  # the host may read the masters next
        self.last_update = update
        self.version += 1

    def _step(
        self,
        shard: Shard,
        span: ShardSpan,
        states: Sequence[ShardedBuffers],
        update: Update,
        stats: UpdateStats | None,
    ) -> None:
        """Add the optimizer's step for a materialised gradient to one span of the masters."""
        region, master = shard.region(span), self.masters.on_device(shard, span)
        state_parts = [state.on_device(shard, span) for state in states]
        last_step = base = None
        if stats is not None:
            last_step = self._last_step(region, state_parts)
        if stats is not None or (self._decay is not None and self._decay.is_anchored):
            assert self.base is not None, "weights are loaded before they are updated"
            base = torch.empty_like(master)
            self.base.read(shard.name, region=region, out=base)
        step = self.optimizer.step(
            self.gradient(region, update), state_parts, alpha=update.alpha, number=update.iteration
        )
        if self._decay is not None:
            step = self._decay.added(step, master=master, base=base, alpha=update.alpha)
        before = master.clone() if stats is not None else None
        noise.add(master, step, region=region, seed=self.seed, iteration=update.iteration)
        if stats is not None and not shard.is_copy:
            assert before is not None and base is not None, "they were kept"
            stats.add(step, before=before, after=master, last_step=last_step, base=base)
        for each in (self.masters, *states):
            each.write_back(shard, span)

    def _last_step(self, region: Region, state_parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return the last update's step for some elements, without decay; None before the first update."""
        last = self.last_update
        if last is None:
            return None
        if self.optimizer.steps_are_gradients:
            return self.gradient(region, last)
        step = self.optimizer.last_step(state_parts, alpha=last.alpha, number=last.iteration)
        return None if step is None else step.clone()

    def gradient(self, region: Region, update: Update) -> torch.Tensor:
        """Return the ES gradient of a region's elements: float32, flat, on the backend's device."""
        gradient = torch.zeros(region.num_elements, dtype=torch.float32, device=self.backend.device)
        self._add_noise(gradient, region, update)
        return gradient

    def _add_noise(self, target: torch.Tensor, region: Region, update: Update) -> None:
        """Add the update's weighted sums of noise to ``target``, one after another."""
        for iteration, coefficients in update.terms:
            noise.accumulate(
                target,
                region=region,
                coefficients=coefficients,
                directions=range(len(coefficients)),
                seed=self.seed,
                iteration=iteration,
                kind=self.kind,
            )

    def could_overflow(self, update: Update) -> bool:
        """Return whether an update might make one of this rank's weights infinite, or one is not finite now.

        The limit is the smaller of the largest finite numbers of the master's and the model's dtype.
        """
        gradient = math.fsum(abs(c) for _, terms in update.terms for c in terms) * self.kind.largest
        # Before the first update there are no states, and they would be zeros.
        states = [max(self._magnitudes(state), default=0.0) for state in self._states]
        largest = states or [0.0] * len(self.optimizer.state_names)
        step = self.optimizer.largest_step(gradient, largest, alpha=update.alpha)
        limit = min(torch.finfo(self.backend.dtype).max, torch.finfo(self.dtype).max)
        # Comparing with NaN is false, which counts as an overflow.
        return not all(magnitude + step < limit for magnitude in self._magnitudes(self.masters))

    def _magnitudes(self, buffers: ShardedBuffers) -> Iterator[float]:
        """Yield the largest magnitude in each span of this rank; NaN where there is one."""
        for shard, span in self.spans(self.trained):
            low, high = torch.aminmax(buffers.view(shard, span))
            yield max(float(high), -float(low))


def _check_same(shard: Shard, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Check that a backend that had loaded the weights itself holds the elements that were read, bit for bit.

    Raises:
        UserError: It does not, so that it has changed or moved them.
    """
    dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    num_different = int((found.view(dtype) != wanted.view(dtype)).sum())
    if num_different:
        raise UserError(
            f"parallel.backend: {num_different} of {found.numel()} elements of {shard.name} are others "
            "where the backend has loaded the model than in the files: it keeps them packed, or in "
            "another order, so that they cannot be perturbed in place; set parallel.backend: fsdp or zero3"
        )
