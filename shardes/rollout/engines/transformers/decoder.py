"""Decode with a transformers model: its forward and its cache classes, in a loop of our own.

Rows that have ended leave the batch and the cache at once, so that an iteration costs the tokens it generates
and not rows times the longest answer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from shardes.errors import UserError
from shardes.models.build import last_positions
from shardes.rollout.batching import MicroBatch
from shardes.rollout.engines.base import Completions
from shardes.rollout.engines.transformers.cuda_graphs import (
    CudaGraphs,
    MakeGraph,
    StepGraphs,
    can_be_captured,
    ladder,
)
from shardes.rollout.engines.transformers.kv_cache import SlabCache, make_slab
from shardes.rollout.sampling import TokenSampler
from shardes.rollout.stop_strings import GrowingAnswer, StopStrings

# Tokens between two looks at which rows have ended, where a look waits for a device or for other ranks:
# decoding up to this many tokens too many costs less than looking after each.
TOKENS_PER_CHECK = 8
# Rows that are computed together before the first token, at least: they are padded to the longest of their
# part, and not to that of the micro-batch.
ROWS_PER_PART = 16
# Padding that a further part must save.
TOKENS_PER_PART = 128
# A batch never shrinks below: matrix products of fewer rows use other kernels, with other bits.
LEAST_ROWS = 4


OnRows = Callable[[torch.Tensor], None]


class Decoder:
    """Decoder of micro-batches, whose cache is allocated once and serves all members.

    Args:
        eos_ids: Ids of the tokens that end an answer.
        pad_id: Id that stands where there is no token.
        max_new_tokens: Largest number of tokens of an answer.
        stop: Texts that end an answer; None: there are none.
        sampling: Sampler of tokens; None: the most likely token is taken (greedy decoding).
        make_graph: Function that captures a step on the CPU, for tests; None: none does. On CUDA devices
            it is always ``CudaGraphs``.
    """

    def __init__(
        self,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        max_new_tokens: int,
        stop: StopStrings | None = None,
        sampling: TokenSampler | None = None,
        make_graph: MakeGraph | None = None,
    ) -> None:
        self._eos_ids = list(eos_ids)
        self._pad_id = pad_id
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self._sampling = sampling
        self._slab: SlabCache | None = None
        self._prefix: SlabCache | None = None
        self._make_graph = make_graph
        self._cuda_graphs = CudaGraphs()
        self._graphs: StepGraphs | None = None
        self._has_begun = False

    @torch.no_grad()
    def begin(
        self, model: nn.Module, prefix: torch.Tensor | None = None, *, on_rows: OnRows | None = None
    ) -> None:
        """Prepare for the micro-batches that are answered with the same weights; call it before them.

        Args:
            model: Causal language model, at these weights.
            prefix: Token ids that every prompt begins with, int64 of shape [1, length], or
                [members, length]; their keys and values are computed here, once. None: no such tokens.
            on_rows: As in ``decode``, called with the rows of the prefix.
        """
        if not self._has_begun:
            self._slab = make_slab(model.config)
            self._has_begun = True
        if prefix is None or self._slab is None:
            self._prefix = None
            return
        self._prefix = self._prefix or SlabCache(len(self._slab.layers))
        self._prefix.restart(rows=len(prefix), max_length=prefix.shape[1])
        if on_rows is not None:
            on_rows(torch.arange(len(prefix), device=prefix.device))
        positions = torch.arange(prefix.shape[1], device=prefix.device)[None]
        _forward(
            model, prefix, cache=self._prefix, attention_mask=torch.ones_like(prefix), positions=positions
        )

    def release(self) -> None:
        """Free the storage; the next batch allocates it anew."""
        self._slab = self._prefix = self._graphs = None
        self._has_begun = False

    @torch.no_grad()
    def decode(
        self,
        model: nn.Module,
        batch: MicroBatch,
        *,
        any_rank: Callable[[bool], bool] | None = None,
        is_split: bool = False,
        num_prefills: int = 1,
        most_tokens: int | None = None,
        on_rows: OnRows | None = None,
    ) -> Completions:
        """Decode a completion of each prompt of a micro-batch.

        Args:
            model: Model that ``begin`` was called with.
            batch: Prompts, on the device of the model.
            any_rank: Where ranks decode in lock-step, a collective that returns True if its argument is True
                on any rank: all ranks go on while any has rows left. None: this rank decodes on its own.
            is_split: Whether these ranks compute parts of the same forwards, all of the same shapes, which
                are captured if all of them can. Other forwards that are collectives are not.
            num_prefills: Number of forwards before the first token that all ranks make in lock-step.
            most_tokens: Number of tokens after which answers are cut, to probe the memory; None: no cut.
            on_rows: Function called before each forward with the indices of the rows of the micro-batch
                that it computes, int64 of shape [rows]; None: nothing is called.

        Returns:
            Token ids of each row's completion, and for each row whether all its logits were finite.

        Raises:
            UserError: The model keeps no cache.
        """
        device, stop = batch.input_ids.device, self._stop
        # Looking at the device's data is free on the CPU, and so is leaving, unless others would wait.
        always_looks = device.type == "cpu"
        rows = _Rows(
            batch,
            self._prepared(model, batch),
            num_steps=self._max_new_tokens,
            pad_id=self._pad_id,
            on_rows=on_rows,
        )
        growing = [GrowingAnswer(stop) for _ in batch.rows] if stop else []
        logits = rows.prefill(model, num_forwards=num_prefills if any_rank is not None else 1)
        # What engines gather layer by layer is not captured, nor is a forward that must know its rows.
        is_plain = on_rows is None and (any_rank is None or is_split)
        graphs = self._graphs_of(model, device, any_rank=any_rank) if is_plain else None
        num_steps = min(self._max_new_tokens, most_tokens or self._max_new_tokens)
        for step in range(num_steps):
            largest, token = logits.max(dim=-1)  # a NaN counts as the largest
            rows.note(largest.isfinite())
            if self._sampling is not None:
                assert batch.uniforms is not None, "drawing takes random numbers"
                token = self._sampling.draw(logits, batch.uniforms[rows.indices, step])
            rows.append(token, self._eos_ids)
            num_tokens = step + 1
            if num_tokens == num_steps:
                break
            is_due = num_tokens % TOKENS_PER_CHECK == 0
            if is_due or always_looks:
                if stop:
                    rows.end_where_stopped(growing)
                is_live = rows.compact(ladder(len(batch.rows)) if graphs is not None else None)
                if any_rank is None:
                    if not is_live:
                        break
                elif is_due and not any_rank(is_live):
                    break
            if graphs is None or (captured := rows.replay(graphs)) is None:
                logits = rows.step(model)
            else:
                logits = captured
        are_finite = rows.are_finite.tolist()
        if not all(are_finite) and self._slab is not None:
            self._slab.clear()
        budgets = (
            [self._max_new_tokens] * len(batch.rows) if batch.budgets is None else batch.budgets.tolist()
        )
        answers = [self._cut(row[:budget]) for row, budget in zip(rows.tokens.tolist(), budgets, strict=True)]
        return Completions(answers, are_finite)

    def _prepared(self, model: nn.Module, batch: MicroBatch) -> Cache:
        """Return a cache for a micro-batch, with the shared prefix in it."""
        if self._slab is None:
            return DynamicCache(config=model.config)
        rows, width = batch.input_ids.shape
        self._slab.restart(rows=rows, max_length=width + self._max_new_tokens)
        if self._prefix is not None:
            self._slab.take_prefix(self._prefix, [width - length for length in batch.lengths])
        return self._slab

    def _graphs_of(
        self, model: nn.Module, device: torch.device, *, any_rank: Callable[[bool], bool] | None
    ) -> StepGraphs | None:
        """Return the graphs of the model's steps; None if steps cannot be captured, on any of the ranks."""
        any_rank = any_rank or bool
        is_cuda, slab = device.type == "cuda", self._slab
        can_be = (is_cuda or self._make_graph is not None) and can_be_captured(model, slab)
        if any_rank(not can_be) or slab is None:
            return None
        # Whether addresses stayed as they were is chance where a cache was allocated anew.
        is_stale = self._graphs is None or not self._graphs.fits(model, slab)
        if any_rank(is_stale):
            self._graphs = None
            self._cuda_graphs = self._cuda_graphs.renewed()
            make_graph = self._cuda_graphs if is_cuda else self._make_graph
            assert make_graph is not None, "it can be captured"
            self._graphs = StepGraphs(model, slab, make_graph=make_graph, any_rank=any_rank)
        return self._graphs if self._graphs is not None and self._graphs.is_usable else None

    def _cut(self, tokens: list[int]) -> list[int]:
        """Cut an answer after the token or the text that ended it."""
        ends = set(self._eos_ids)
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        if self._stop and (stop := self._stop.find(tokens[:length])) is not None:
            length = stop
        return tokens[:length]


