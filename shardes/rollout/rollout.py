"""A batch of problems, answered and scored by some ranks under the weights of the moment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shardes.backends.base import Backend
from shardes.config import RolloutConfig
from shardes.distributed import Group, Mesh
from shardes.es.fitness import mean_reward
from shardes.modeling import end_tokens, max_positions
from shardes.rollout.batching import MicroBatch, compose, shared_prefix, tokenize
from shardes.rollout.decode import Answers, Decoder
from shardes.rollout.memory import MemoryShortageError, generation_bytes, is_shortage
from shardes.rollout.modes import Mode, Modes
from shardes.rollout.sampling import Sampling
from shardes.rollout.scoring import Scorer
from shardes.rollout.stop_texts import StopTexts
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
        rewards: One per answer, those to one problem side by side; None where the reward does not count.
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
    """A batch of rows, rendered, tokenised and cut once, then answered by every member.

    Attributes:
        rows: The problems.
        prompts: What is asked, one for each row.
        samples_per_prompt: Answers to each; answer i is to prompt ``i // samples_per_prompt``.
        micro_batches: Prompts, once for each answer.
        prefix: The tokens with which all prompts begin, int64 of shape [1, length]; None if they are few.
    """

    rows: Sequence[Row]
    prompts: list[Prompt]
    samples_per_prompt: int
    micro_batches: list[MicroBatch]
    prefix: torch.Tensor | None

    @property
    def num_answers(self) -> int:
        """Of all prompts together."""
        return len(self.rows) * self.samples_per_prompt

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
        settings: How prompts are answered.
        seed: The run's.
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
        settings: RolloutConfig,
        seed: int,
        spans: Spans,
    ) -> None:
        self._backend = backend
        self._task = task
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._scorer = scorer
        self._modes = modes
        self._settings = settings
        self._spans = spans
        self._stop = StopTexts(settings.stop, tokenizer)
        self._sampling = None
        if settings.temperature > 0:
            self._sampling = Sampling(
                seed, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
            )
        self._decoder = Decoder(
            eos_ids=end_tokens(backend.lockstep_model, tokenizer),
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=settings.max_new_tokens,
            stop=self._stop,
            sampling=self._sampling,
        )

    def prepare(self, rows: Sequence[Row], *, iteration: int) -> Problems:
        """Renders, tokenises and cuts a batch of problems.

        Args:
            rows: The problems.
            iteration: Whose random numbers draw the answers, if they are drawn.
        """
        settings, device = self._settings, self._mesh.world.device
        prompts = [self._task.make_prompt(row) for row in rows]
        tokens = [tokenize(prompt, self._tokenizer) for prompt in prompts]
        count = settings.samples_per_prompt
        batches = compose(
            [prompt for prompt in tokens for _ in range(count)],
            micro_batch_size=settings.micro_batch_size,
            pad_id=self._tokenizer.pad_token_id,
            max_new_tokens=settings.max_new_tokens,
            max_positions=max_positions(self._backend.lockstep_model),
        )
        if self._sampling is not None:
            for i, batch in enumerate(batches):
                uniforms = self._sampling.uniforms(
                    iteration=iteration,
                    prompts=[answer // count for answer in batch.rows],
                    samples=[answer % count for answer in batch.rows],
                    num_tokens=settings.max_new_tokens,
                )
                batches[i] = replace(batch, uniforms=uniforms)
        shared = shared_prefix(tokens)
        prefix = torch.tensor([shared], device=device) if shared else None
        return Problems(rows, prompts, count, [batch.to(device) for batch in batches], prefix)

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
                model.config,
                rows=rows,
                length=width + self._settings.max_new_tokens,
                dtype=self._backend.dtype,
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
        rewards = [0.0] * problems.num_answers
        excluded = [0.0] * problems.num_answers
        num_failures = num_tokens = 0
        samples: list[Sample] = []
        is_short = is_broken = False
        for first in range(0, len(batches), stride):
            mine = first + place
            if first + leader >= len(batches):
                break
            # A rank without a micro-batch of its own repeats another's, so that all call alike.
            is_idle = mine >= len(batches)
            batch = batches[first + leader if is_idle else mine]
            with self._spans("rollout"):
                found = self._decode(
                    model, batch, problems.prefix, is_first=first == 0, is_in_step=is_in_step
                )
            if found is None:
                is_short = True
                break
            answers = found.tokens
            is_broken |= not found.is_finite
            if is_idle or (together > 1 and not shard.is_main):
                continue
            with self._spans("reward"):
                completions = [self._text(answer) for answer in answers]
                asked = [answer // problems.samples_per_prompt for answer in batch.rows]
                prompts = [problems.prompts[row] for row in asked]
                scores = self._scorer.score([problems.rows[row] for row in asked], prompts, completions)
            for row, value in zip(batch.rows, scores.values, strict=True):
                rewards[row], excluded[row] = (0.0, 1.0) if value is None else (value, 0.0)
            num_failures += scores.num_failures
            num_tokens += sum(map(len, answers))
            if mine == 0:
                shown = zip(prompts, completions, answers, scores.values, strict=True)
                samples = [Sample(_as_text(p), c, ids, value) for p, c, ids, value in shown]
        counts = [float(num_failures), float(num_tokens), float(is_broken), float(is_short)]
        with self._spans("io"):
            totals = group.sum_float64([*rewards, *excluded, *counts])
        if totals[-1]:
            raise MemoryShortageError
        size = len(rewards)
        pairs = zip(totals[:size], totals[size : 2 * size], strict=True)
        values = [None if is_excluded else reward for reward, is_excluded in pairs]
        return Evaluation(values, int(totals[-4]), int(totals[-3]), samples, is_finite=not totals[-2])

    def _decode(
        self,
        model: Any,
        batch: MicroBatch,
        prefix: torch.Tensor | None,
        *,
        is_first: bool,
        is_in_step: bool,
    ) -> Answers | None:
        """The answers; None if there was too little memory and there is a mode that takes less."""
        try:
            if is_first:
                self._decoder.begin(model, prefix)
            return self._decoder.decode(model, batch, any_rank=self._mesh.shard.any if is_in_step else None)
        except (RuntimeError, MemoryError) as error:
            if not (self._modes.can_step_down and is_shortage(error)):
                raise
            return None

    def _text(self, answer: list[int]) -> str:
        return self._stop.trim(self._tokenizer.decode(answer, skip_special_tokens=True))


def _as_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
