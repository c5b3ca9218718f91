"""Episodes of many turns, played in lock-step, so that a run has the same bytes on any number of ranks.

Episodes are cut into cohorts by their order alone. A cohort belongs to one rank from its first turn to its
last, so ranks exchange nothing between turns; in each turn, those of its episodes that are not over are one
micro-batch. A rank plays two cohorts in turn: the environments of one take their steps while the other's
answers are generated.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardes.config.schema import RolloutConfig
from shardes.distributed.group import Mesh
from shardes.environments.base import Episode, EpisodeSettings, Observation, StepResult
from shardes.errors import UserError
from shardes.rollout.batching import MicroBatch, compose
from shardes.rollout.conversation import Conversation, ConversationError
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.engines.base import Completions, Engine
from shardes.rollout.episode_results import EpisodeOutcome, Truncation
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.sampling import TokenSampler
from shardes.rollout.share import WorkShare
from shardes.rollout.tool_calls import parse_tool_calls
from shardes.utils.timers import PhaseTimer

# Cohorts that a rank plays at a time: one steps while the other generates.
NUM_LANES = 2

Asked = tuple[int, list[int]]
"""An episode that is to be answered: its index, and the tokens of its context."""

TakeEpisode = Callable[[int, EpisodeOutcome, bool], None]
"""Takes in an episode that is over: its index, its outcome, and whether it is of the first cohort of all."""


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

    def play(
        self,
        prompts: PromptBatch,
        *,
        share: WorkShare,
        take: TakeEpisode,
        generate: Callable[[MicroBatch, PromptBatch], Completions | None],
    ) -> bool:
        """Play this rank's cohorts to their end; a collective of a replica where forwards are.

        Args:
            prompts: The episodes.
            share: This rank's share of the cohorts.
            take: Takes in each episode that is over, on the rank that it counts on.
            generate: Has the engine answer; returns None if there was too little memory.

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
                lanes = [self._begin(prompts, numbers, take) for _ in lanes]
            while True:
                is_over = True
                for lane in range(NUM_LANES):
                    turn = None
                    if share.is_counted:
                        lanes[lane], turn = self._next_turn(prompts, lanes[lane], numbers, take)
                    turn = self._agree(turn)
                    if turn is None:
                        continue
                    is_over = False
                    batch = self._batch(turn, prompts, limit=plan.max_context)
                    output = generate(batch, prompts)
                    if output is None:
                        raise TooLittleMemoryError
                    is_finite &= output.is_finite or not turn.asked
                    cohort = lanes[lane]
                    if cohort is not None and turn.asked:
                        cohort.answer(dict(zip(batch.rows, output.tokens, strict=True)))
                if is_over:
                    return is_finite
        finally:
            for cohort in lanes:
                if cohort is not None:
                    cohort.close()

    def _begin(self, prompts: PromptBatch, numbers: deque[int], take: TakeEpisode) -> "Cohort | None":
        """Begin the rank's next cohort; return None if there is none."""
        if not numbers:
            return None
        plan, scorer = prompts.episodes, prompts.scorer
        assert plan is not None
        assert scorer.environments is not None
        assert scorer.task.episodes is not None
        number = numbers.popleft()
        indices = plan.cohorts[number]
        rows = [prompts.rows[index // prompts.samples_per_prompt] for index in indices]
        settings, tools = scorer.task.episodes, scorer.environments.tools
        players = [
            Player(
                index,
                handle,
                Conversation(
                    self._encoder,
                    scorer.task.chat,
                    tools,
                    as_chat=settings.system is not None,
                    end_ids=self._end_ids,
                ),
                settings,
                has_tools=tools is not None,
            )
            for index, handle in zip(indices, scorer.environments.begin(rows), strict=True)
        ]
        limits = plan.max_context, self._settings.max_new_tokens
        return Cohort(number, players, limits=limits, take=take, parts=self)

    def _next_turn(
        self, prompts: PromptBatch, cohort: "Cohort | None", numbers: deque[int], take: TakeEpisode
    ) -> "tuple[Cohort | None, Turn | None]":
        """Return the lane's cohort, which may be a new one, and what it asks next, if anything."""
        with self._timer("environment"):
            while cohort is not None:
                asked = cohort.advance()
                if asked:
                    return cohort, Turn(cohort.number, cohort.num_turns, asked)
                cohort.close()
                cohort = self._begin(prompts, numbers, take)
        return None, None

    def _agree(self, turn: "Turn | None") -> "Turn | None":
        """Return what this rank generates now: its own turn, another's, or nothing where no rank has any."""
        shard = self._mesh.shard
        if self._engine.ranks_per_forward > 1:
            record = None if turn is None else [turn.cohort, turn.number, turn.asked]
            found = shard.broadcast_json(record)
            return None if found is None else Turn(found[0], found[1], [(i, ids) for i, ids in found[2]])
        if not self._engine.forward_is_collective:
            return turn
        if not shard.any(turn is not None):
            return None
        return turn if turn is not None else Turn(0, 0, [])

    def _batch(self, turn: "Turn", prompts: PromptBatch, *, limit: int) -> MicroBatch:
        """Return the micro-batch of a turn; of one token that nobody looks at, where there is none."""
        most = self._settings.max_new_tokens
        asked = turn.asked or [(0, [self._pad_id])]
        (batch,) = compose(
            [tokens for _, tokens in asked],
            micro_batch_size=len(asked),
            pad_id=self._pad_id,
            max_new_tokens=most,
            max_positions=limit,
        )
        indices = tuple(asked[row][0] for row in batch.rows)
        batch = replace(batch, rows=indices, cohort=turn.cohort if turn.asked else None)
        if self._sampler is not None:
            plan, count = prompts.episodes, prompts.samples_per_prompt
            assert plan is not None
            uniforms = self._sampler.uniforms(
                iteration=plan.iteration,
                prompts=[index // count for index in indices],
                samples=[index % count for index in indices],
                num_tokens=most,
                turn=turn.number,
            )
            batch = replace(batch, uniforms=uniforms)
        return batch.to(self._mesh.world.device)

    def read(self, tokens: list[int], player: "Player") -> tuple[str, dict[str, Any] | None]:
        """Return an answer as text, and as a message where the model may call tools."""
        text = self._text(tokens)
        message = None
        if player.has_tools:
            message = parse_tool_calls(text, tokens, self._encoder.tokenizer)
        return text, message

    def was_cut(self, tokens: list[int], budget: int) -> bool:
        """Return whether an answer ended because it had no more room."""
        return len(tokens) >= budget and tokens[-1] not in self._end_ids

    def count(self, result: StepResult) -> None:
        """Count the time of a step."""
        self._counts.environment_seconds += result.seconds


@dataclass(frozen=True)
class Turn:
    """What a cohort asks next.

    Attributes:
        cohort: Its number.
        number: Turns before.
        asked: Its living episodes; none for a rank that only takes part in others' forwards.
    """

    cohort: int
    number: int
    asked: Sequence[Asked]


class Player:
    """One episode on its rank.

    Args:
        index: Which episode it is.
        handle: Handle of the environment, which was reset.
        conversation: What was said.
        settings: Limits of the episode.
        has_tools: Whether the model may call tools.
    """

    def __init__(
        self,
        index: int,
        handle: Episode,
        conversation: Conversation,
        settings: EpisodeSettings,
        *,
        has_tools: bool,
    ) -> None:
        self.index, self.handle, self.conversation = index, handle, conversation
        self.settings, self.has_tools = settings, has_tools
        self._prompt: Observation = ""
        self._answer = ""
        self._answer_ids: list[int] = []
        self._rewards: list[float] = []
        self._num_tokens: list[int] = []
        self._num_cut = 0
        self._numbers: dict[str, float] = {}
        self._has_begun = False

    def advance(self, *, limit: int, count: Callable[[StepResult], None]) -> EpisodeOutcome | None:
        """Wait for the environment, and take in what it says; return the outcome if the episode is over."""
        result = self.handle.wait()
        count(result)
        self._numbers |= result.numbers
        if self._has_begun:
            self._rewards.append(result.reward)
        if result.failure is not None or result.is_done:
            return self.outcome(failure=result.failure)
        try:
            if self._has_begun:
                self.conversation.observe(result.observation)
            else:
                self._prompt = with_system(result.observation, self.settings.system)
                self.conversation.begin(self._prompt)
                self._has_begun = True
        except (ConversationError, UserError) as error:
            return self.outcome(failure=str(error))
        if len(self._num_tokens) == self.settings.max_turns:
            return self._finish("turns", count)
        if len(self.conversation.tokens) >= limit:
            return self._finish("context", count)
        return None

    def answer(self, tokens: list[int], text: str, message: dict[str, Any] | None, *, was_cut: bool) -> None:
        """Send an answer on."""
        self._answer, self._answer_ids = text, tokens
        self._num_tokens.append(len(tokens))
        self._num_cut += was_cut
        self.conversation.answer(tokens, text, message)
        self.handle.step(text, message=message)

    def outcome(self, *, failure: str | None = None, truncation: Truncation | None = None) -> EpisodeOutcome:
        """Return what has become of the episode, and give it up."""
        self.handle.close()
        return EpisodeOutcome(
            self._prompt,
            self.conversation.messages,
            self._answer,
            self._answer_ids,
            self._rewards,
            self._num_tokens,
            self._num_cut,
            truncation,
            failure,
            self._numbers,
        )

    def _finish(self, truncation: Truncation, count: Callable[[StepResult], None]) -> EpisodeOutcome:
        """End the episode at a limit; an environment may still reward what was done."""
        self.handle.finish()
        result = self.handle.wait()
        count(result)
        self._numbers |= result.numbers
        if self._rewards:
            self._rewards[-1] += result.reward
        else:
            self._rewards.append(result.reward)
        return self.outcome(failure=result.failure, truncation=truncation)


class Cohort:
    """Episodes that are played together by one rank.

    Args:
        number: Which cohort it is.
        players: Its episodes, which have been reset.
        limits: Most tokens of an episode, and of an answer.
        take: Takes in episodes that are over.
        parts: The player of cohorts, which reads answers.

    Attributes:
        number: Argument ``number``.
        num_turns: Turns so far.
    """

    def __init__(
        self,
        number: int,
        players: Sequence[Player],
        *,
        limits: tuple[int, int],
        take: TakeEpisode,
        parts: EpisodePlayer,
    ) -> None:
        self.number, self.num_turns = number, 0
        self._living = {player.index: player for player in players}
        self._max_context, self._max_new_tokens = limits
        self._take, self._parts = take, parts

    def advance(self) -> list[Asked]:
        """Wait for the environments; return the episodes that go on, each with its context."""
        for index, player in list(self._living.items()):
            outcome = player.advance(limit=self._max_context, count=self._parts.count)
            if outcome is not None:
                self._take(index, outcome, self.number == 0)
                del self._living[index]
        return [(index, player.conversation.tokens) for index, player in self._living.items()]

    def answer(self, answers: Mapping[int, list[int]]) -> None:
        """Send answers, by episode, on to the environments."""
        self.num_turns += 1
        for index, tokens in answers.items():
            player = self._living[index]
            budget = min(self._max_new_tokens, self._max_context - len(player.conversation.tokens))
            text, message = self._parts.read(tokens, player)
            player.answer(tokens, text, message, was_cut=self._parts.was_cut(tokens, budget))

    def close(self) -> None:
        """Give up the episodes that are not over."""
        for player in self._living.values():
            player.handle.close()


def with_system(observation: Observation, system: str | None) -> Observation:
    """Return a first observation with a system message before it, in place of its own; None: as it is."""
    if not system:
        return observation
    messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
    return [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
