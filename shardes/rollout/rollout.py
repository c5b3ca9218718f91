"""A batch of problems, answered and scored by some ranks under the weights of the moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardes.backends.base import Backend
from shardes.distributed import Group, Mesh
from shardes.es.fitness import mean_reward
from shardes.rollout.batching import MicroBatch, compose, tokenize
from shardes.rollout.decode import answer_tokens, decode_greedily
from shardes.rollout.memory import MemoryShortageError, generation_bytes, is_shortage
from shardes.rollout.modes import Mode, Modes
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
    """What a batch of problems earned; the same on every rank that took part, samples apart.

    Attributes:
        rewards: One per problem; None where the reward does not count.
        num_failures: Rewards that failed.
        num_tokens: Tokens generated, padding not counted.
        samples: Answers of the first micro-batch; on the first of the ranks only.
        is_finite: Whether all logits were finite; answers picked from others mean nothing.
    """

    rewards: list[float | None]
    num_failures: int
    num_tokens: int
    samples: list[Sample]
    is_finite: bool = True

    @property
    def reward(self) -> float | None:
        """The mean over the answers that count; None if none does, or if the answers mean nothing."""
        return mean_reward(self.rewards) if self.is_finite else None


@dataclass(frozen=True)
class Problems:
    """A batch of rows, rendered, tokenised and cut once, then answered by every member."""

    rows: Sequence[Row]
    prompts: list[Prompt]
    micro_batches: list[MicroBatch]

    def fingerprint(self) -> bytes:
        """What the model is asked, token by token: equal for equal problems, templates and tokenizers."""
        return b"".join(batch.input_ids.cpu().numpy().tobytes() for batch in self.micro_batches)


class Rollout:
    """Generates and scores.

    Args:
        backend: The model.
        task: Prompts and rewards.
        tokenizer: The model's.
        mesh: The ranks.
        scorer: Calls the reward.
        modes: How a member's weights become a model.
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
        mesh: Mesh,
        scorer: Scorer,
        modes: Modes,
        micro_batch_size: int,
        max_new_tokens: int,
        spans: Spans,
    ) -> None:
        self._backend = backend
        self._task = task
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._scorer = scorer
        self._modes = modes
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
        return Problems(rows, prompts, [batch.to(self._mesh.world.device) for batch in batches])

    @property
    def mode(self) -> Mode:
        """How members are evaluated; known once ``begin`` was called."""
        return self._modes.current

    @property
    def mode_name(self) -> str | None:
        """Its name in ``rollout.mode``; None if it is not known yet."""
        return self._modes.name

    def begin(self, problems: Problems) -> None:
        """Comes before any number of evaluations of the same weights; a collective of all ranks."""
        shapes = [batch.input_ids.shape for batch in problems.micro_batches]
        model = self._backend.lockstep_model
        needs = [
            generation_bytes(
                model.config, rows=rows, length=width + self._max_new_tokens, dtype=self._backend.dtype
            )
            for rows, width in shapes
        ]
        self._modes.settle(max(needs, default=0))
        with self._spans("gather"):
            self.mode.begin()

    def step_down(self) -> None:
        """After a shortage of memory: goes on in a mode that takes less; a collective of all ranks."""
        self._modes.step_down()

    def evaluate(self, problems: Problems, *, group: Group) -> Evaluation:
        """Answers and scores the problems under the current weights; a collective.

        Args:
            problems: What to answer.
            group: The ranks that share the micro-batches: a team, or all.

        Raises:
            MemoryShortageError: On every rank of the group, if one had too little memory, and if there is a
                mode that takes less.
        """
        with self._spans("gather"):
            model = self.mode.model()
        shard, is_in_step = self._mesh.shard, self.mode.is_in_step
        # Ranks that need the same batch take turns together, and the first of them scores.
        together = shard.world_size if self._backend.shares_batches else 1
        stride, place = group.world_size // together, group.rank // together
        # In step, ranks of a replica go on for as long as its first has a micro-batch.
        leader = (group.rank - shard.rank) // together if is_in_step else place
        batches = problems.micro_batches
        rewards = [0.0] * len(problems.rows)
        excluded = [0.0] * len(problems.rows)
        num_failures = num_tokens = 0
        samples: list[Sample] = []
        is_short = False
        for first in range(0, len(batches), stride):
            mine = first + place
            if first + leader >= len(batches):
                break
            # A rank without a micro-batch of its own repeats another's, so that all call alike.
            is_idle = mine >= len(batches)
            batch = batches[first + leader if is_idle else mine]
            with self._spans("rollout"):
                answers = self._decode(model, batch, is_in_step)
            if answers is None:
                is_short = True
                break
            if is_idle or (together > 1 and not shard.is_main):
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
        counts = [float(num_failures), float(num_tokens), float(is_short)]
        with self._spans("io"):
            totals = group.sum_float64([*rewards, *excluded, *counts])
        if totals[-1]:
            raise MemoryShortageError
        size = len(rewards)
        pairs = zip(totals[:size], totals[size : 2 * size], strict=True)
        values = [None if is_excluded else reward for reward, is_excluded in pairs]
        return Evaluation(values, int(totals[-3]), int(totals[-2]), samples)

    def _decode(self, model: Any, batch: MicroBatch, is_in_step: bool) -> list[list[int]] | None:
        """The answers' tokens; None if there was too little memory and there is a mode that takes less."""
        try:
            tokens = decode_greedily(
                model,
                batch.input_ids,
                batch.attention_mask,
                max_new_tokens=self._max_new_tokens,
                eos_ids=self._eos_ids,
                pad_id=self._tokenizer.pad_token_id,
                any_rank=self._mesh.shard.any if is_in_step else bool,
            )
        except (RuntimeError, MemoryError) as error:
            if not (self._modes.can_step_down and is_shortage(error)):
                raise
            return None
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
