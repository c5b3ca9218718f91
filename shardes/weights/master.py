"""The master weights of a rank's shards, and what ES does to them.

Only ``update`` writes the master. The centre is the master rounded to the model's dtype: what would be
exported is what is searched around. A perturbed shard is computed from the master into the backend's working
tensor in one pass, so there is nothing to restore and nothing drifts.

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
from shardes.noise import Kind, NoiseKind, Region
from shardes.utils.progress import progress
from shardes.weights.buffers import ShardedBuffers
from shardes.weights.digest import add_digest
from shardes.weights.trainable import select_trainable
from shardes.weights.update_stats import UpdateStats

# Elements of a master in host memory that are on the device at a time: 64 MiB of float32.
CHUNK_ELEMENTS = 1 << 24
# Elements of the gradient that are computed at a time where an optimizer needs it.
STEP_ELEMENTS = 1 << 22


class Source(Protocol):
    """Where elements of parameters can be read from: a checkpoint, or a snapshot."""

    def read(self, name: str, *, region: Region, out: torch.Tensor) -> None:
        """Fills ``out``, flat, with a region's elements of a parameter."""


class Weights:
    """A rank's master shards.

    Args:
        backend: Where the working tensors live.
        seed: The key of the noise.
        kind: Which noise.
        dtype: Of the master. A narrow one is rounded stochastically at every update.
        trainable: Which parameters have a master, see ``EsConfig.trainable``.
        optimizer: What becomes of gradients.
        decay: What pulls at the weights besides; None: nothing.
        on_host: Whether what is kept is kept in host memory, whatever the device.
        chunk_elements: How many elements of a master in host memory pass through the device at a time; None:
            a good number where the two memories are not the same, and no chunks where they are.

    Attributes:
        seed: The same.
        kind: The same.
        trained: The shards that have a master.
        version: Grows whenever the master changes.
        last_update: The one before the next; None before the first.

    Raises:
        UserError: ``trainable`` does not fit the model.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        seed: int,
        kind: Kind = NoiseKind.GAUSSIAN,
        dtype: torch.dtype = torch.float32,
        trainable: Sequence[str] = (".*",),
        optimizer: Optimizer | None = None,
        decay: Decay | None = None,
        on_host: bool = False,
        chunk_elements: int | None = None,
    ) -> None:
        self._backend = backend
        self.seed = seed
        self.kind = kind
        self.version = 0
        self.last_update: Update | None = None
        names = select_trainable([shard.name for shard in backend.shards], trainable, aliases=backend.aliases)
        self.trained = tuple(shard for shard in backend.shards if shard.name in names)
        self._frozen = tuple(shard for shard in backend.shards if shard.name not in names)
        self._dtype = dtype
        self._optimizer = optimizer or PlainStep()
        self._decay = decay
        self._is_plain = self._optimizer.steps_are_gradients and decay is None
        self._is_apart = on_host and backend.device.type != "cpu"
        self._chunk_elements = chunk_elements or (CHUNK_ELEMENTS if self._is_apart else None)
        self._masters = self._keep(dtype)
        self._states: list[
            ShardedBuffers
        ] = []  # made when first needed: not every user of weights updates them
        self._base: Checkpoint | None = None
        self._frozen_digest = 0

    def _keep(self, dtype: torch.dtype) -> ShardedBuffers:
        """Zeros for every trained weight of this rank."""
        return ShardedBuffers(
            self.trained,
            dtype=dtype,
            device=self._backend.device,
            on_host=self._is_apart,
            part_elements=self._chunk_elements,
        )

    def _state_buffers(self) -> list[ShardedBuffers]:
        """What the optimizer keeps."""
        if not self._states:
            self._states = [self._keep(torch.float32) for _ in self._optimizer.state_names]
        return self._states

    def _spans(
        self, shards: Sequence[Shard], *, most_elements: int | None = None
    ) -> Iterator[tuple[Shard, ShardSpan]]:
        """Every run of some shards that this rank owns; in parts if masters pass in chunks, or if wanted."""
        limits = [each for each in (self._chunk_elements, most_elements) if each is not None]
        for shard in shards:
            for span in shard.spans:
                for part in span.parts(min(limits, default=None)):
                    yield shard, part

    def _on_device(self) -> Iterator[tuple[Shard, Region, torch.Tensor, torch.Tensor]]:
        """Every run of the trained shards: where it is, its working elements and its master's.

        The latter are on the device of the former: themselves, or a copy that lasts until the next run.
        """
        for shard, span in self._spans(self.trained):
            yield shard, shard.region(span), span.of(shard.local), self._masters.on_device(shard, span)

    def load(self, checkpoint: Checkpoint) -> None:
        """Reads this rank's elements, and no others, from the file's precision to the master's.

        Raises:
            UserError: The checkpoint does not fit the model.
        """
        self._match(checkpoint)
        self._base, self._states, self.last_update = checkpoint, [], None
        self._read(self._masters, checkpoint)
        frozen = torch.zeros(1, dtype=torch.int64, device=self._backend.device)
        for shard, span in self._spans(self._frozen):
            values, region = span.of(shard.local), shard.region(span)
            checkpoint.read(shard.name, region=region, out=values)
            if not shard.is_copy:
                add_digest(frozen, values, region=region)
        self._frozen_digest = int(frozen.item())
        self.centre()

    def _match(self, checkpoint: Checkpoint) -> None:
        """Has a checkpoint speak of the model's parameters.

        Raises:
            UserError: It does not fit the model.
        """
        shapes = {shard.name: shard.shape for shard in self._backend.shards}
        if self._backend.conversion is not None:
            checkpoint.join(self._backend.conversion.join(checkpoint.tensors), shapes=shapes)
        checkpoint.check_matches(shapes, aliases=self._backend.aliases)

    def load_snapshot(self, source: Source, *, last_update: Update) -> None:
        """Reads this rank's elements of the masters, and of what the optimizer keeps.

        The model does not see them before ``centre``. No collective.

        Args:
            source: Has them under the names of ``owned_tensors``.
            last_update: The one that led to them.
        """
        self._read(self._masters, source)
        for state, view in zip(self._optimizer.state_names, self._state_buffers(), strict=True):
            self._read(view, source, state=state)
        self.last_update = last_update

    def _read(self, view: ShardedBuffers, source: Source, *, state: str | None = None) -> None:
        parts = list(self._spans(self.trained, most_elements=CHUNK_ELEMENTS))
        what = "loading weights" if state is None else f"loading the optimizer's {state}"
        for shard, span in progress(parts, what=what, total=len(parts), unit="parts"):
            source.read(_buffer_name(shard, state), region=shard.region(span), out=view.view(shard, span))
        self.version += 1

    def owned_tensors(self) -> Iterator[tuple[str, Shard, torch.Tensor]]:
        """What this rank keeps: its name, its shard, and the tensor, laid out like it.

        These are the masters, and what the optimizer keeps for each. No element is kept by two ranks.
        """
        states = zip(self._optimizer.state_names, self._state_buffers(), strict=True)
        for state, view in ((None, self._masters), *states):
            for shard in self.trained:
                if shard.spans and not shard.is_copy:
                    yield _buffer_name(shard, state), shard, view.tensors[shard.name]

    @torch.no_grad()
    def perturb(self, perturbation: Perturbation) -> None:
        """Makes the model the centre plus its sigma times its direction's noise."""
        for _, region, working, master in self._on_device():
            noise.perturb(
                master,
                working,
                region=region,
                sigma=perturbation.sigma,
                seed=self.seed,
                iteration=perturbation.iteration,
                direction=perturbation.direction,
                kind=self.kind,
            )
        self._backend.commit()

    @torch.no_grad()
    def centre(self) -> None:
        """Makes the model the centre."""
        for _, _, working, master in self._on_device():
            working.copy_(master)
        self._backend.commit()

    def moves(self, update: Update) -> bool:
        """Whether an update moves the masters at all: one that adds nothing is not applied.

        Adding 0 to a weight that is -0 would change its bits.
        """
        return not self._is_plain or any(update.coefficients)

    @torch.no_grad()
    def update(self, update: Update, *, stats: UpdateStats | None = None) -> None:
        """Moves the masters by what the optimizer makes of ``sum_n coefficients[n] * eps(n)``.

        Args:
            update: The coefficients, and whose noise they are for.
            stats: Takes in what happens, if given; the weights become the same.
        """
        if not self.moves(update):
            self.last_update = update
            return
        # Rounding draws on the iteration, which with noise of another is not the noise's.
        is_fused = self._dtype == torch.float32 or update.noise_of == update.iteration
        if self._is_plain and stats is None and is_fused:
            for shard, span in self._spans(self.trained):
                self._add_noise(self._masters.on_device(shard, span), shard.region(span), update)
                self._masters.write_back(shard, span)
        else:
            states = self._state_buffers()
            for shard, span in self._spans(self.trained, most_elements=STEP_ELEMENTS):
                self._step(shard, span, states, update, stats)
        if self._backend.device.type == "cuda":
            torch.cuda.synchronize(self._backend.device)  # the host may read the masters next
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
        """Moves the masters of some elements by way of the gradient."""
        region, master = shard.region(span), self._masters.on_device(shard, span)
        view = [state.on_device(shard, span) for state in states]
        last_step = base = None
        if stats is not None:
            last_step = self._last_step(region, view)
        if stats is not None or (self._decay is not None and self._decay.is_anchored):
            assert self._base is not None, "weights are loaded before they are updated"
            base = torch.empty_like(master)
            self._base.read(shard.name, region=region, out=base)
        step = self._optimizer.step(
            self._gradient(region, update), view, alpha=update.alpha, number=update.iteration
        )
        if self._decay is not None:
            distance = master.float()
            if self._decay.is_anchored:
                assert base is not None, "it was read"
                distance = distance - base.float()
            step = step - distance * (update.alpha * self._decay.rate)
        before = master.clone() if stats is not None else None
        noise.add(master, step, region=region, seed=self.seed, iteration=update.iteration)
        if stats is not None and not shard.is_copy:
            assert before is not None and base is not None, "they were kept"
            stats.add(step, before=before, after=master, last_step=last_step, base=base)
        for each in (self._masters, *states):
            each.write_back(shard, span)

    def _last_step(self, region: Region, view: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The step before the next, without decay."""
        last = self.last_update
        if last is None:
            return None
        if self._optimizer.steps_are_gradients:
            return self._gradient(region, last)
        step = self._optimizer.last_step(view, alpha=last.alpha, number=last.iteration)
        return None if step is None else step.clone()

    def _gradient(self, region: Region, update: Update) -> torch.Tensor:
        """The ES gradient of some elements, float32."""
        gradient = torch.zeros(region.num_elements, dtype=torch.float32, device=self._backend.device)
        self._add_noise(gradient, region, update)
        return gradient

    def _add_noise(self, target: torch.Tensor, region: Region, update: Update) -> None:
        noise.accumulate(
            target,
            region=region,
            coefficients=update.coefficients,
            directions=range(len(update.coefficients)),
            seed=self.seed,
            iteration=update.noise_of,
            kind=self.kind,
        )

    def could_overflow(self, update: Update) -> bool:
        """Whether an update might make one of this rank's weights infinite, or one is not finite already.

        The bound is on the master's side and on that of the model's dtype, which may be the narrower.
        """
        gradient = math.fsum(map(abs, update.coefficients)) * self.kind.largest
        # Before the first update there are no states, and they would be zeros.
        states = [max(self._magnitudes(state), default=0.0) for state in self._states]
        largest = states or [0.0] * len(self._optimizer.state_names)
        step = self._optimizer.largest_step(gradient, largest, alpha=update.alpha)
        limit = min(torch.finfo(self._backend.dtype).max, torch.finfo(self._dtype).max)
        # What is compared with NaN is not smaller.
        return not all(magnitude + step < limit for magnitude in self._magnitudes(self._masters))

    def _magnitudes(self, view: ShardedBuffers) -> Iterator[float]:
        """The largest magnitude in each run of this rank; NaN where there is one."""
        for shard, span in self._spans(self.trained):
            low, high = torch.aminmax(view.view(shard, span))
            yield max(float(high), -float(low))

    def states_digest(self) -> int:
        """This rank's part of the digest of what the optimizer keeps; the whole is the sum over ranks."""
        total = 0
        for number, state in enumerate(self._state_buffers(), start=1):
            part = torch.zeros(1, dtype=torch.int64, device=self._backend.device)
            for shard, span in self._spans(self.trained):
                if not shard.is_copy:
                    add_digest(part, state.on_device(shard, span), region=shard.region(span))
            total += number * int(part.item())
        return total & 0xFFFFFFFFFFFFFFFF

    def digest(self, *, is_rounded: bool = False) -> int:
        """This rank's part of the weights digest; the whole is the sum over ranks modulo 2**64.

        Args:
            is_rounded: Of the centre, what an export holds, instead of the master.
        """
        total = torch.zeros(1, dtype=torch.int64, device=self._backend.device)
        for shard, region, _, master in self._on_device():
            if not shard.is_copy:
                values = master.to(self._backend.dtype) if is_rounded else master
                add_digest(total, values, region=region)
        return (int(total.item()) + self._frozen_digest) & 0xFFFFFFFFFFFFFFFF

    def gather_centre(self, shard: Shard, *, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """One whole parameter of the centre, on rank 0; None elsewhere. A collective.

        Args:
            shard: Which.
            dtype: What the master is rounded to; None: the model's.
        """
        master, dtype = self._masters.tensors.get(shard.name), dtype or self._backend.dtype
        values = shard.local.to(dtype) if master is None else master.to(dtype).to(self._backend.device)
        return self._backend.gather_parameter(shard, values)

    def stored_as(self, shard: Shard) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the base model's file tensors that make up a parameter, in its order."""
        return [(shard.name, shard.shape)] if self._base is None else self._base.pieces_of(shard.name)

    def digest_of(self, checkpoint: Checkpoint) -> int:
        """This rank's part of the digest of an export's weights: what ``digest(is_rounded=True)`` must be.

        Raises:
            UserError: The checkpoint does not fit the model, or its weights have another dtype.
        """
        self._match(checkpoint)
        for name, found in checkpoint.tensors.items():
            for stored, *_ in found.find(0, 1):
                if stored.dtype != self._backend.dtype:
                    raise UserError(f"{name} is stored as {stored.dtype}; wanted {self._backend.dtype}")
        total = torch.zeros(1, dtype=torch.int64, device=self._backend.device)
        for shard in self._backend.shards:
            for span in () if shard.is_copy else shard.spans:
                for part in span.parts(CHUNK_ELEMENTS):
                    region = shard.region(part)
                    values = torch.empty(
                        part.num_elements, dtype=self._backend.dtype, device=self._backend.device
                    )
                    checkpoint.read(shard.name, region=region, out=values)
                    add_digest(total, values, region=region)
        return int(total.item()) & 0xFFFFFFFFFFFFFFFF


def _buffer_name(shard: Shard, state: str | None) -> str:
    """What a master, or a state of the optimizer, is called in snapshots."""
    return shard.name if state is None else f"{shard.name}#{state}"
