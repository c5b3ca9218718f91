"""Episodes of many turns, played in lock-step, so that a run has the same bytes on any number of ranks.

Episodes are cut into cohorts by their order alone. A cohort belongs to one rank from its first turn to its
last, so ranks exchange nothing between turns; in each turn, those of its episodes that are not over are one
micro-batch. A rank plays two cohorts in turn: the environments of one take their steps while the other's
answers are generated.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from shardes.config.schema import RolloutConfig
from shardes.distributed.group import Mesh
from shardes.environments.base import StepResult
from shardes.rollout.batching import IDLE_COHORT, MicroBatch, compose
from shardes.rollout.conversation import Conversation
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.engines.base import Completions, Engine
from shardes.rollout.environment_cohort import EnvironmentCohort, PlayedEpisode
from shardes.rollout.episode_results import EpisodeOutcome
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.sampling import TokenSampler
from shardes.rollout.share import WorkShare
from shardes.rollout.turns import Cohort, TokenAnswer, TokenPrompt
from shardes.utils.timers import PhaseTimer

# Cohorts that a rank plays at a time: one steps while the other generates.
NUM_LANES = 2

TakeEpisode = Callable[[int, EpisodeOutcome, bool], None]
"""Takes in an episode that is over: its index, its outcome, and whether it is of the first cohort of all."""

Generate = Callable[[MicroBatch, PromptBatch], Completions | None]
"""Has the engine answer a micro-batch; returns None if there was too little memory."""


class TooLittleMemoryError(Exception):
    """An engine had too little memory for a turn, and there is a way to go on that takes less."""


@dataclass
class EpisodeCounts:
    """Counts of a rank since they were last taken.

    Attributes:
        environment_seconds: Time that environments took, all of them together.
        num_reencoded: Turns before which a whole context was tokenised again, as the template changes what
            was said before.
    """

    environment_seconds: float = 0.0
    num_reencoded: int = 0

    def add(self, result: StepResult) -> None:
        """Count the time of a reset or a step."""
        self.environment_seconds += result.seconds

    def reset(self) -> None:
        """Begin anew."""
        self.environment_seconds, self.num_reencoded = 0.0, 0


@dataclass(frozen=True)
class Turn:
    """What is generated next.

    Attributes:
        cohort: Number of the cohort that asks.
        prompts: What it asks; nothing on a rank that only takes part in others' forwards.
    """

    cohort: int
    prompts: list[TokenPrompt]


class EpisodePlayer:
    """Plays this rank's cohorts of a batch of episodes with what the engine has loaded.

    Args:
        engine: Answers.
        encoder: Makes tokens of conversations.
        mesh: The ranks.
        settings: How answers are generated.
        sampler: Draws tokens; None: the most likely ones are taken.
        text: Turns the tokens of an answer into text.
        pad_id: Token id that fills rows.
        end_ids: Tokens that end an answer.
        timer: Where the time goes; waiting for environments is the phase ``environment``.
        counts: What is counted.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        encoder: PromptEncoder,
        mesh: Mesh,
        settings: RolloutConfig,
        sampler: TokenSampler | None,
        text: Callable[[list[int]], str],
        pad_id: int,
        end_ids: frozenset[int],
        timer: PhaseTimer,
        counts: EpisodeCounts,
    ) -> None:
        self._engine, self._encoder, self._mesh = engine, encoder, mesh
        self._settings, self._sampler, self._text = settings, sampler, text
        self._pad_id, self._end_ids = pad_id, end_ids
        self._timer, self._counts = timer, counts

    def play(self, prompts: PromptBatch, *, share: WorkShare, take: TakeEpisode, generate: Generate) -> bool:
        """Play this rank's cohorts to their end; a collective of a replica where forwards are.

        Args:
            prompts: The episodes.
            share: This rank's share of the cohorts.
            take: Takes in each episode that is over, on the rank that it counts on.
            generate: Has the engine answer.

        Returns:
            Whether all logits were finite.

        Raises:
            TooLittleMemoryError: There was too little memory.
        """
        plan = prompts.episodes
        assert plan is not None, "the problems are episodes"
        numbers = deque(range(len(plan.cohorts))[share.place :: share.num_places])
        lanes: list[Cohort | None] = [None] * NUM_LANES
        is_finite = True
        try:
            if share.is_counted:
                for lane in range(NUM_LANES):
                    lanes[lane] = self._begin(prompts, numbers)
            while True:
                is_over = True
                for lane in range(NUM_LANES):
                    turn = None
                    if share.is_counted:
                        with self._timer("environment"):
                            turn = self._next_turn(prompts, lanes, lane, numbers, take)
                    turn = self._agree(turn)
                    if turn is None:
                        continue
                    is_over = False
                    batch, order = self._batch(turn, prompts)
                    output = generate(batch, prompts)
                    if output is None:
                        raise TooLittleMemoryError
                    is_finite &= output.is_finite or not turn.prompts
                    cohort = lanes[lane]
                    if cohort is not None and turn.prompts:
                        by_place = dict(zip(order, output.tokens, strict=True))
                        answers = [self._answer(by_place[i], asked) for i, asked in enumerate(turn.prompts)]
                        cohort.answer(answers)
                if is_over:
                    return is_finite
        finally:
            for cohort in lanes:
                if cohort is not None:
                    cohort.close()

    def _begin(self, prompts: PromptBatch, numbers: deque[int]) -> Cohort | None:
        """Begin the rank's next cohort; return None if there is none."""
        if not numbers:
            return None
        plan, task, runner = prompts.episodes, prompts.scorer.task, prompts.scorer.environments
        assert plan is not None
        assert runner is not None
        settings, tools = task.episodes, runner.tools
        assert settings is not None
        number = numbers.popleft()
        indices = plan.cohorts[number]
        handles = runner.begin([prompts.rows[index // prompts.samples_per_prompt] for index in indices])
        is_chat = settings.system is not None
        episodes = {
            index: PlayedEpisode(
                handle,
                Conversation(self._encoder, task.chat, tools, as_chat=is_chat, end_ids=self._end_ids),
                settings,
                tools=tools,
            )
            for index, handle in zip(indices, handles, strict=True)
        }
        return EnvironmentCohort(
            number,
            episodes,
            encoder=self._encoder,
            max_context=plan.max_context,
            max_new_tokens=self._settings.max_new_tokens,
            count=self._counts.add,
        )

    def _next_turn(
        self,
        prompts: PromptBatch,
        lanes: list[Cohort | None],
        lane: int,
        numbers: deque[int],
        take: TakeEpisode,
    ) -> Turn | None:
        """Return what a lane asks next; where its cohort is over, the next one takes its place."""
        while (cohort := lanes[lane]) is not None:
            asked = cohort.advance()
            for index, outcome in cohort.outcomes().items():
                self._counts.num_reencoded += outcome.num_reencoded
                take(index, outcome, cohort.number == 0)
            if asked:
                return Turn(cohort.number, asked)
            cohort.close()
            lanes[lane] = None  # so that nobody closes it again
            lanes[lane] = self._begin(prompts, numbers)
        return None

    def _agree(self, turn: Turn | None) -> Turn | None:
        """Return what this rank generates now: its own turn, its replica's, or nothing if no rank has any."""
        shard = self._mesh.shard
        if self._engine.ranks_per_forward > 1:
            found = shard.broadcast_json(None if turn is None else asdict(turn))
            if found is None:
                return None
            return Turn(found["cohort"], [TokenPrompt(**prompt) for prompt in found["prompts"]])
        if not self._engine.forward_is_collective:
            return turn
        if not shard.any(turn is not None):
            return None
        return turn if turn is not None else Turn(0, [])

    def _batch(self, turn: Turn, prompts: PromptBatch) -> tuple[MicroBatch, list[int]]:
        """Return the micro-batch of a turn, and the place in it of each prompt's row.

        Where there is no prompt, it is of one token, and nobody looks at the answer.
        """
        asked = turn.prompts or [TokenPrompt(0, [self._pad_id], 1)]
        most = self._settings.max_new_tokens
        (batch,) = compose(
            [prompt.token_ids for prompt in asked],
            micro_batch_size=len(asked),
            pad_id=self._pad_id,
            max_new_tokens=most,
        )
        order = list(batch.rows)
        in_order = [asked[place] for place in order]
        episodes = [prompt.episode for prompt in in_order]
        budgets = [prompt.max_new_tokens for prompt in in_order]
        batch = replace(
            batch,
            rows=tuple(episodes),
            budgets=torch.tensor(budgets) if min(budgets) < most else None,
            cohort=turn.cohort if turn.prompts else IDLE_COHORT,
        )
        if self._sampler is not None:
            batch = replace(batch, uniforms=self._uniforms(in_order, prompts, self._sampler))
        return batch.to(self._mesh.world.device), order

    def _uniforms(
        self, asked: list[TokenPrompt], prompts: PromptBatch, sampler: TokenSampler
    ) -> torch.Tensor:
        """Return the random numbers of a turn's rows, below 0 for those that take the most likely tokens."""
        plan, count = prompts.episodes, prompts.samples_per_prompt
        assert plan is not None
        rows = [
            sampler.uniforms(
                iteration=plan.iteration,
                prompts=[prompt.episode // count],
                samples=[prompt.episode % count],
                num_tokens=self._settings.max_new_tokens,
                turn=prompt.draw,
            )
            for prompt in asked
        ]
        uniforms = torch.cat(rows)
        uniforms[[prompt.is_greedy for prompt in asked]] = -1.0
        return uniforms

    def _answer(self, tokens: list[int], prompt: TokenPrompt) -> TokenAnswer:
        was_cut = len(tokens) >= prompt.max_new_tokens and tokens[-1] not in self._end_ids
        return TokenAnswer(tokens, self._text(tokens), was_cut)
