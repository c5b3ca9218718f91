"""Members as adapters (LoRA) in vLLM's slots, which are filled in place from the members' noise."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardes.backends.shard import Shard
from shardes.backends.vllm.backend import VllmBackend
from shardes.errors import UserError
from shardes.es.update import Perturbation
from shardes.noise import LowRank
from shardes.rollout.lowrank.member_factors import factors_of
from shardes.utils.messages import listed
from shardes.weights.master import Weights


@dataclass(frozen=True)
class _Place:
    """Place of a matrix's factors in the slots.

    Attributes:
        shard: Shard of the matrix.
        inputs: Slots of the right factors, of shape [slots, 1, rank, input features of this rank].
        outputs: Slots of the left factors, of shape [slots, 1, output features of this rank, rank].
        columns: Input features of the matrix that this rank has.
        rows: Output features of the matrix that this rank has, in its order, int64.
    """

    shard: Shard
    inputs: torch.Tensor
    outputs: torch.Tensor
    columns: slice
    rows: torch.Tensor


class AdapterSlots:
    """A slot for each member of a forward, for all trained matrices of this rank.

    Args:
        backend: Backend whose engine was started with slots.
        weights: Master shards, whose noise is of kind ``LowRank``.
        count: Number of slots.

    Attributes:
        requests: vLLM's ``LoRARequest`` of each slot.

    Raises:
        UserError: A trained parameter is none of a layer that takes adapters.
    """

    def __init__(self, backend: VllmBackend, weights: Weights, *, count: int) -> None:
        from vllm.lora.request import LoRARequest

        assert isinstance(weights.kind, LowRank), "checked with the configuration"
        self._kind, self._seed, self._device = weights.kind, weights.seed, backend.device
        manager = backend.runner.lora_manager
        places = _places_by_name(manager._adapter_manager.modules, weights.trained)
        unreached = [shard.name for shard in weights.trained if shard.name not in places]
        if unreached:
            raise UserError(
                f"rollout.members_per_forward: {listed(unreached)} cannot be perturbed by vLLM's adapters, "
                "which change linear layers of blocks alone; freeze norms, biases, embeddings and the head "
                "(es.trainable: ['.*proj\\.weight'] or the like), or set rollout.members_per_forward: 1"
            )
        self._places = list(places.values())
        self.requests = [
            LoRARequest(lora_name=f"member {slot}", lora_int_id=slot + 1, lora_path="none")
            for slot in range(count)
        ]
        for request in self.requests:
            # Zeros, which vLLM takes for an adapter that it has loaded, and keeps in its slot.
            manager.add_dummy_lora(request, rank=1)
            manager._adapter_manager.activate_adapter(request.lora_int_id)
        found = manager._adapter_manager.lora_index_to_id
        assert found == [request.lora_int_id for request in self.requests], "slots are in order"
        self._punica = manager._adapter_manager._get_punica_wrapper("")

    @property
    def slot_of_rows(self) -> torch.Tensor:
        """Return the slot of each row of logits that the last forward computes, int64; -1: none."""
        indices: torch.Tensor = self._punica.sampler_indices
        return indices

    def fill(self, members: Sequence[Perturbation]) -> None:
        """Write the factors of some members into the first slots."""
        device, count = self._device, len(members)
        sigmas = torch.tensor([member.sigma for member in members], device=device)[:, None, None]
        rank = self._kind.rank
        for place in self._places:
            left, right = factors_of(place.shard, members, kind=self._kind, seed=self._seed, device=device)
            place.inputs[:count, 0, :rank] = right[:, place.columns].mT
            place.outputs[:count, 0, :, :rank] = (left * sigmas)[:, place.rows]


def _places_by_name(modules: dict[str, Any], trained: Sequence[Shard]) -> dict[str, _Place]:
    """Return the place of each matrix that a wrapped linear layer has in its weight, by the matrix's name."""
    by_storage: dict[int, list[Shard]] = {}
    for shard in trained:
        if shard.local.numel() and len(shard.shape) == 2:
            by_storage.setdefault(shard.local.untyped_storage()._cdata, []).append(shard)
    places = {}
    for module in modules.values():
        weight = getattr(module.base_layer, "weight", None)
        if weight is None or weight.ndim != 2 or not isinstance(module.lora_a_stacked, tuple):
            continue  # an embedding, or a head
        lows = [0]
        for size in module.output_slices:
            lows.append(lows[-1] + size)
        found = {}
        for shard in by_storage.get(weight.untyped_storage()._cdata, []):
            first, rows, columns = _rows_and_columns(shard, weight)
            is_whole = len(rows) * weight.shape[1] == shard.local.numel()
            if not is_whole or (first, first + len(rows)) not in itertools.pairwise(lows):
                continue  # it shares an adapter with another matrix, whose factors are others
            slot = lows.index(first)
            inputs, outputs = module.lora_a_stacked[slot], module.lora_b_stacked[slot]
            found[shard.name] = _Place(shard, inputs, outputs, columns, rows)
        places.update(found)
    return places


def _rows_and_columns(shard: Shard, weight: torch.Tensor) -> tuple[int, torch.Tensor, slice]:
    """Return the first row of a shard in a weight, and its rows and columns in the whole matrix."""
    width, whole_width = weight.shape[1], shard.shape[1]
    origin = shard.local.storage_offset() - weight.storage_offset()
    rows: list[torch.Tensor] = []
    starts = set()
    for span in shard.spans:
        assert (origin + span.local_start) % width == 0 and span.length % width == 0, "rows are whole"
        for row in range(span.rows):
            start = span.global_start + row * span.stride
            starts.add(start % whole_width)
            rows.append(start // whole_width + torch.arange(span.length // width))
    (start,) = starts
    first = (origin + shard.spans[0].local_start) // width
    return first, torch.cat(rows).to(weight.device), slice(start, start + width)
