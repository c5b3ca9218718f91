"""Turns of a cohort of episodes: what is asked at the same time, and what is answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shardes.rollout.episode_results import EpisodeOutcome

MAX_DRAWS = 2**20
"""Series of random numbers that the answers in an episode are drawn by."""


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits of an episode.

    Attributes:
        max_new_tokens: Tokens of an answer.
        max_context: Tokens of the whole episode, the last answer included.
        max_turns: Answers.
    """

    max_new_tokens: int
    max_context: int
    max_turns: int

    def room(self, num_tokens: int) -> int:
        """Return how many tokens an answer may have after a context of some length."""
        return min(self.max_new_tokens, self.max_context - num_tokens)


@dataclass(frozen=True)
class TokenPrompt:
    """Prompt that an engine is to answer.

    Attributes:
        episode: Index of the episode that asks, among all of the evaluation; several prompts may have the
            same.
        token_ids: Tokens of the prompt.
        max_new_tokens: Largest number of tokens of the answer.
        draw: Which series of the episode's random numbers draws the tokens, below ``MAX_DRAWS``.
        is_greedy: True to take the most likely tokens, also where the run draws them.
    """

    episode: int
    token_ids: list[int]
    max_new_tokens: int
    draw: int = 0
    is_greedy: bool = False


@dataclass(frozen=True)
class TokenAnswer:
    """Answer of an engine.

    Attributes:
        token_ids: Its tokens, with the one that ended it.
        text: Its text.
        was_cut: Whether it ended because it had no more room.
    """

    token_ids: list[int]
    text: str
    was_cut: bool


class Cohort(Protocol):
    """Episodes that are played together by one rank.

    Attributes:
        number: Which cohort it is.
    """

    number: int

    def advance(self) -> list[TokenPrompt]:
        """Wait until all living episodes ask; return what is to be answered, nothing if all are over."""

    def answer(self, answers: Sequence[TokenAnswer]) -> None:
        """Give the answers to what ``advance`` returned, in its order."""

    def outcomes(self) -> Mapping[int, EpisodeOutcome]:
        """Return, by index, what has become of the episodes that have ended since the last call."""

    def close(self) -> None:
        """Give up the episodes that are not over."""
