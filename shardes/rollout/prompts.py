"""Problems as an engine is asked them: rendered, tokenised and cut once, then answered by every member."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch

from shardes.config.schema import RolloutConfig
from shardes.errors import UserError
from shardes.rewards.scorer import Scorer
from shardes.rollout.batching import (
    LikelihoodBatch,
    MicroBatch,
    compose,
    compose_likelihood_batches,
    shared_prefix,
)
from shardes.rollout.choices import ChoiceSet, make_choice_set
from shardes.rollout.encoding import PromptEncoder, Question
from shardes.rollout.sampling import make_sampler
from shardes.tasks.base import Choices, Prompt, Row, Task
from shardes.tasks.data import rows_sha256


@dataclass(frozen=True)
class EpisodePlan:
    """Episodes of a batch of problems.

    Attributes:
        iteration: Iteration whose random numbers draw the answers.
        max_context: Tokens of an episode at most.
        cohorts: Indices of the episodes that are played together, cut by their order alone.
    """

    iteration: int
    max_context: int
    cohorts: Sequence[range]


@dataclass(frozen=True)
class PromptBatch:
    """A batch of problems, and the micro-batches that they are asked in.

    Attributes:
        rows: The problems.
        prompts: What is asked, one for each row; empty for episodes.
        scorer: Has answers scored.
        samples_per_prompt: Answers to each; answer i is to prompt ``i // samples_per_prompt``.
        micro_batches: Prompts, once for each answer; or, for a likelihood task, prompts with completions.
        prefix: The tokens with which all prompts begin, int64 of shape [1, length]; None if they are few.
        choices: For a likelihood task, what may follow the prompts.
        opened: For prompts to be answered, the tag that the chat template has opened for the answer to each;
            empty where it has opened none. It is a part of the answer, though no token of it.
        episodes: For problems that are episodes, how they are played; ``micro_batches`` then says only how
            large one may become.
    """

    rows: Sequence[Row]
    prompts: list[Prompt]
    scorer: Scorer
    samples_per_prompt: int
    micro_batches: Sequence[MicroBatch | LikelihoodBatch]
    prefix: torch.Tensor | None = None
    choices: ChoiceSet | None = None
    opened: Sequence[str] = ()
    episodes: EpisodePlan | None = None

    @property
    def num_batches(self) -> int:
        """Return the number of micro-batches, or of cohorts of episodes."""
        return len(self.micro_batches if self.episodes is None else self.episodes.cohorts)

    def indices(self) -> list[int]:
        """Return the answers (for likelihoods: the pairs) that are asked, ascending."""
        if self.episodes is not None:
            return sorted(index for cohort in self.episodes.cohorts for index in cohort)
        return sorted(row for batch in self.micro_batches for row in batch.rows)

    def problems_of(self, indices: Collection[int]) -> list[int]:
        """Return the problems all of whose answers (for likelihoods: pairs) are among some."""
        count = self.samples_per_prompt
        bounds: Sequence[int] = range(0, len(self.rows) * count + 1, count)
        if self.choices is not None:
            bounds = self.choices.first_pairs
        known, ranges = frozenset(indices), [range(low, high) for low, high in pairwise(bounds)]
        return [problem for problem, own in enumerate(ranges) if known.issuperset(own)]

    def portion(self, places: Sequence[int]) -> Self:
        """Return a batch that asks some of the micro-batches, or cohorts, alone.

        Answers keep their indices, and each micro-batch its tensors: what it computes is the same bits.
        """
        if self.episodes is not None:
            cohorts = [self.episodes.cohorts[place] for place in places]
            return replace(self, episodes=replace(self.episodes, cohorts=cohorts))
        return replace(self, micro_batches=[self.micro_batches[place] for place in places])

    def fingerprint(self) -> bytes:
        """Return the tokens that a model is asked: equal for equal problems, templates and tokenizers.

        Of episodes, whose tokens are not known before they are played, it is a hash of the problems.
        """
        if self.episodes is not None:
            return rows_sha256(self.rows).encode()
        return b"".join(batch.input_ids.cpu().numpy().tobytes() for batch in self.micro_batches)


class PromptBuilder:
    """Renders, tokenises and cuts batches of problems.

    Args:
        encoder: Makes tokens of prompts.
        pad_id: Token id that fills rows.
        scorer: Of the task that is trained on.
        settings: How prompts are answered.
        seed: The key of the random numbers that draw answers.
        device: Where the micro-batches are wanted.
        max_positions: Tokens of a prompt and its answer that the model was made for; None: any number.
        text: Turns tokens into text.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        *,
        pad_id: int,
        scorer: Scorer,
        settings: RolloutConfig,
        seed: int,
        device: torch.device,
        max_positions: int | None,
        text: Callable[[list[int]], str],
    ) -> None:
        self._encoder = encoder
        self._pad_id = pad_id
        self._scorer = scorer
        self._settings = settings
        self._device = device
        self._max_positions = max_positions
        self._text = text
        self._sampler = make_sampler(settings, seed=seed)

    def build(
        self, rows: Sequence[Row], *, iteration: int, micro_batch_size: int, scorer: Scorer | None = None
    ) -> PromptBatch:
        """Build the batch of some problems; the same on every rank.

        Args:
            rows: The problems.
            iteration: Whose random numbers draw the answers, if they are drawn.
            micro_batch_size: Prompts per forward.
            scorer: Of the task that the problems are of; None: the one that is trained on.

        Raises:
            UserError: A prompt, or a completion to score, has no tokens or too many.
        """
        settings, scorer = self._settings, scorer or self._scorer
        if scorer.task.episodes is not None:
            return self._of_episodes(rows, scorer, iteration=iteration, micro_batch_size=micro_batch_size)
        prompts = [scorer.task.make_prompt(row) for row in rows]
        if scorer.task.choices is not None:
            choices = make_choice_set(
                prompts,
                [scorer.task.choices(row) for row in rows],
                self._encoder,
                chat=scorer.task.chat,
            )
            return self._of_choices(rows, prompts, choices, scorer, micro_batch_size)
        encoded = [self._encoder.encode(Question(prompt, scorer.task.chat)) for prompt in prompts]
        tokens = [list(question.prompts[0]) for question in encoded]
        count = settings.samples_per_prompt
        batches = compose(
            [prompt for prompt in tokens for _ in range(count)],
            micro_batch_size=micro_batch_size,
            pad_id=self._pad_id,
            max_new_tokens=settings.max_new_tokens,
            max_positions=self._max_positions,
        )
        if self._sampler is not None:
            for i, batch in enumerate(batches):
                uniforms = self._sampler.uniforms(
                    iteration=iteration,
                    prompts=[answer // count for answer in batch.rows],
                    samples=[answer % count for answer in batch.rows],
                    num_tokens=settings.max_new_tokens,
                )
                batches[i] = replace(batch, uniforms=uniforms)
        shared = shared_prefix(tokens)
        prefix = torch.tensor([shared], device=self._device) if shared else None
        batches = [batch.to(self._device) for batch in batches]
        opened = [question.opened for question in encoded]
        return PromptBatch(rows, prompts, scorer, count, batches, prefix, opened=opened)

    def build_pairs(
        self, pairs: Sequence[Sequence[list[int]]], *, scorer: Scorer, micro_batch_size: int
    ) -> PromptBatch:
        """Build a batch that asks for the likelihood of given tokens.

        Args:
            pairs: The tokens of each prompt and of what follows it.
            scorer: Of a task whose metric is wanted of them.
            micro_batch_size: Pairs per forward.
        """
        choices = ChoiceSet(
            prompts=[self._text(prompt) for prompt, _ in pairs],
            choices=[Choices([self._text(completion)], gold=0) for _, completion in pairs],
            pairs=[(prompt, completion) for prompt, completion in pairs],
            first_pairs=range(len(pairs) + 1),
        )
        return self._of_choices([{} for _ in pairs], list(choices.prompts), choices, scorer, micro_batch_size)

    def tokens_of(self, task: Task) -> list[list[int]]:
        """Return the tokens of a task's prompts."""
        questions = [Question(task.make_prompt(row), task.chat) for row in task.train]
        return [list(self._encoder.encode(question).prompts[0]) for question in questions]

    def _of_episodes(
        self, rows: Sequence[Row], scorer: Scorer, *, iteration: int, micro_batch_size: int
    ) -> PromptBatch:
        settings = self._settings
        known = [most for most in (settings.max_context, self._max_positions) if most is not None]
        if not known:
            raise UserError(
                "rollout.max_context: the model does not say for how many tokens it was made "
                "(max_position_embeddings); give the most that an episode may have"
            )
        max_context, count = min(known), settings.samples_per_prompt
        longest = max_context - settings.max_new_tokens
        if longest < 1:
            raise UserError(
                f"rollout.max_new_tokens: got {settings.max_new_tokens}, which leaves no room for a prompt "
                f"in an episode of {max_context} tokens (rollout.max_context, or the model's positions)"
            )
        num_episodes = len(rows) * count
        cohorts = [
            range(first, min(first + micro_batch_size, num_episodes))
            for first in range(0, num_episodes, micro_batch_size)
        ]
        largest = compose(
            [[self._pad_id] * longest] * max(map(len, cohorts), default=0),
            micro_batch_size=micro_batch_size,
            pad_id=self._pad_id,
            max_new_tokens=settings.max_new_tokens,
        )
        largest = [replace(batch, cohort=0) for batch in largest]
        if self._sampler is not None:
            shape = len(largest[0].rows), settings.max_new_tokens
            largest = [replace(batch, uniforms=torch.zeros(shape)) for batch in largest]
        return PromptBatch(
            rows,
            [],
            scorer,
            count,
            [batch.to(self._device) for batch in largest],
            episodes=EpisodePlan(iteration, max_context, cohorts),
        )

    def _of_choices(
        self,
        rows: Sequence[Row],
        prompts: list[Prompt],
        choices: ChoiceSet,
        scorer: Scorer,
        micro_batch_size: int,
    ) -> PromptBatch:
        batches = compose_likelihood_batches(
            [prompt for prompt, _ in choices.pairs],
            [completion for _, completion in choices.pairs],
            micro_batch_size=micro_batch_size,
            pad_id=self._pad_id,
        )
        batches = [batch.to(self._device) for batch in batches]
        return PromptBatch(rows, prompts, scorer, 1, batches, choices=choices)
