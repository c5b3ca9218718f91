"""Decode with a transformers model: its forward and its cache classes, in a loop of our own.

Rows that have ended leave the batch and the cache at once, so that an iteration costs the tokens it generates
and not rows times the longest answer. Episodes that are asked again bring only their new tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import Cache, DynamicCache

from shardes.rollout.batching import IDLE_COHORT, MicroBatch
from shardes.rollout.engines.base import Completions
from shardes.rollout.engines.transformers.cohorts import KeptCohorts, keeps
from shardes.rollout.engines.transformers.cuda_graphs import (
    CudaGraphs,
    MakeGraph,
    StepGraphs,
    can_be_captured,
    ladder,
)
from shardes.rollout.engines.transformers.kv_cache import SlabCache, make_slab
from shardes.rollout.engines.transformers.rows import OnRows, Rows, forward
from shardes.rollout.sampling import TokenSampler
from shardes.rollout.stop_strings import GrowingAnswer, StopStrings

# Tokens between two looks at which rows have ended, where a look waits for a device or for other ranks:
# decoding up to this many tokens too many costs less than looking after each.
TOKENS_PER_CHECK = 8


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

    Attributes:
        kept: What is kept of cohorts between turns; to be forgotten when other weights are loaded.
        max_rows: Episodes of the largest cohort; None: not known.
        max_context: Most tokens of an episode, for which the storage grows at most; None: not known.
        num_prefilled_tokens: Tokens of prompts that were computed so far, without those that take the place
            of padding.
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
        self._prefix_ids: torch.Tensor | None = None
        self._make_graph = make_graph
        self._cuda_graphs = CudaGraphs()
        self._graphs: StepGraphs | None = None
        self._has_begun = False
        self.kept = KeptCohorts()
        self.max_rows: int | None = None
        self.max_context: int | None = None
        self.num_prefilled_tokens = 0

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
        self._prefix_ids = None if self._slab is None or prefix is None else prefix[:1]
        if prefix is None or self._slab is None:
            self._prefix = None
            return
        self._prefix = self._prefix or SlabCache(len(self._slab.layers))
        self._prefix.restart(rows=len(prefix), max_length=prefix.shape[1])
        if on_rows is not None:
            on_rows(torch.arange(len(prefix), device=prefix.device))
        positions = torch.arange(prefix.shape[1], device=prefix.device)[None]
        forward(
            model, prefix, cache=self._prefix, attention_mask=torch.ones_like(prefix), positions=positions
        )
        self.num_prefilled_tokens += prefix.numel()

    def release(self) -> None:
        """Free the storage; the next batch allocates it anew."""
        self._slab = self._prefix = self._graphs = None
        self._has_begun = False
        self.kept = KeptCohorts(most=self.kept.most)

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
            num_prefills: Number of forwards before the first token that all ranks make in lock-step; for a
                batch of a cohort it is always 1.
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
        cache, num_known = self._prepared(model, batch)
        if most_tokens is None and batch.cohort != IDLE_COHORT:
            self.num_prefilled_tokens += sum(batch.lengths) - num_known
        rows = Rows(
            batch,
            cache,
            num_steps=self._max_new_tokens,
            pad_id=self._pad_id,
            on_rows=on_rows,
            keeps_all=keeps(batch, cache),
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
            if graphs is None or (captured := rows.replay(graphs, sizes=self._sizes(batch))) is None:
                logits = rows.step(model)
            else:
                logits = captured
        return self._finished(batch, rows, any_rank=any_rank if is_split else None)

    def _finished(
        self, batch: MicroBatch, rows: Rows, *, any_rank: Callable[[bool], bool] | None
    ) -> Completions:
        """Return the answers of rows that are decoded, and keep what their next turns begin with."""
        slab, are_finite = self._slab, rows.are_finite.tolist()
        budgets = (
            [self._max_new_tokens] * len(batch.rows) if batch.budgets is None else batch.budgets.tolist()
        )
        answers = [self._cut(row[:budget]) for row, budget in zip(rows.tokens.tolist(), budgets, strict=True)]
        if slab is not None and keeps(batch, slab):
            self.kept.put(
                batch, slab, answers=answers, are_finite=are_finite, slots=rows.slots, any_rank=any_rank
            )
        if not all(are_finite) and slab is not None:
            slab.clear()
        return Completions(answers, are_finite)

    def _prepared(self, model: nn.Module, batch: MicroBatch) -> tuple[Cache, int]:
        """Return a cache for a micro-batch, with what is known of it, and the number of tokens known."""
        slab = self._slab
        if slab is None:
            return DynamicCache(config=model.config), 0
        rows, width = batch.input_ids.shape
        length = width + self._max_new_tokens
        room = rows
        if batch.cohort is not None:
            room = max(rows, self.max_rows or 0)
            # Contexts grow in each turn; the storage in few steps, as its graphs are then captured anew.
            roomy = 1 << (length - 1).bit_length()
            most = roomy if self.max_context is None else self.max_context + self._max_new_tokens
            length = max(length, min(roomy, most))
        slab.restart(rows=room, max_length=length)
        slab.look_at(slice(rows), low=0, length=0)
        counts = self.kept.take(batch, slab) if keeps(batch, slab) else []
        if not any(counts) and self._prefix is not None and self._has_prefix(batch):
            slab.take_prefix(self._prefix, [width - length for length in batch.lengths])
            counts = [self._prefix.get_seq_length()] * rows
        return slab, sum(counts)

    def _has_prefix(self, batch: MicroBatch) -> bool:
        """Return whether all prompts begin with the shared prefix, as those of later turns may not."""
        if batch.cohort is None:
            return True
        assert self._prefix_ids is not None, "there is a prefix"
        width, count = batch.input_ids.shape[1], self._prefix_ids.shape[1]
        if min(batch.lengths) <= count:
            return False
        firsts = torch.tensor([width - length for length in batch.lengths], device=batch.input_ids.device)
        columns = firsts[:, None] + torch.arange(count, device=firsts.device)
        return bool((batch.input_ids.gather(1, columns) == self._prefix_ids).all())

    def _sizes(self, batch: MicroBatch) -> list[int] | None:
        """Return the numbers of rows that are captured; None: any.

        Each turn of a cohort begins with as many rows as still live, which would all be captured. They follow
        from the data, and not from the storage, which has room for whatever this rank has computed before.
        """
        return None if batch.cohort is None else ladder(max(len(batch.rows), self.max_rows or 0))

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
