"""Rows of a micro-batch while they are being decoded: their tokens, masks, positions and forwards."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache

from shardes.errors import UserError
from shardes.models.build import last_positions
from shardes.rollout.batching import MicroBatch
from shardes.rollout.engines.transformers.cuda_graphs import StepGraphs
from shardes.rollout.engines.transformers.kv_cache import SlabCache
from shardes.rollout.stop_strings import GrowingAnswer

# Rows that are computed together before the first token, at least: they are padded to the longest of their
# part, and not to that of the micro-batch.
ROWS_PER_PART = 16
# Padding that a further part must save.
TOKENS_PER_PART = 128
# A batch never shrinks below: matrix products of fewer rows use other kernels, with other bits.
LEAST_ROWS = 4

OnRows = Callable[[torch.Tensor], None]
"""Function that is told the rows of a micro-batch that the next forward computes, int64 of shape [rows]."""


class Rows:
    """State of the rows of a micro-batch while they are being decoded.

    Args:
        batch: Prompts.
        cache: Cache for them, with what they share in it.
        num_steps: Largest number of tokens of an answer.
        pad_id: Id that stands where there is no token.
        on_rows: Function that is called before each forward; None: none is.
        keeps_all: Whether the cache keeps rows that have ended.

    Attributes:
        indices: Index in the micro-batch of each live row, int64 of shape [live].
        has_ended: True for live rows that have ended, bool of shape [live].
        tokens: Token ids of all answers so far, int64 of shape [rows of the micro-batch, num_steps].
        are_finite: True where all logits so far were finite, bool of shape [rows of the micro-batch].
    """

    def __init__(
        self,
        batch: MicroBatch,
        cache: Cache,
        *,
        num_steps: int,
        pad_id: int,
        on_rows: OnRows | None,
        keeps_all: bool = False,
    ) -> None:
        self._cache = cache
        self._keeps_all = keeps_all
        self._held = list(range(len(batch.rows)))
        self._on_rows = on_rows
        self._pad_id = pad_id
        self._batch = batch
        num_rows, self._width = batch.input_ids.shape
        device = batch.input_ids.device
        self.indices = torch.arange(num_rows, device=device)
        self.has_ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.tokens = torch.full((num_rows, num_steps), pad_id, device=device)
        self.are_finite = torch.ones(num_rows, dtype=torch.bool, device=device)
        self._num_tokens = self._num_checked = 0
        self._mask = batch.attention_mask.new_ones(num_rows, self._width + num_steps)
        self._mask[:, : self._width] = batch.attention_mask
        self._positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        # A row that has used up its budget goes on at its last position until it leaves.
        self._limits = None if batch.budgets is None else self._positions[:, -1] + batch.budgets
        self._token = batch.input_ids[:, -1]

    def prefill(self, model: nn.Module, *, num_forwards: int) -> torch.Tensor:
        """Return the logits after the prompts, of shape [live, vocabulary].

        Args:
            model: Causal language model.
            num_forwards: Number of forwards to make; the last one is repeated until there are as many.
        """
        start = self._cache.get_seq_length()
        if not isinstance(self._cache, SlabCache) or self._batch.cohort is not None:
            # Ranks agree on one forward for rows that are asked again, of whatever lengths.
            return self._prefill_part(model, slice(len(self._batch.rows)), low=0, start=start)
        count = self._batch.num_members
        parts_of_prompts = prefill_parts(self._batch.lengths[::count], num_members=count)
        bounds = [slice(part.start * count, part.stop * count) for part in parts_of_prompts]
        parts = []
        for rows in bounds:
            low = self._width - self._batch.lengths[rows.stop - 1]
            first = max(low, start)
            self._cache.look_at(rows, low=low, length=first)
            parts.append(self._prefill_part(model, rows, low=low, start=first))
        for _ in range(len(bounds), num_forwards):
            self._cache.look_at(rows, low=low, length=first)
            self._prefill_part(model, rows, low=low, start=first)
        self._cache.look_at(slice(len(self._batch.rows)), low=0, length=self._width)
        return torch.cat(parts)

    def _prefill_part(self, model: nn.Module, rows: slice, *, low: int, start: int) -> torch.Tensor:
        """Return the logits after some of the prompts, whose columns ``low`` to ``start`` are in the cache.

        Raises:
            UserError: The model keeps no key-value cache.
        """
        if self._on_rows is not None:
            self._on_rows(self.indices[rows])
        logits = forward(
            model,
            self._batch.input_ids[rows, start:],
            cache=self._cache,
            attention_mask=self._mask[rows, low : self._width],
            positions=self._positions[rows, start:],
        )
        if self._cache.get_seq_length() != self._width - low:
            raise UserError(
                f"model.path: {type(model).__name__} keeps no key-value cache that transformers knows, so it "
                "cannot generate; use another architecture"
            )
        return logits

    def step(self, model: nn.Module) -> torch.Tensor:
        """Return the logits after the last token of each row, of shape [live, vocabulary]."""
        if self._on_rows is not None:
            self._on_rows(self.indices)
        return forward(
            model,
            self._token[:, None],
            cache=self._cache,
            attention_mask=self._mask[:, : self._width + self._num_tokens],
            positions=self._positions,
        )

    def replay(self, graphs: StepGraphs, *, sizes: Sequence[int] | None = None) -> torch.Tensor | None:
        """Return the logits of ``step``, computed by a captured step; None if it cannot be captured.

        Args:
            graphs: Captured steps.
            sizes: Numbers of rows that are captured, in descending order; None: any.
        """
        num_rows = None if sizes is None else min(size for size in sizes if size >= len(self._token))
        mask = self._mask[:, : self._width + self._num_tokens]
        return graphs.step(self._token, positions=self._positions, attention_mask=mask, num_rows=num_rows)

    @property
    def slots(self) -> list[int]:
        """Return the row of the cache of each row of the micro-batch, if the cache keeps all."""
        return [self._held.index(row) for row in range(len(self._held))]

    def note(self, is_finite: torch.Tensor) -> None:
        """Record where logits are finite, bool of shape [live]; rows that have ended are left out."""
        self.are_finite[self.indices] &= is_finite | self.has_ended

    def append(self, token: torch.Tensor, eos_ids: Sequence[int]) -> None:
        """Append the next token of each row, int64 of shape [live]; rows that have ended get padding."""
        self._token = token.masked_fill(self.has_ended, self._pad_id)
        self.tokens[self.indices, self._num_tokens] = self._token
        self._num_tokens += 1
        self._positions = self._positions[:, -1:] + 1
        if self._limits is not None:
            self._positions = torch.minimum(self._positions, self._limits[:, None])
        for eos_id in eos_ids:
            self.has_ended |= self._token == eos_id
        if self._batch.budgets is not None:
            self.has_ended |= self._batch.budgets[self.indices] <= self._num_tokens

    def end_where_stopped(self, growing: Sequence[GrowingAnswer]) -> None:
        """End the rows whose answers contain a stop text.

        Args:
            growing: The answer to each row of the micro-batch, as it was at the last check.
        """
        # A row's number goes along, as rows move and leave between checks.
        new = self.tokens[self.indices, self._num_checked : self._num_tokens]
        numbered = torch.cat([self.indices[:, None], new], dim=1).tolist()
        self._num_checked = self._num_tokens
        over = [
            ended or growing[index].has_stopped(tokens)
            for ended, (index, *tokens) in zip(self.has_ended.tolist(), numbered, strict=True)
        ]
        self.has_ended |= torch.tensor(over, device=self.has_ended.device)

    def compact(self, sizes: Sequence[int] | None = None) -> bool:
        """Drop rows that have ended; return True if any has not.

        Args:
            sizes: Numbers of rows that may be left, in descending order; None: any, down to ``LEAST_ROWS``.
        """
        ended = self.has_ended.tolist()
        num_live = ended.count(False)
        if sizes is None:
            num_kept = max(num_live, min(LEAST_ROWS, len(ended)))
        else:
            num_kept = min(size for size in sizes if size >= num_live)
        if num_kept < len(ended) and isinstance(self._cache, SlabCache):
            sources = [row for row in range(num_kept, len(ended)) if not ended[row]]
            targets = [row for row in range(num_kept) if ended[row]][: len(sources)]
            self._keep(num_kept, sources, targets)
        return num_live > 0

    def _keep(self, num_kept: int, sources: list[int], targets: list[int]) -> None:
        device = self.indices.device
        here, there = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        assert isinstance(self._cache, SlabCache)
        self._cache.keep(rows=num_kept, sources=here, targets=there, swaps=self._keeps_all)
        if self._keeps_all:
            for source, target in zip(sources, targets, strict=True):
                self._held[source], self._held[target] = self._held[target], self._held[source]

        def kept(state: torch.Tensor) -> torch.Tensor:
            if sources:
                state[there] = state[here]
            return state[:num_kept]

        self.indices, self.has_ended = kept(self.indices), kept(self.has_ended)
        self._token, self._mask, self._positions = kept(self._token), kept(self._mask), kept(self._positions)
        if self._limits is not None:
            self._limits = kept(self._limits)


def prefill_parts(lengths: tuple[int, ...], *, num_members: int) -> list[slice]:
    """Split the prompts of a micro-batch into parts that are computed together before the first token.

    Args:
        lengths: Number of tokens of each prompt, ascending.
        num_members: Number of rows of each prompt.

    Returns:
        As many even parts as cost least, if a part costs as much as ``TOKENS_PER_PART`` tokens of padding.
        The more members, the more parts.
    """

    def even(count: int) -> list[slice]:
        return [slice(len(lengths) * i // count, len(lengths) * (i + 1) // count) for i in range(count)]

    def cost(parts: list[slice]) -> int:
        num_tokens = sum(lengths[part.stop - 1] * (part.stop - part.start) for part in parts)
        return num_tokens * num_members + TOKENS_PER_PART * len(parts)

    most = min(len(lengths), -(-len(lengths) * num_members // ROWS_PER_PART))
    return min(map(even, range(1, most + 1)), key=cost)


def forward(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    cache: Cache,
    attention_mask: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Return the logits after the last token, of shape [rows, vocabulary]; add the tokens to the cache."""
    output: Any = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_positions(1, width=input_ids.shape[1], device=input_ids.device),
    )
    return output.logits[:, -1]