class _Rows:
    """State of the rows of a micro-batch while they are being decoded.

    Attributes:
        indices: Index in the micro-batch of each live row, int64 of shape [live].
        has_ended: True for live rows that have ended, bool of shape [live].
        tokens: Token ids of all answers so far, int64 of shape [rows of the micro-batch, num_steps].
        are_finite: True where all logits so far were finite, bool of shape [rows of the micro-batch].
    """

    def __init__(
        self, batch: MicroBatch, cache: Cache, *, num_steps: int, pad_id: int, on_rows: OnRows | None
    ) -> None:
        self._cache = cache
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
        if not isinstance(self._cache, SlabCache):
            return self._prefill_part(model, slice(len(self._batch.rows)), low=0, start=0)
        start = _num_cached(self._cache)
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
        logits = _forward(
            model,
            self._batch.input_ids[rows, start:],
            cache=self._cache,
            attention_mask=self._mask[rows, low : self._width],
            positions=self._positions[rows, start:],
        )
        if _num_cached(self._cache) != self._width - low:
            raise UserError(
                f"model.path: {type(model).__name__} keeps no key-value cache that transformers knows, so it "
                "cannot generate; use another architecture"
            )
        return logits

    def step(self, model: nn.Module) -> torch.Tensor:
        """Return the logits after the last token of each row, of shape [live, vocabulary]."""
        if self._on_rows is not None:
            self._on_rows(self.indices)
        return _forward(
            model,
            self._token[:, None],
            cache=self._cache,
            attention_mask=self._mask[:, : self._width + self._num_tokens],
            positions=self._positions,
        )

    def replay(self, graphs: StepGraphs) -> torch.Tensor | None:
        """Return the logits of ``step``, computed by a captured step; None if it cannot be captured."""
        mask = self._mask[:, : self._width + self._num_tokens]
        return graphs.step(self._token, positions=self._positions, attention_mask=mask)

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
        self._cache.keep(rows=num_kept, sources=here, targets=there)

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


def _num_cached(cache: Cache) -> int:
    return cache.get_seq_length()


def _forward(
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
