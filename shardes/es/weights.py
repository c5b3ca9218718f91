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
from shardes.checkpoint import Checkpoint
from shardes.errors import UserError
from shardes.es.digest import add_digest
from shardes.es.selection import select_trainable
from shardes.noise import Kind, NoiseKind, Region
from shardes.shards import Run, Shard

# Elements of a master in host memory that are on the device at a time: 64 MiB of float32.
CHUNK_ELEMENTS = 1 << 24


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
        on_host: Whether the masters are kept in host memory, whatever the device.
        chunk_elements: How many elements of a master in host memory pass through the device at a time; None:
            a good number where the two memories are not the same, and no chunks where they are.

    Attributes:
        seed: The same.
        kind: The same.
        trained: The shards that have a master.
        version: Grows whenever the master changes.

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
        on_host: bool = False,
        chunk_elements: int | None = None,
    ) -> None:
        self._backend = backend
        self.seed = seed
        self.kind = kind
        self.version = 0
        names = select_trainable([shard.name for shard in backend.shards], trainable, aliases=backend.aliases)
        self.trained = tuple(shard for shard in backend.shards if shard.name in names)
        self._frozen = tuple(shard for shard in backend.shards if shard.name not in names)
        is_apart = on_host and backend.device.type != "cpu"
        self._masters = {
            shard.name: torch.zeros(
                shard.local.shape,
                dtype=dtype,
                device="cpu" if is_apart else shard.local.device,
                pin_memory=is_apart,
            )
            for shard in self.trained
        }
        self._chunk_elements = chunk_elements or (CHUNK_ELEMENTS if is_apart else None)
        self._chunk = torch.empty(self._chunk_elements or 0, dtype=dtype, device=backend.device)
        self._frozen_digest = 0

    def _runs(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Run]]:
        """Every run of some shards that this rank owns; parts of runs if masters pass in chunks."""
        for shard in shards:
            for run in shard.runs:
                for part in run.parts(self._chunk_elements):
                    yield shard, part

    def _on_device(
        self, *, writes: bool = False
    ) -> Iterator[tuple[Shard, Region, torch.Tensor, torch.Tensor]]:
        """Every run of the trained shards: where it is, its working elements and its master's.

        The latter are on the device of the former: themselves, or a copy that lasts until the next run and,
        if ``writes``, is then written back.
        """
        for shard, run in self._runs(self.trained):
            kept = run.of(self._masters[shard.name])
            master = kept
            if self._chunk_elements is not None:
                master = self._chunk[: run.num_elements].copy_(kept, non_blocking=True)
            yield shard, shard.region(run), run.of(shard.local), master
            if writes and master is not kept:
                kept.copy_(master, non_blocking=True)

    def load(self, checkpoint: Checkpoint) -> None:
        """Reads this rank's elements, and no others, from the file's precision to the master's.

        Raises:
            UserError: The checkpoint does not fit the model.
        """
        shapes = {shard.name: shard.shape for shard in self._backend.shards}
        if self._backend.conversion is not None:
            checkpoint.join(self._backend.conversion.join(checkpoint.tensors), shapes=shapes)
        checkpoint.check_matches(shapes, aliases=self._backend.aliases)
        self.load_masters(checkpoint)
        frozen = torch.zeros(1, dtype=torch.int64, device=self._backend.device)
        for shard, run in self._runs(self._frozen):
            values, region = run.of(shard.local), shard.region(run)
            checkpoint.read(shard.name, region=region, out=values)
            if not shard.is_copy:
                add_digest(frozen, values, region=region)
        self._frozen_digest = int(frozen.item())
        self.centre()

    def load_masters(self, source: Source) -> None:
        """Reads this rank's elements of the trained parameters, at the source's precision, into the masters.

        The model does not see them before ``centre``. No collective.
        """
        for shard in self.trained:
            for run in shard.runs:
                for part in run.parts(CHUNK_ELEMENTS):
                    source.read(shard.name, region=shard.region(part), out=part.of(self._masters[shard.name]))
        self.version += 1

    def owned_masters(self) -> Iterator[tuple[Shard, torch.Tensor]]:
        """The masters that this rank keeps, laid out like their shards; no element is kept by two ranks."""
        for shard in self.trained:
            if shard.runs and not shard.is_copy:
                yield shard, self._masters[shard.name]

    @torch.no_grad()
    def perturb(self, *, iteration: int, direction: int, sigma: float) -> None:
        """Makes the model the centre plus ``sigma`` times the direction's noise."""
        for _, region, working, master in self._on_device():
            noise.perturb(
                master,
                working,
                region=region,
                sigma=sigma,
                seed=self.seed,
                iteration=iteration,
                direction=direction,
                kind=self.kind,
            )
        self._backend.commit()

    @torch.no_grad()
    def centre(self) -> None:
        """Makes the model the centre."""
        for _, _, working, master in self._on_device():
            working.copy_(master)
        self._backend.commit()

    @torch.no_grad()
    def update(self, *, iteration: int, directions: Sequence[int], coefficients: Sequence[float]) -> None:
        """Moves the master: ``master += sum_n coefficients[n] * eps(directions[n])``; not if all are 0."""
        if not any(coefficients):
            return
        for _, region, _, master in self._on_device(writes=True):
            noise.accumulate(
                master,
                region=region,
                coefficients=coefficients,
                directions=directions,
                seed=self.seed,
                iteration=iteration,
                kind=self.kind,
            )
        if self._chunk.device.type == "cuda":
            torch.cuda.synchronize(self._chunk.device)  # the host may read the masters next
        self.version += 1

    def could_overflow(self, coefficients: Sequence[float]) -> bool:
        """Whether an update might make one of this rank's weights infinite, or one is not finite already.

        The bound is on the master's side and on that of the model's dtype, which may be the narrower.
        """
        step = math.fsum(map(abs, coefficients)) * self.kind.largest
        limit = torch.finfo(self._backend.dtype).max
        for master in (run.of(self._masters[shard.name]) for shard, run in self._runs(self.trained)):
            low, high = torch.aminmax(master)
            # A NaN in the master is one in both; what is compared with NaN is not smaller.
            if not max(float(high), -float(low)) + step < min(limit, torch.finfo(master.dtype).max):
                return True
        return False

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

    def gather_centre(self, shard: Shard) -> torch.Tensor | None:
        """One whole parameter of the centre, on rank 0; None elsewhere. A collective."""
        master = self._masters.get(shard.name)
        values = shard.local if master is None else master.to(self._backend.dtype).to(self._backend.device)
        return self._backend.gather_parameter(shard, values)

    def digest_of(self, checkpoint: Checkpoint) -> int:
        """This rank's part of the digest of an export's weights: what ``digest(is_rounded=True)`` must be.

        Raises:
            UserError: The checkpoint does not fit the model, or its weights have another dtype.
        """
        shapes = {shard.name: shard.shape for shard in self._backend.shards}
        checkpoint.check_matches(shapes, aliases=self._backend.aliases)
        for name, found in checkpoint.tensors.items():
            for stored, *_ in found.find(0, 1):
                if stored.dtype != self._backend.dtype:
                    raise UserError(f"{name} is stored as {stored.dtype}; wanted {self._backend.dtype}")
        total = torch.zeros(1, dtype=torch.int64, device=self._backend.device)
        for shard in self._backend.shards:
            for run in () if shard.is_copy else shard.runs:
                for part in run.parts(CHUNK_ELEMENTS):
                    region = shard.region(part)
                    values = torch.empty(
                        part.num_elements, dtype=self._backend.dtype, device=self._backend.device
                    )
                    checkpoint.read(shard.name, region=region, out=values)
                    add_digest(total, values, region=region)
        return int(total.item()) & 0xFFFFFFFFFFFFFFFF
