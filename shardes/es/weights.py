"""The master weights of a rank's shards, and what ES does to them.

Only ``update`` writes the master. The centre is the master rounded to the model's dtype: what would be
exported is what is searched around. A perturbed shard is computed from the master into the backend's working
tensor in one pass, so there is nothing to restore and nothing drifts.
"""

from collections.abc import Iterator, Sequence

import torch

from shardes import noise
from shardes.backends.base import Backend
from shardes.checkpoint import Checkpoint
from shardes.es.digest import add_digest
from shardes.noise import NoiseKind
from shardes.shards import Run, Shard


class Weights:
    """A rank's master shards.

    Args:
        backend: Where the working tensors live.
        seed: The key of the noise.
        kind: Which noise.
        dtype: Of the master. A narrow one is rounded stochastically at every update.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        seed: int,
        kind: NoiseKind = NoiseKind.GAUSSIAN,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._backend = backend
        self._seed = seed
        self._kind = kind
        self._masters = {
            shard.name: torch.zeros(shard.local.shape, dtype=dtype, device=shard.local.device)
            for shard in backend.shards
        }

    def _runs(self) -> Iterator[tuple[Shard, Run, torch.Tensor]]:
        """Every run that this rank owns, with its master elements."""
        for shard in self._backend.shards:
            for run in shard.runs:
                yield shard, run, run.of(self._masters[shard.name])

    def load(self, checkpoint: Checkpoint) -> None:
        """Reads this rank's elements, and no others, from the file's precision to the master's.

        Raises:
            UserError: The checkpoint does not fit the model.
        """
        shapes = {shard.name: shard.shape for shard in self._backend.shards}
        checkpoint.check_matches(shapes, aliases=self._backend.aliases)
        for shard, run, master in self._runs():
            checkpoint.read(shard.name, region=shard.region(run), out=master)
        self.centre()

    @torch.no_grad()
    def perturb(self, *, iteration: int, direction: int, sigma: float) -> None:
        """Makes the model the centre plus ``sigma`` times the direction's noise."""
        for shard, run, master in self._runs():
            noise.perturb(
                master,
                run.of(shard.local),
                region=shard.region(run),
                sigma=sigma,
                seed=self._seed,
                iteration=iteration,
                direction=direction,
                kind=self._kind,
            )
        self._backend.commit()

    @torch.no_grad()
    def centre(self) -> None:
        """Makes the model the centre."""
        for shard, run, master in self._runs():
            run.of(shard.local).copy_(master)
        self._backend.commit()

    @torch.no_grad()
    def update(self, *, iteration: int, directions: Sequence[int], coefficients: Sequence[float]) -> None:
        """Moves the master: ``master += sum_n coefficients[n] * eps(directions[n])``."""
        for shard, run, master in self._runs():
            noise.accumulate(
                master,
                region=shard.region(run),
                coefficients=coefficients,
                directions=directions,
                seed=self._seed,
                iteration=iteration,
                kind=self._kind,
            )

    def digest(self) -> int:
        """This rank's part of the weights digest; the whole is the sum over ranks modulo 2**64."""
        total = torch.zeros(1, dtype=torch.int64, device=self._backend.device)
        for shard, run, master in self._runs():
            add_digest(total, master, region=shard.region(run))
        return int(total.item()) & 0xFFFFFFFFFFFFFFFF

    def gather_centre(self, shard: Shard) -> torch.Tensor | None:
        """One whole parameter of the centre, on rank 0; None elsewhere. A collective."""
        return self._backend.gather_parameter(shard, self._masters[shard.name].to(self._backend.dtype))
