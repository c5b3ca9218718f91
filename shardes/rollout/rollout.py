"""A batch of problems, answered and scored by all ranks under the weights that the shards hold now."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardes.backends.base import Backend
from shardes.distributed import Group
from shardes.rollout.batching import MicroBatch, compose, tokenize
from shardes.rollout.decode import answer_tokens, decode_greedily
from shardes.rollout.scoring import Scorer
from shardes.spans import Spans
from shardes.tasks.base import Prompt, Row, Task


@dataclass(frozen=True)
class Sample:
    """One answer, for people to read."""

    prompt: str
    completion: str
    token_ids: list[int]
    reward: float | None


@dataclass(frozen=True)
class Evaluation:
    """What a batch of problems earned; the same on every rank, samples apart.

    Attributes:
        rewards: One per problem; None where the reward does not count.
        num_failures: Rewards that failed.
        num_tokens: Tokens generated, padding not counted.
        samples: Answers of the first micro-batch; on rank 0 only.
    """

    rewards: list[float | None]
    num_failures: int
    num_tokens: int
    samples: list[Sample]


@dataclass(frozen=True)
class Problems:
    """A batch of rows, rendered, tokenised and cut once, then answered by every member."""

    rows: Sequence[Row]
    prompts: list[Prompt]
    micro_batches: list[MicroBatch]


class Rollout:
    """Generates and scores.

    Args:
        backend: The model.
        task: Prompts and rewards.
        tokenizer: The model's.
        group: The ranks that share the micro-batches.
        scorer: Calls the reward.
        mode: ``stream`` or ``prompts``, see ``RolloutConfig``.
        micro_batch_size: Prompts per forward.
        max_new_tokens: The longest answer.
        spans: Where the time goes.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        task: Task,
        tokenizer: Any,
        group: Group,
        scorer: Scorer,
        mode: str,
        micro_batch_size: int,
        max_new_tokens: int,
        spans: Spans,
    ) -> None:
        self._backend = backend
        self._task = task
        self._tokenizer = tokenizer
        self._group = group
        self._scorer = scorer
        self._mode = mode
        self._micro_batch_size = micro_batch_size
        self._max_new_tokens = max_new_tokens
        self._spans = spans
        self._eos_ids = _end_tokens(backend.lockstep_model, tokenizer)

    def prepare(self, rows: Sequence[Row]) -> Problems:
        """Renders, tokenises and cuts a batch of problems."""
        prompts = [self._task.make_prompt(row) for row in rows]
        tokens = [tokenize(prompt, self._tokenizer) for prompt in prompts]
        pad_id = self._tokenizer.pad_token_id
        batches = compose(tokens, micro_batch_size=self._micro_batch_size, pad_id=pad_id)
        return Problems(rows, prompts, [batch.to(self._group.device) for batch in batches])

    def evaluate(self, problems: Problems) -> Evaluation:
        """Answers and scores the problems under the current weights; a collective."""
        with self._spans("gather"):
            streaming = self._mode == "stream"
            model = self._backend.lockstep_model if streaming else self._backend.gathered()
        in_step = streaming and self._backend.is_sharded
        rank, world_size = self._group.rank, self._group.world_size
        batches = problems.micro_batches
        rewards = [0.0] * len(problems.rows)
        excluded = [0.0] * len(problems.rows)
        num_failures = num_tokens = 0
        samples: list[Sample] = []
        for first in range(0, len(batches), world_size):
            mine = first + rank
            idle = mine >= len(batches)
            if idle and not in_step:
                break
            # In step, a rank without a micro-batch of its own repeats another's, so that all call alike.
            batch = batches[first if idle else mine]
            with self._spans("rollout"):
                answers = self._decode(model, batch, in_step)
            if idle:
                continue
            with self._spans("reward"):
                completions = [self._tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
                prompts = [problems.prompts[row] for row in batch.rows]
                scores = self._scorer.score([problems.rows[row] for row in batch.rows], prompts, completions)
            for row, value in zip(batch.rows, scores.values, strict=True):
                rewards[row], excluded[row] = (0.0, 1.0) if value is None else (value, 0.0)
            num_failures += scores.num_failures
            num_tokens += sum(map(len, answers))
            if mine == 0:
                shown = zip(prompts, completions, answers, scores.values, strict=True)
                samples = [Sample(_as_text(p), c, ids, value) for p, c, ids, value in shown]
        with self._spans("io"):
            totals = self._group.sum_float64([*rewards, *excluded, float(num_failures), float(num_tokens)])
        size = len(rewards)
        pairs = zip(totals[:size], totals[size : 2 * size], strict=True)
        values = [None if is_excluded else reward for reward, is_excluded in pairs]
        return Evaluation(values, int(totals[-2]), int(totals[-1]), samples)

    def _decode(self, model: Any, batch: MicroBatch, in_step: bool) -> list[list[int]]:
        tokens = decode_greedily(
            model,
            batch.input_ids,
            batch.attention_mask,
            max_new_tokens=self._max_new_tokens,
            eos_ids=self._eos_ids,
            pad_id=self._tokenizer.pad_token_id,
            any_rank=self._group.any if in_step else bool,
        )
        return [answer_tokens(row, self._eos_ids) for row in tokens.tolist()]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The model's end-of-sequence tokens, from its generation config or else the tokenizer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _as_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
