"""About how long forwards and noise take, from shapes and a machine's rates."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from shardes.config.es import EsConfig
from shardes.planning.machine import Machine
from shardes.rollout.memory import cache_bytes

# Times that an operation between two products reads or writes as many elements as the token has: norms,
# rotations and sums of the hidden size, the gated activation of the inner size.
_HIDDEN_PASSES, _INNER_PASSES = 40, 5
# How many times as fast as Gaussian noise the other kinds are updated (benchmarks/README.md); of low rank,
# with rank 1.
_TIMES_AS_FAST = {"gaussian": 1.0, "rademacher": 8.0, "low_rank": 17.0}


@dataclass(frozen=True)
class Forward:
    """Shape of a forward.

    Attributes:
        rows: Number of rows.
        tokens: New tokens of each row.
        context: Tokens of each row that these attend to, on average.
        num_logits: Tokens of each row whose logits are computed.
    """

    rows: float
    tokens: float
    context: float
    num_logits: float = 1.0


class ForwardTimer:
    """Estimates the seconds of a model's forwards.

    Args:
        model: Model, whose parameters may be on meta.
        machine: Device of each rank.
        dtype: Dtype of weights and activations.
        num_sharers: Number of ranks that share the heads and the inner neurons of each layer.
        has_terms: Whether low-rank terms of members are added to the products.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        machine: Machine,
        dtype: torch.dtype,
        num_sharers: int,
        has_terms: bool = False,
    ) -> None:
        # A term reads and writes the product that it is added to, by as many operations again.
        self._times = 2 if has_terms else 1
        self._machine, self._dtype, self._part = machine, dtype, 1 / num_sharers
        self._config: Any = model.config.get_text_config()
        self._model_config = model.config
        head = model.get_output_embeddings()
        ends = [module for module in (model.get_input_embeddings(), head) if module is not None]
        sizes = {id(p): p.numel() for module in ends for p in module.parameters()}
        self._head = 0 if head is None else sum(p.numel() for p in head.parameters())
        self._body = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes.values())

    def seconds(self, forward: Forward) -> float:
        """Estimate the seconds of a forward, on each of the ranks that compute it together.

        Weights and the keys and values of all tokens are read once; products and attention are computed; what
        is between them reads and writes activations.
        """
        config, machine = self._config, self._machine
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        num_tokens = forward.rows * forward.tokens
        kept = cache_bytes(self._model_config, rows=1, length=1, dtype=self._dtype)
        read = (self._body + self._head) * self._dtype.itemsize + forward.rows * forward.context * kept
        flops = 2 * (self._body * num_tokens + self._head * forward.rows * forward.num_logits)
        attention = 4 * heads * head_size * layers * num_tokens * forward.context
        reading = self._part * read / machine.memory_bytes_per_second
        computing = self._part * flops / machine.flops_per_second
        computing += self._part * attention / machine.attention_flops_per_second
        passes = _HIDDEN_PASSES * config.hidden_size + _INNER_PASSES * inner * self._part
        moving = num_tokens * layers * passes * self._dtype.itemsize / machine.elementwise_bytes_per_second
        least = layers * machine.layer_seconds
        products = max(reading, computing) if machine.overlaps else reading + computing
        return products + self._times * (moving + least)


def noise_seconds(num_perturbed: float, num_updated: float, *, es: EsConfig, machine: Machine) -> float:
    """Estimate the seconds in which a rank computes and adds the noise of an iteration.

    Args:
        num_perturbed: Number of elements in all members that the rank perturbs.
        num_updated: Number of elements that the rank updates, times the directions.
        es: Section ``es`` of the configuration.
        machine: Device of each rank.
    """
    speed = _TIMES_AS_FAST.get(es.noise, 1.0)
    if es.noise == "low_rank":
        speed = max(1.0, speed / es.rank)
    num_terms = 1 if es.member_reuse is None else 2  # of this iteration's noise, and of the last one's
    num_elements = (num_perturbed + num_terms * num_updated) / es.subspaces
    return num_elements / (speed * machine.noise_elements_per_second)
