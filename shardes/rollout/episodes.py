"""Episodes of many turns, played in lock-step, so that a run has the same bytes on any number of ranks.

Episodes are cut into cohorts by their order alone. A cohort belongs to one rank from its first turn to its
last, so ranks exchange nothing between turns; in each turn, those of its episodes that are not over are one
micro-batch. A rank plays two cohorts in turn: the environments of one take their steps while the other's
answers are generated.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import torch

from shardes.config.schema import RolloutConfig
from shardes.distributed.group import Mesh
from shardes.environments.base import COHORTS_AT_ONCE
from shardes.es.update import Perturbation
from shardes.rollout.batching import IDLE_COHORT, MicroBatch, compose
from shardes.rollout.cohorts import begin_cohort
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.engines.base import Completions, Engine
from shardes.rollout.episode_results import EpisodeOutcome
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.sampling import TokenSampler
from shardes.rollout.share import WorkShare
from shardes.rollout.turns import Cohort, EpisodeLimits, TokenAnswer, TokenPrompt
from shardes.utils.timers import PhaseTimer

TakeEpisode = Callable[[int, EpisodeOutcome], None]
"""Takes in an episode that is over: its index, and its outcome."""

Generate = Callable[[MicroBatch, PromptBatch], Completions | None]
"""Has the engine answer a micro-batch; returns None if there was too little memory."""


def model_name(member: Perturbation | None) -> str:
    """Return the name by which harnesses ask for a member, or for the centre (None)."""
    if member is None:
        return "shardes-centre"
    mirrored = "-mirrored" if member.sigma < 0 else ""
    return f"shardes-iteration-{member.iteration}-direction-{member.direction}{mirrored}"


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

    def add(self, outcome: EpisodeOutcome) -> None:
        """Count an episode that is over."""
        self.environment_seconds += outcome.seconds
        self.num_reencoded += outcome.num_reencoded

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


class ActiveCohorts:
    """Cohorts that a rank plays in turn; where one is over, the next takes its place.

    Args:
        numbers: The rank's cohorts; none on a rank that only takes part in others' forwards.
        begin: Begins a cohort.
        end: Takes in an episode that is over.
    """

    def __init__(
        self,
        numbers: Iterable[int],
        *,
        begin: Callable[[int], Cohort],
        end: TakeEpisode,
    ) -> None:
        self._numbers, self._begin, self._end = iter(numbers), begin, end
        self._cohorts: list[Cohort | None] = [None] * COHORTS_AT_ONCE
        self._has_begun = False

    def next_turn(self, slot: int) -> Turn | None:
        """Return what a slot asks next; None if nothing is left for it."""
        if not self._has_begun:
            self._has_begun = True
            for each in range(COHORTS_AT_ONCE):  # all at once: the second one's environments begin meanwhile
                self._refill(each)
        while (cohort := self._cohorts[slot]) is not None:
            asked = cohort.advance()
            for index, outcome in cohort.outcomes().items():
                self._end(index, outcome)
            if asked:
                return Turn(cohort.number, asked)
            cohort.close()
            self._refill(slot)
        return None

    def answer(self, slot: int, answers: list[TokenAnswer]) -> None:
        """Give a slot's cohort the answers to what it asked; on a rank that has none, do nothing."""
        cohort = self._cohorts[slot]
        if cohort is not None and answers:
            cohort.answer(answers)

    def close(self) -> None:
        """Give up all episodes that are not over."""
        for cohort in self._cohorts:
            if cohort is not None:
                cohort.close()

    def _refill(self, slot: int) -> None:
        self._cohorts[slot] = None
        if (number := next(self._numbers, None)) is not None:
            self._cohorts[slot] = self._begin(number)


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

    Attributes:
        counts: What was counted of episodes, on this rank.
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
    ) -> None:
        self._engine, self._encoder, self._mesh = engine, encoder, mesh
        self._settings, self._sampler, self._text = settings, sampler, text
        self._pad_id, self._end_ids = pad_id, end_ids
        self._timer, self.counts = timer, EpisodeCounts()

    def play(
        self,
        prompts: PromptBatch,
        *,
        share: WorkShare,
        model: str,
        take: TakeEpisode,
        generate: Generate,
    ) -> bool:
        """Play this rank's cohorts to their end; a collective of a replica where forwards are.

        Args:
            prompts: The episodes.
            share: This rank's share of the cohorts.
            model: Name of what is loaded, for harnesses.
            take: Takes in each episode that is over, on the rank that it counts on.
            generate: Has the engine answer.

        Returns:
            Whether all logits were finite.

        Raises:
            TooLittleMemoryError: There was too little memory.
        """
        plan, settings = prompts.episodes, prompts.scorer.task.episodes
        assert plan is not None, "the problems are episodes"
        assert settings is not None
        limits = EpisodeLimits(self._settings.max_new_tokens, plan.max_context, settings.max_turns)

        def begin(number: int) -> Cohort:
            count = prompts.samples_per_prompt
            return begin_cohort(
                number,
                {index: prompts.rows[index // count] for index in plan.cohorts[number]},
                scorer=prompts.scorer,
                encoder=self._encoder,
                limits=limits,
                model=model,
                end_ids=self._end_ids,
            )

        def end(index: int, outcome: EpisodeOutcome) -> None:
            self.counts.add(outcome)
            take(index, outcome)

        numbers = range(len(plan.cohorts))[share.place :: share.num_places]
        active = ActiveCohorts(numbers if share.is_counted else (), begin=begin, end=end)
        is_finite = True
        try:
            while True:
                is_over = True
                for slot in range(COHORTS_AT_ONCE):
                    with self._timer("environment"):
                        turn = active.next_turn(slot)
                    turn = self._agree(turn)
                    if turn is None:
                        continue
                    is_over = False
                    batch, order = self._batch(turn, prompts)
                    output = generate(batch, prompts)
                    if output is None:
                        raise TooLittleMemoryError
                    is_finite &= output.is_finite or not turn.prompts
                    by_place = dict(zip(order, output.tokens, strict=True))
                    active.answer(slot, [self._answer(by_place[i], p) for i, p in enumerate(turn.prompts)])
                if is_over:
                    return is_finite
        finally:
            active.close()

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
