"""The time of a decoding step, and of its parts, from decoding the same batch to two lengths."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from gpu_check.devices import seconds_of, wait_for_device

# Attention first: its kernels are matrix products, too, and some have both words in their names.
_ATTENTION = re.compile(r"flash|fmha|attention|attn|sdpa|softmax", re.IGNORECASE)
_MATMUL = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|matmul|splitk|aten::(mm|addmm|bmm)", re.IGNORECASE)


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens between which steps are timed, after a warm-up of the smaller."""

    fewer: int
    more: int

    @property
    def num_steps(self) -> int:
        """Number of steps between the two."""
        return self.more - self.fewer


def make_batch(num_rows: int, num_tokens: int, *, vocab_size: int, device: torch.device) -> Any:
    """Make a micro-batch of random prompts, all of the same length."""
    from shardes.rollout.batching import compose

    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, vocab_size, (num_rows, num_tokens), generator=generator).tolist()
    (batch,) = compose(prompts, micro_batch_size=num_rows, pad_id=0, max_new_tokens=1)
    return batch.to(device)


def token_seconds(decoder: Any, model: Any, batch: Any, lengths: Lengths, **told: Any) -> float:
    """Return the median seconds of a step, sampling and bookkeeping included."""
    seconds = []
    for most in (lengths.fewer, lengths.more):

        def decode(most: int = most) -> None:
            decoder.begin(model)
            decoder.decode(model, batch, most_tokens=most, **told)

        seconds.append(seconds_of(decode, num_turns=2))
    return (seconds[1] - seconds[0]) / lengths.num_steps


def token_parts(decoder: Any, model: Any, batch: Any, lengths: Lengths) -> dict[str, float]:
    """Return the seconds of a step's kernels by what they do: matmul, attention, other."""
    totals = []
    for most in (lengths.fewer, lengths.more):
        decoder.begin(model)
        totals.append(_profile(lambda most=most: decoder.decode(model, batch, most_tokens=most)))
    return {name: max(0.0, (totals[1][name] - totals[0][name]) / lengths.num_steps) for name in totals[0]}


def _profile(work: Any) -> dict[str, float]:
    """Return the seconds of the device's kernels, or without one of the CPU's operators, by what they do."""
    from torch.profiler import ProfilerActivity, profile

    has_device = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if has_device else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        work()
        wait_for_device()
    found = {"matmul": 0.0, "attention": 0.0, "other": 0.0}
    for event in profiler.key_averages():
        seconds = (event.self_device_time_total if has_device else event.self_cpu_time_total) / 1e6
        kind = next(
            (k for k, p in (("attention", _ATTENTION), ("matmul", _MATMUL)) if p.search(event.key)), "other"
        )
        found[kind] += seconds
    return found


def step_bytes(model: Any, *, num_rows: int, num_positions: int) -> tuple[int, int]:
    """Return the bytes of weights and of keys and values that a captured step reads.

    It attends to the whole storage of the cache. Of the embedding it reads a row for each token.
    """
    from shardes.rollout.memory import cache_bytes

    embedding = model.get_input_embeddings().weight
    is_tied = model.get_output_embeddings().weight is embedding
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= 0 if is_tied else embedding.numel() * embedding.element_size()
    cache = cache_bytes(model.config, rows=num_rows, length=num_positions, dtype=embedding.dtype)
    return weights, cache
