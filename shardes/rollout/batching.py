"""Cut tokenised prompts and completions into micro-batches by the data alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from shardes.errors import UserError

# Fewer tokens than this are computed with each prompt: putting them into every row would save nothing.
LEAST_PREFIX = 16
# The cohort of a micro-batch that a rank without living episodes answers, only so that ranks go in step.
IDLE_COHORT = -1


@dataclass(frozen=True)
class MicroBatch:
    """Prompts that go through the model together, padded on the left.

    Attributes:
        rows: Indices of the prompts in the sequence that was cut.
        input_ids: Token ids, int64 of shape [rows, length].
        attention_mask: 1 on tokens and 0 on padding, int64 of shape [rows, length].
        lengths: Number of tokens of each prompt, ascending.
        budgets: Largest number of tokens of each answer, int64 of shape [rows], where the model's positions
            leave some fewer than wanted; else None.
        uniforms: Random numbers by which tokens are drawn, float32 in [0, 1) of shape
            [rows, longest answer], below 0 in rows that take the most likely tokens; None where all do.
        num_members: Number of copies of each prompt, side by side: row i is of member ``i % num_members``.
        cohort: Number of the cohort whose episodes the rows are, named by ``rows``; they are asked again,
            with longer prompts, while the same weights are loaded. Lengths are then in any order, and an
            episode may have several rows.
            ``IDLE_COHORT``: nothing is kept of the rows, and nobody reads the answers. None: each row is
            asked once.
    """

    rows: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: tuple[int, ...]
    budgets: torch.Tensor | None = None
    uniforms: torch.Tensor | None = None
    num_members: int = 1
    cohort: int | None = None

    def for_members(self, count: int) -> Self:
        """Return the prompts with ``count`` copies of each, side by side, one for each member."""
        if count == 1:
            return self

        def repeated(rows: torch.Tensor) -> torch.Tensor:
            return rows.repeat_interleave(count, dim=0)

        return replace(
            self,
            rows=tuple(row for row in self.rows for _ in range(count)),
            input_ids=repeated(self.input_ids),
            attention_mask=repeated(self.attention_mask),
            lengths=tuple(length for length in self.lengths for _ in range(count)),
            budgets=None if self.budgets is None else repeated(self.budgets),
            uniforms=None if self.uniforms is None else repeated(self.uniforms),
            num_members=count,
        )

    def to(self, device: torch.device) -> Self:
        """Return a copy whose tensors are on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            budgets=None if self.budgets is None else self.budgets.to(device),
            uniforms=None if self.uniforms is None else self.uniforms.to(device),
        )


def compose(
    prompts: Sequence[list[int]],
    *,
    micro_batch_size: int,
    pad_id: int,
    max_new_tokens: int,
    max_positions: int | None = None,
) -> list[MicroBatch]:
    """Cut tokenised prompts, sorted by length (then by index), into micro-batches.

    The cut depends on nothing but its arguments, so the tensors that a forward sees, and with them the bits
    it computes, are the same for every number of ranks.

    Args:
        prompts: Token ids of each prompt.
        micro_batch_size: Largest number of prompts in a micro-batch.
        pad_id: Token id that fills the rows on the left.
        max_new_tokens: Largest number of tokens of an answer.
        max_positions: Number of positions of the model; None: no limit.

    Raises:
        UserError: A prompt leaves no position for an answer.
    """
    longest = max(map(len, prompts), default=0)
    if max_positions is not None and longest >= max_positions:
        raise UserError(
            f"task: a prompt has {longest} tokens, but the model has {max_positions} positions "
            "(max_position_embeddings), the answer's included; shorten or drop the prompt"
        )
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    batches = []
    for low in range(0, len(order), micro_batch_size):
        rows = tuple(order[low : low + micro_batch_size])
        width = max(len(prompts[row]) for row in rows)
        input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, width - len(prompts[row]) :] = torch.tensor(prompts[row])
            attention_mask[i, width - len(prompts[row]) :] = 1
        budgets = None
        if max_positions is not None and width + max_new_tokens > max_positions:
            left = [max_positions - len(prompts[row]) for row in rows]
            budgets = torch.tensor(left).clamp(max=max_new_tokens)
        lengths = tuple(len(prompts[row]) for row in rows)
        batches.append(MicroBatch(rows, input_ids, attention_mask, lengths, budgets))
    return batches


def shared_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Return the token ids that all prompts begin with, short of a whole prompt; [] if too few to pay off."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)  # in the order of lists, so all others begin as these two do
    places = range(min(map(len, prompts)) - 1)
    length = next((place for place in places if first[place] != last[place]), len(places))
    return first[:length] if length >= LEAST_PREFIX else []


@dataclass(frozen=True)
class LikelihoodBatch:
    """Prompts, each with a completion, that go through the model together, padded on the right.

    Attributes:
        rows: Indices of the pairs in the sequences that were cut.
        input_ids: Token ids, int64 of shape [rows, length].
        prompt_lengths: Number of tokens of each prompt.
        lengths: Number of tokens of each prompt and its completion together.
    """

    rows: tuple[int, ...]
    input_ids: torch.Tensor
    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]

    def for_members(self, count: int) -> Self:
        """Return the pairs with ``count`` copies of each, side by side, one for each member."""
        if count == 1:
            return self
        return replace(
            self,
            rows=tuple(row for row in self.rows for _ in range(count)),
            input_ids=self.input_ids.repeat_interleave(count, dim=0),
            prompt_lengths=tuple(length for length in self.prompt_lengths for _ in range(count)),
            lengths=tuple(length for length in self.lengths for _ in range(count)),
        )

    def to(self, device: torch.device) -> Self:
        """Return a copy whose tensors are on a device."""
        return replace(self, input_ids=self.input_ids.to(device))


def compose_likelihood_batches(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], *, micro_batch_size: int, pad_id: int
) -> list[LikelihoodBatch]:
    """Cut pairs of a prompt and a completion, sorted by length (then by index), into micro-batches.

    As in ``compose``, the cut depends on nothing but its arguments.

    Args:
        prompts: Token ids of each prompt.
        completions: Token ids of the completion of each prompt.
        micro_batch_size: Largest number of pairs in a micro-batch.
        pad_id: Token id that fills the rows on the right.

    Raises:
        ValueError: A prompt or a completion has no tokens, so there is nothing to predict or to predict from.
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
