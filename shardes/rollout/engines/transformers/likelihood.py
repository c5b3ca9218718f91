"""Scoring given completions without generating: how likely a model finds each of their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from shardes.models.build import last_positions


@dataclass(frozen=True)
class LikelihoodBatch:
    """Prompts, each with a completion, that go through the model together, padded on the right.

    Attributes:
        rows: Which pairs, as indices into the sequences that were cut.
        input_ids: int64 of shape [rows, length].
        prompt_lengths: Tokens of each prompt.
        lengths: Tokens of each prompt and its completion.
    """

    rows: tuple[int, ...]
    input_ids: torch.Tensor
    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]

    def for_members(self, count: int) -> Self:
        """The same pairs, each once for every one of some members, side by side."""
        return replace(
            self,
            rows=tuple(row for row in self.rows for _ in range(count)),
            input_ids=self.input_ids.repeat_interleave(count, dim=0),
            prompt_lengths=tuple(length for length in self.prompt_lengths for _ in range(count)),
            lengths=tuple(length for length in self.lengths for _ in range(count)),
        )

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, input_ids=self.input_ids.to(device))


def compose_likelihood_batches(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], *, micro_batch_size: int, pad_id: int
) -> list[LikelihoodBatch]:
    """Cuts pairs of a prompt and a completion, sorted by length (then by index), into micro-batches.

    As with prompts to be answered, the cut depends on nothing but its arguments.

    Raises:
        ValueError: A prompt or a completion without tokens: its first token has nothing to be predicted from.
    """
    pairs = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    empty = next((i for i, pair in enumerate(zip(prompts, completions, strict=True)) if not all(pair)), None)
    if empty is not None:
        raise ValueError(f"pair {empty} has a prompt or a completion without tokens")
    order = sorted(range(len(pairs)), key=lambda row: (len(pairs[row]), row))
    batches = []
    for low in range(0, len(order), micro_batch_size):
        rows = tuple(order[low : low + micro_batch_size])
        lengths = tuple(len(pairs[row]) for row in rows)
        input_ids = torch.full((len(rows), max(lengths)), pad_id, dtype=torch.int64)
        for i, row in enumerate(rows):
            input_ids[i, : lengths[i]] = torch.tensor(pairs[row])
        batches.append(LikelihoodBatch(rows, input_ids, tuple(len(prompts[row]) for row in rows), lengths))
    return batches


@torch.no_grad()
def log_likelihoods(model: nn.Module, batch: LikelihoodBatch) -> list[torch.Tensor]:
    """The log-likelihood of every token of each completion, given all tokens before it; one forward.

    Padding needs no mask: it stands on the right, where a causal model cannot see it.

    Args:
        model: A causal language model.
        batch: What to score, on the model's device.

    Returns:
        For each row, float32 of shape [tokens of its completion], on that device.
    """
    width = batch.input_ids.shape[1]
    first = min(batch.prompt_lengths) - 1  # the position whose logits speak of the first scored token
    kept = last_positions(width - first, width=width, device=batch.input_ids.device)
    logits = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=kept).logits
    scores = []
    for i, (start, end) in enumerate(zip(batch.prompt_lengths, batch.lengths, strict=True)):
        # Row by row, so that float32 copies of logits stay small.
        row = logits[i, start - 1 - first : end - 1 - first].float()
        wanted = batch.input_ids[i, start:end]
        scores.append(row.gather(1, wanted[:, None]).squeeze(1) - row.logsumexp(dim=1))
    return scores
