"""Cohorts of harnesses' episodes: what they ask as tokens, in lock-step, and the answers as they get them.

In each turn every living episode of a cohort waits for at least one answer, or has ended. What they ask is
answered together, in the order of the episodes and then of arrival, so a run has the same bytes on any
number of ranks where the harness does the same whenever it gets the same answers, and asks one thing at a
time.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from shardes.endpoint.errors import ApiError, context_too_long
from shardes.endpoint.request_queue import Credentials, PendingRequest, RequestQueue
from shardes.endpoint.requests import Request
from shardes.endpoint.responses import Choice, FinishReason, Reply
from shardes.environments.base import HarnessOutcome, Message
from shardes.errors import UserError
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.episode_results import EpisodeOutcome, Truncation
from shardes.rollout.tool_calls import parse_tool_calls
from shardes.rollout.turns import MAX_DRAWS, EpisodeLimits, TokenAnswer, TokenPrompt
from shardes.tasks.base import ChatTemplate, Prompt, Row


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return a text up to the first of some others in it, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class RequestTexts:
    """Turns what is asked into tokens, and answers into what the one who asked gets.

    Args:
        encoder: Turns texts and chats into tokens.
        chat: The template that chats go through.
    """

    def __init__(self, encoder: PromptEncoder, chat: ChatTemplate) -> None:
        self._encoder, self._chat = encoder, chat
        # Tools that the template shows.
        self._known_tools: set[str] = set()

    def encode(self, prompt: Any, request: Request) -> list[int]:
        """Return the tokens of one of a request's prompts.

        Raises:
            ApiError: It cannot be encoded.
        """
        param = "messages" if request.is_chat else "prompt"
        try:
            if isinstance(prompt, str):
                return self._encoder.text_tokens(prompt)
            if not request.is_chat:
                self._encoder.check_tokens(prompt)
                return list(prompt)
            param = "tools"
            self._check_tools(request.tools)
            param = "messages"
            return self._encoder.chat_tokens(prompt, self._chat, request.tools)
        except UserError as error:
            raise ApiError(f"{param}: {error}", param=param) from None

    def _check_tools(self, tools: Sequence[dict[str, Any]]) -> None:
        key = json.dumps(tools)
        if tools and key not in self._known_tools:
            self._encoder.chats.check_tools(self._chat, tools)
            self._known_tools.add(key)

    def choice(self, answer: TokenAnswer, prompt: TokenPrompt, request: Request) -> Choice:
        """Return an answer as the one who asked gets it."""
        text, was_stopped = before_stop(answer.text, request.stop)
        reason: FinishReason = "length" if answer.was_cut and not was_stopped else "stop"
        calls: tuple[tuple[str, dict[str, Any]], ...] = ()
        if request.tools and reason == "stop":
            # Of an answer that is cut before a text, the tokens say more than it does.
            ids = [] if was_stopped else list(answer.token_ids)
            tokenizer = self._encoder.tokenizer
            message = parse_tool_calls(text, ids, tokenizer, prefix=prompt.token_ids, tools=request.tools)
            functions = [call["function"] for call in message.get("tool_calls", ())]
            calls = tuple((function["name"], function["arguments"]) for function in functions)
            if calls:
                reason, text = "tool_calls", message.get("content") or ""
        return Choice(text, reason, len(answer.token_ids), calls)


@dataclass
class _Played:
    """One episode on its rank."""

    index: int
    credentials: Credentials
    future: "Future[HarnessOutcome]"
    first: Prompt = ""
    messages: list[Message] = field(default_factory=list)
    answer: str = ""
    answer_ids: Sequence[int] = ()
    num_tokens: list[int] = field(default_factory=list)
    num_cut: int = 0
    num_draws: int = 0
    truncation: Truncation | None = None

    def outcome(self) -> EpisodeOutcome:
        """Return what has become of it, once it has ended."""
        found = self.future.result()
        return EpisodeOutcome(
            self.first,
            self.messages,
            self.answer,
            self.answer_ids,
            [] if found.failure is not None else [found.reward],
            self.num_tokens,
            self.num_cut,
            self.truncation,
            found.failure,
            seconds=found.seconds,
        )


@dataclass(frozen=True)
class _Plan:
    """A request, and where its prompts are among those of the turn."""

    ask: PendingRequest
    played: _Played
    num_prompt_tokens: int
    rows: range


class HarnessCohort:
    """Episodes that are played together by one rank.

    Call ``advance`` and ``answer`` in turn, until ``advance`` returns nothing.

    Args:
        number: Which cohort it is.
        episodes: By index, in order, the row of each of its episodes.
        model: Name of the model that they ask.
        limits: Limits of what they may ask.
        queue: Where they ask.
        texts: Makes tokens of what they ask.
        start: Begins an episode at its place.
        num_at_once: Episodes at a time; the others begin, in order, as these end.

    Attributes:
        number: Argument ``number``.
    """

    def __init__(
        self,
        number: int,
        episodes: Mapping[int, Row],
        *,
        model: str,
        limits: EpisodeLimits,
        queue: RequestQueue,
        texts: RequestTexts,
        start: Callable[[Credentials, Row], "Future[HarnessOutcome]"],
        num_at_once: int,
    ) -> None:
        self.number = number
        self._waiting = deque(episodes.items())
        self._model, self._limits, self._queue, self._texts = model, limits, queue, texts
        self._start, self._num_at_once = start, num_at_once
        self._living: dict[str, _Played] = {}
        self._ended: dict[int, _Played] = {}
        self._plans: list[_Plan] = []
        self._prompts: list[TokenPrompt] = []
        self._begin_some()

    def advance(self) -> list[TokenPrompt]:
        """Wait until all living episodes ask; return what is to be answered, nothing if all are over.

        Requests that cannot be answered are refused here, and those who asked go on.
        """
        while True:
            asks = self._next_asks()
            if not asks:
                return []
            self._plans, self._prompts = [], []
            for ask in asks:
                played = self._living[ask.episode]
                try:
                    self._plan(ask, played)
                except ApiError as refusal:
                    self._queue.answer(ask, refusal)
            if self._prompts:
                return self._prompts

    def answer(self, answers: Sequence[TokenAnswer]) -> None:
        """Give the answers to what ``advance`` returned."""
        for plan in self._plans:
            request = plan.ask.request
            found = [answers[row] for row in plan.rows]
            choices = [
                self._texts.choice(answer, self._prompts[row], request)
                for answer, row in zip(found, plan.rows, strict=True)
            ]
            # The most likely answer is the only one: asked for several, it is given several times.
            copies = request.num_choices * len(request.prompts) // len(choices)
            reply = Reply(tuple(c for c in choices for _ in range(copies)), plan.num_prompt_tokens)
            self._note(plan, choices, found)
            self._queue.answer(plan.ask, reply)
        self._plans, self._prompts = [], []

    def outcomes(self) -> dict[int, EpisodeOutcome]:
        """Return, by index, what has become of the episodes that have ended since the last call."""
        ended, self._ended = self._ended, {}
        return {index: played.outcome() for index, played in ended.items()}

    def close(self) -> None:
        """Give up the episodes that are not over."""
        self._waiting.clear()
        for episode in self._living:
            self._queue.end(episode)

    def _begin_some(self) -> None:
        """Begin episodes, in order, as long as there are places."""
        while self._waiting and len(self._living) < self._num_at_once:
            index, row = self._waiting.popleft()
            credentials = self._queue.admit(self._model)
            self._living[credentials.episode] = _Played(index, credentials, self._start(credentials, row))

    def _next_asks(self) -> list[PendingRequest]:
        while True:
            asks = self._queue.wait(list(self._living))
            assert asks is not None, "there is no time limit"
            remaining = set(self._queue.living(list(self._living)))
            for episode in [each for each in self._living if each not in remaining]:
                played = self._living.pop(episode)
                self._ended[played.index] = played
            if not self._waiting or len(self._living) == self._num_at_once:
                return [ask for ask in asks if ask.episode in self._living]
            self._begin_some()  # before anybody is answered: which are asked together must not be chance

    def _plan(self, ask: PendingRequest, played: _Played) -> None:
        """Note the prompts of a request.

        Raises:
            ApiError: It cannot be answered.
        """
        request, limits = ask.request, self._limits
        if ask.number >= limits.max_turns:
            played.truncation = "turns"
            raise ApiError(
                f"the episode has asked {limits.max_turns} times, as often as it may (task.max_turns)",
                code="max_turns_exceeded",
            )
        encoded = [self._texts.encode(prompt, request) for prompt in request.prompts]
        longest = max(map(len, encoded))
        if longest >= limits.max_context:
            played.truncation = "context"
            param = "messages" if request.is_chat else "prompt"
            raise context_too_long(longest, limits.max_context, param=param)
        most = min(limits.max_new_tokens, request.max_tokens or limits.max_new_tokens)
        count = 1 if request.is_greedy else request.num_choices
        start = len(self._prompts)
        for place in range(len(encoded) * count):
            ids = encoded[place // count]
            room = min(most, limits.max_context - len(ids))
            draw = self._draw(request, played.num_draws, place)
            self._prompts.append(TokenPrompt(played.index, ids, room, draw, request.is_greedy))
        rows = range(start, len(self._prompts))
        played.num_draws += len(rows)
        self._plans.append(_Plan(ask, played, sum(map(len, encoded)), rows))

    @staticmethod
    def _draw(request: Request, num_drawn: int, place: int) -> int:
        """Return which random numbers draw an answer: the seed's, or ones that the episode has not had."""
        half = MAX_DRAWS // 2
        if request.seed is None:
            return (num_drawn + place) % half
        digest = hashlib.blake2b(f"{request.seed}/{place}".encode(), digest_size=8).digest()
        return half + int.from_bytes(digest, "big") % half

    @staticmethod
    def _note(plan: _Plan, choices: Sequence[Choice], answers: Sequence[TokenAnswer]) -> None:
        """Keep what was said, for people to read."""
        played, request = plan.played, plan.ask.request
        asked: Any = request.prompts[-1]
        messages: list[Message] = asked if request.is_chat else [{"role": "user", "content": asked}]
        if not played.messages:
            played.first = asked if isinstance(asked, str) else messages
        played.messages = [*messages, {"role": "assistant", "content": answers[-1].text}]
        played.answer, played.answer_ids = answers[-1].text, answers[-1].token_ids
        played.num_tokens.append(sum(len(answer.token_ids) for answer in answers))
        played.num_cut += sum(choice.finish_reason == "length" for choice in choices)
