"""Cohorts of episodes whose environments are reset and stepped in processes of the rank."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardes.environments.base import Episode, Observation, StepResult
from shardes.errors import UserError
from shardes.rollout.conversation import (
    Conversation,
    ConversationError,
    as_messages,
    num_characters,
    shortened,
)
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.episode_results import EpisodeOutcome, Truncation
from shardes.rollout.tool_calls import parse_tool_calls
from shardes.rollout.turns import EpisodeLimits, TokenAnswer, TokenPrompt


class EnvironmentCohort:
    """Episodes that one rank plays together, each turn of all that are not over as one micro-batch.

    Args:
        number: Which cohort it is.
        episodes: Its episodes by index, which have been reset.
        encoder: Makes tokens of conversations.
        limits: Limits of an episode.

    Attributes:
        number: Argument ``number``.
    """

    def __init__(
        self,
        number: int,
        episodes: Mapping[int, "PlayedEpisode"],
        *,
        encoder: PromptEncoder,
        limits: EpisodeLimits,
    ) -> None:
        self.number = number
        self._living = dict(episodes)
        self._encoder = encoder
        self._limits = limits
        self._num_turns = 0
        self._ended: dict[int, EpisodeOutcome] = {}

    def advance(self) -> list[TokenPrompt]:
        """Wait for the environments; return what the episodes that go on are asked."""
        for index, episode in list(self._living.items()):
            outcome = episode.advance(self._limits)
            if outcome is not None:
                self._ended[index] = outcome
                del self._living[index]
        contexts = {index: episode.conversation.tokens for index, episode in self._living.items()}
        return [
            TokenPrompt(index, tokens, self._limits.room(len(tokens)), draw=self._num_turns)
            for index, tokens in contexts.items()
        ]

    def answer(self, answers: Sequence[TokenAnswer]) -> None:
        """Send answers on to the environments."""
        self._num_turns += 1
        for episode, answer in zip(self._living.values(), answers, strict=True):
            message = None
            if episode.tools is not None:
                message = parse_tool_calls(
                    answer.text,
                    answer.token_ids,
                    self._encoder.tokenizer,
                    prefix=episode.conversation.tokens,
                    tools=episode.tools,
                )
            episode.answer(answer, message)

    def outcomes(self) -> dict[int, EpisodeOutcome]:
        """Return, by index, what has become of the episodes that have ended since the last call."""
        ended, self._ended = self._ended, {}
        return ended

    def close(self) -> None:
        """Give up the episodes that are not over."""
        for episode in self._living.values():
            episode.handle.close()


class PlayedEpisode:
    """One episode on its rank.

    Args:
        handle: Handle of the environment, which has been reset.
        conversation: What was said.
        system: System message of an episode that begins with a text; see ``EpisodeSettings``.
        tools: JSON schemas of what the model may call; None: nothing.

    Attributes:
        handle: Argument ``handle``.
        conversation: Argument ``conversation``.
        tools: Argument ``tools``.
    """

    def __init__(
        self,
        handle: Episode,
        conversation: Conversation,
        *,
        system: str | None,
        tools: Sequence[dict[str, Any]] | None,
    ) -> None:
        self.handle, self.conversation, self.tools = handle, conversation, tools
        self._system = system
        self._prompt: Observation = ""
        self._answer = TokenAnswer([], "", was_cut=False)
        self._rewards: list[float] = []
        self._num_tokens: list[int] = []
        self._num_cut = 0
        self._numbers: dict[str, float] = {}
        self._seconds = 0.0
        self._has_begun = False

    def advance(self, limits: EpisodeLimits) -> EpisodeOutcome | None:
        """Wait for the environment, and take in what it says; return the outcome if the episode is over."""
        result = self._wait()
        if self._has_begun:
            self._rewards.append(result.reward)
        if result.failure is not None or result.is_done:
            return self._outcome(failure=result.failure)
        longest = limits.max_context * self.conversation.longest_token
        if num_characters(result.observation) > longest:
            self.conversation.messages += as_messages(shortened(result.observation, longest))
            return self._finish("turns" if len(self._num_tokens) == limits.max_turns else "context")
        try:
            if self._has_begun:
                self.conversation.observe(result.observation)
            else:
                self._prompt = with_system(result.observation, self._system)
                self.conversation.begin(self._prompt)
                self._has_begun = True
        except (ConversationError, UserError) as error:
            return self._outcome(failure=str(error))
        if len(self._num_tokens) == limits.max_turns:
            return self._finish("turns")
        if limits.room(len(self.conversation.tokens)) < 1:
            return self._finish("context")
        return None

    def answer(self, answer: TokenAnswer, message: dict[str, Any] | None) -> None:
        """Send an answer on."""
        # What the template has opened for the answer is a part of it, though no token of it.
        text = self.conversation.opened + answer.text
        self._answer = replace(answer, text=text)
        self._num_tokens.append(len(answer.token_ids))
        self._num_cut += answer.was_cut
        self.conversation.answer(answer.token_ids, text, message)
        self.handle.step(text, message=message)

    def _wait(self) -> StepResult:
        result = self.handle.wait()
        self._numbers |= result.numbers
        self._seconds += result.seconds
        return result

    def _outcome(self, *, failure: str | None = None, truncation: Truncation | None = None) -> EpisodeOutcome:
        """Return what has become of the episode, and give it up."""
        self.handle.close()
        return EpisodeOutcome(
            self._prompt,
            self.conversation.messages,
            self._answer.text,
            self._answer.token_ids,
            self._rewards,
            self._num_tokens,
            self._num_cut,
            truncation,
            failure,
            self._numbers,
            self.conversation.num_reencoded,
            self._seconds,
        )

    def _finish(self, truncation: Truncation) -> EpisodeOutcome:
        """End the episode at a limit; an environment may still reward what was done."""
        self.handle.finish()
        result = self._wait()
        if self._rewards:
            self._rewards[-1] += result.reward
        else:
            self._rewards.append(result.reward)
        return self._outcome(failure=result.failure, truncation=truncation)


def with_system(observation: Observation, system: str | None) -> Observation:
    """Return a first observation with a system message before it, in place of its own; None: as it is."""
    if not system:
        return observation
    messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
    return [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
