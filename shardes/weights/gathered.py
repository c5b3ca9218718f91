"""A whole model on one rank, perturbed without communication."""

import torch

from shardes.backends.base import Backend
from shardes.es.update import Perturbation
from shardes.noise import Region
from shardes.weights.loaded_member import LoadedMember
from shardes.weights.master import Weights


class GatheredWeights:
    """The backend's whole model, and a whole copy of the centre that it is perturbed from.

    The centre is gathered once, however many members are then computed from it. It has the model's dtype,
    which loses nothing: a member is the *rounded* master plus noise in any case, so the bits are those that
    ``Weights.perturb`` writes into shards.

    Memory, besides this rank's shards: two copies of the trained parameters and one of the frozen ones.

    Args:
        backend: Engine that holds the shards.
        weights: Masters of the shards.
    """

    def __init__(self, backend: Backend, weights: Weights) -> None:
        self._backend = backend
        self._weights = weights
        self._centre: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, torch.Tensor] = {}
        self._version: int | None = None
        self._loaded = LoadedMember(weights.seed, weights.kind)

    def reserve(self) -> None:
        """Allocate both copies; no collective."""
        self._backend.reserve()
        for shard in self._weights.trained:
            if shard.name not in self._centre:
                self._centre[shard.name] = torch.empty(
                    shard.num_elements, dtype=self._backend.dtype, device=self._backend.device
                )

    def release(self) -> None:
        """Free the centre, and drop the references to the whole model, which the backend frees."""
        self._centre, self._parameters = {}, {}
        self._version = None
        self._loaded.forget()

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather the centre if the weights have changed since the last call; a collective."""
        if self._version == self._weights.version:
            return
        self.reserve()
        self._weights.centre()
        self.model = self._backend.gathered()
        parameters = dict(self.model.named_parameters())
        self._parameters = {name: parameters[name].detach().view(-1) for name in self._centre}
        for name, centre in self._centre.items():
            centre.copy_(self._parameters[name])
        self._version = self._weights.version
        self._loaded.set(None, version=self._version)

    @torch.no_grad()
    def perturb(self, perturbation: Perturbation) -> None:
        """Set the model to the centre plus the perturbation's sigma times its direction's noise."""
        change = self._loaded.next(perturbation, version=self._weights.version)
        for shard in self._weights.trained:
            region = Region(shard.param_id, shard.num_elements, 0, shard.num_elements, shape=shard.shape)
            centre, parameter = self._centre[shard.name], self._parameters[shard.name]
            change.write(region, source=centre, target=parameter)
        self._loaded.set(perturbation, version=self._weights.version)

    @torch.no_grad()
    def centre(self) -> None:
        """Set the model to the centre."""
        self._loaded.forget()
        for name, centre in self._centre.items():
            self._parameters[name].copy_(centre)
        self._loaded.set(None, version=self._weights.version)
