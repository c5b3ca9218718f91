"""Keep the keys and values of episodes between turns, so that a turn computes only the tokens that are new.

They lie apart from the storage that is decoded in, whose addresses captured steps know and which all cohorts
use in turn: a turn begins by copying in what is kept, and ends by copying out what it has come to.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Cache

from shardes.rollout.batching import IDLE_COHORT, MicroBatch
from shardes.rollout.engines.transformers.kv_cache import SlabCache
from shardes.rollout.memory import free_bytes, is_shortage, reserved_bytes

logger = logging.getLogger(__name__)

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class _KeptRows:
    """What is kept of a cohort.

    Attributes:
        places: Rows of each episode.
        tokens: Tokens of each row.
        layers: Keys and values of each layer, of shape [rows, tokens, heads, head size]; a row has its first
            token in the first column.
    """

    places: dict[int, list[int]]
    tokens: list[Tokens]
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    def find(self, episode: int, prompt: Tokens) -> tuple[int, int]:
        """Return how many tokens of a prompt are kept, short of its last one, and in which row."""
        counts = [
            (_common_length(self.tokens[place], prompt[:-1]), place) for place in self.places.get(episode, ())
        ]
        return max(counts, default=(0, 0))


class KeptCohorts:
    """Keys and values of cohorts of episodes, all computed with the same weights.

    Attributes:
        most: Number of cohorts that are under way at the same time: what was asked longest ago is of one
            whose episodes are over, and is given up for another; None: not known.
    """

    def __init__(self, *, most: int | None = None) -> None:
        self.most = most
        self._cohorts: dict[int, _KeptRows] = {}
        self._has_given_up = self._has_warned = False

    def __bool__(self) -> bool:
        """Return whether anything is kept."""
        return bool(self._cohorts)

    def forget(self, cohort: int | None = None) -> None:
        """Free what is kept of a cohort; None: of all."""
        if cohort is None:
            self._cohorts = {}
        else:
            self._cohorts.pop(cohort, None)

    def give_up(self) -> None:
        """Free everything, and keep nothing any more: memory ran out."""
        self.forget()
        self._has_given_up = True
        self._warn()

    def take(self, batch: MicroBatch, slab: SlabCache) -> list[int]:
        """Move what is kept of a cohort into a cache that is empty.

        All rows are filled up to the same column. A row of which more is kept computes the rest again,
        where it would else be padded: that takes no longer.

        Args:
            batch: Prompts of a turn.
            slab: Cache that has room for them.

        Returns:
            For each row, the number of its first tokens that are kept.
        """
        assert batch.cohort is not None, "rows of no cohort have no turn before"
        kept = self._cohorts.pop(batch.cohort, None)
        if kept is None:
            return [0] * len(batch.rows)
        found = [kept.find(row, prompt) for row, prompt in zip(batch.rows, _prompts(batch), strict=True)]
        counts = [count for count, _ in found]
        shifts = [batch.input_ids.shape[1] - length for length in batch.lengths]
        start = min(shift + count for shift, count in zip(shifts, counts, strict=True))
        if start > 0:
            device = batch.input_ids.device
            # A row that is new is padded as far as this: whatever is there is masked.
            rows = torch.tensor([place for _, place in found], device=device)
            columns = torch.arange(start, device=device) - torch.tensor(shifts, device=device)[:, None]
            slab.fill(kept.layers, rows=rows, columns=columns.clamp(min=0))
        return counts

    def put(
        self,
        batch: MicroBatch,
        slab: SlabCache,
        *,
        answers: Sequence[Sequence[int]],
        are_finite: Sequence[bool],
        slots: Sequence[int],
        any_rank: Callable[[bool], bool] | None,
    ) -> None:
        """Keep what a turn has come to, but for the last token of each answer, which was never put in.

        Without the memory nothing is kept, and the next turn computes everything anew.

        Args:
            batch: Prompts of the turn.
            slab: Cache that they were decoded in.
            answers: Tokens of the answer to each.
            are_finite: For each row, whether all its logits were finite; others are not kept.
            slots: Row of the cache of each row of the batch.
            any_rank: As in ``Decoder.decode``, where ranks compute parts of the same forwards: these must
                keep the same. None: this rank keeps what it can.
        """
        if self._has_given_up:
            return
        while self.most is not None and len(self._cohorts) >= max(self.most, 1):
            self.forget(next(iter(self._cohorts)))
        width, device = batch.input_ids.shape[1], batch.input_ids.device
        rows = [row for row, is_finite in enumerate(are_finite) if is_finite]
        prompts = _prompts(batch)
        tokens = [np.concatenate([prompts[row], np.array(answers[row][:-1], np.int64)]) for row in rows]
        counts = torch.tensor([len(each) for each in tokens], dtype=torch.int64, device=device)
        firsts = torch.tensor([width - batch.lengths[row] for row in rows], dtype=torch.int64, device=device)
        columns = torch.arange(max(map(len, tokens), default=0), device=device).expand(len(rows), -1)
        columns = torch.minimum(columns, counts[:, None] - 1) + firsts[:, None]
        chosen = torch.tensor([slots[row] for row in rows], dtype=torch.int64, device=device)
        layers = _copied(slab, chosen, columns)
        is_short = layers is None
        if any_rank is not None:
            is_short = any_rank(is_short)
        if layers is None or is_short:
            self._warn()
            return
        assert batch.cohort is not None, "rows of no cohort have no turn to come"
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(batch.rows[row], []).append(place)
        self._cohorts[batch.cohort] = _KeptRows(places, tokens, layers)

    def _warn(self) -> None:
        if not self._has_warned:
            logger.warning(
                "there is too little memory to keep the keys and values of episodes from turn to turn, so "
                "their contexts are computed anew in each, which takes longer and may round the last bits "
                "differently; set a smaller rollout.micro_batch_size or rollout.max_context"
            )
        self._has_warned = True


def _copied(
    slab: SlabCache, rows: torch.Tensor, columns: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Return a copy of some columns of some rows; None if there is too little memory."""
    device = columns.device
    if columns.numel() * slab.bytes_per_token() > free_bytes(device) - reserved_bytes(device):
        return None  # on CPUs, trying might end the process
    try:
        return slab.copied(rows=rows, columns=columns)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        return None


def _prompts(batch: MicroBatch) -> list[Tokens]:
    """Return the tokens of each prompt."""
    ids: Any = batch.input_ids.cpu().numpy()
    return [row[len(row) - length :] for row, length in zip(ids, batch.lengths, strict=True)]


def _common_length(first: Tokens, second: Tokens) -> int:
    """Return the number of tokens that both begin with."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length


def keeps(batch: MicroBatch, cache: Cache | None) -> bool:
    """Return whether the keys and values of a batch's rows are kept for the next turn.

    Other caches than of keys and values alone hold a state that cannot be cut to a shorter prefix.
    """
    is_asked_again = batch.cohort is not None and batch.cohort != IDLE_COHORT and batch.num_members == 1
    return is_asked_again and isinstance(cache, SlabCache)
