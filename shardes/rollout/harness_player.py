"""Rank's side of harnesses: episodes that ask by themselves, through the endpoint, answered in lock-step.

In each turn every living episode of a cohort waits for at least one answer, or has ended. What they ask is
answered together, in the order of the episodes and then of arrival, so a run has the same bytes on any
number of ranks where the harness does the same whenever it gets the same answers, and asks one thing at a
time.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from shardes.config.task import TaskConfig
from shardes.endpoint.desk import Ask, Desk, Seat
from shardes.endpoint.errors import ApiError, context_too_long
from shardes.endpoint.requests import Request, SamplingSettings
from shardes.endpoint.responses import Choice, Reply
from shardes.endpoint.server import EndpointServer
from shardes.environments.base import Message
from shardes.environments.harness import HarnessSpec
from shardes.environments.harness_pool import HarnessOutcome, HarnessPool
from shardes.errors import UserError
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.episode_results import EpisodeOutcome, Truncation
from shardes.rollout.tool_calls import parse_tool_calls
from shardes.tasks.base import ChatTemplate, Prompt, Row
from shardes.utils.closing import Closing

MAX_DRAWS = 2**20
"""Series of random numbers that the answers in an episode are drawn by."""


@dataclass(frozen=True)
class TokenPrompt:
    """Prompt that an engine is to answer.

    Attributes:
        episode: Index of the episode that asks, among all of the evaluation; several prompts may have the
            same.
        token_ids: Tokens of the prompt.
        max_new_tokens: Largest number of tokens of the answer.
        is_greedy: True to take the most likely tokens, also where the run draws them.
        draw: Which series of the episode's random numbers draws the tokens, below ``MAX_DRAWS``.
        stop: Texts that end the answer, besides the run's own. An engine may leave them to the player, which
            cuts the answer's text before them.
    """

    episode: int
    token_ids: list[int]
    max_new_tokens: int
    is_greedy: bool
    draw: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenAnswer:
    """Answer of an engine.

    Attributes:
        token_ids: Its tokens, with the one that ended it.
        text: Its text.
        was_cut: Whether it ended because it had no more room.
    """

    token_ids: Sequence[int]
    text: str
    was_cut: bool


class AnswerFunction(Protocol):
    """Answers the prompts of one turn of a cohort, in one micro-batch."""

    def __call__(self, prompts: Sequence[TokenPrompt], *, cohort: int) -> Sequence[TokenAnswer]:
        """Return the answers in the order of the prompts, of which there is at least one.

        Args:
            prompts: In the order of the episodes, and then of arrival.
            cohort: Number of the cohort; a function of the data alone.
        """


@dataclass(frozen=True)
class HarnessLimits:
    """Limits of what episodes may ask.

    Attributes:
        max_new_tokens: Tokens of an answer; a request may ask for fewer.
        max_context: Tokens of a prompt and its answer; an answer gets what the prompt leaves.
        max_turns: Requests of an episode.
    """

    max_new_tokens: int
    max_context: int
    max_turns: int


class HarnessPlayer(Closing):
    """Plays the episodes of a task with a harness: an endpoint, and processes that use it.

    Args:
        config: Harness and limits of its processes.
        sampling: How the run draws tokens.
        encoder: Turns texts and chats into tokens.
        chat: The template that chats go through.
        port: Port of the endpoint; 0: the kernel chooses one.
        num_lanes: Cohorts that are played at a time, which share the processes.

    Attributes:
        num_at_once: Episodes of a cohort at a time: the others begin, in order, as these end. If it is less
            than a cohort has, what is computed together, and so the last bits, depend on it.

    Raises:
        UserError: The harness cannot be used, or the port is in use.
    """

    def __init__(
        self,
        config: TaskConfig,
        *,
        sampling: SamplingSettings,
        encoder: PromptEncoder,
        chat: ChatTemplate,
        port: int = 0,
        num_lanes: int = 2,
    ) -> None:
        self.num_at_once = config.reward_workers // num_lanes
        if not self.num_at_once:
            raise UserError(
                f"task.reward_workers: got {config.reward_workers}, but a harness runs in a process for each "
                f"of its episodes, and {num_lanes} are played at a time at least; wanted {num_lanes} or more"
            )
        self._encoder, self._chat = encoder, chat
        self.desk = Desk()
        self._server = EndpointServer(self.desk, sampling, port=port)
        try:
            self._pool = HarnessPool(
                HarnessSpec.of(config.harness or config.environment or "", config.environment_arguments),
                self.desk,
                timeout_seconds=config.reward_timeout_seconds,
                max_workers=config.reward_workers,
                memory_bytes=config.reward_memory_bytes,
                may_isolate=config.reward_isolation == "auto",
            )
        except BaseException:
            self._server.close()
            raise

    @property
    def num_kills(self) -> int:
        """Return how many processes of harnesses have ended before their time, so far."""
        return self._pool.num_kills

    def close(self) -> None:
        """End all episodes, their processes, and the endpoint."""
        self.desk.close()
        self._pool.close()
        self._server.close()

    def begin(
        self, number: int, episodes: Mapping[int, Row], *, model: str, limits: HarnessLimits
    ) -> "HarnessCohort":
        """Begin a cohort, and return at once.

        Args:
            number: Which cohort it is.
            episodes: By index, in order, the row of each of its episodes.
            model: Name of the model that they ask.
            limits: Limits of what they may ask.
        """
        return HarnessCohort(number, episodes, model=model, limits=limits, player=self)

    def start(self, seat: Seat, row: Row) -> "Future[HarnessOutcome]":
        """Begin an episode at its place."""
        return self._pool.begin(seat, row, self._server.url_of(seat))

    def encode(self, prompt: list[Message] | str | list[int], request: Request) -> list[int]:
        """Return the tokens of one of a request's prompts.

        Raises:
            ApiError: It cannot be encoded.
        """
        encoder = self._encoder
        param = "messages" if request.is_chat else "prompt"
        try:
            if isinstance(prompt, str):
                return encoder.text_tokens(prompt)
            if not request.is_chat:
                encoder.check_tokens(prompt)  # type: ignore[arg-type]
                return list(prompt)  # type: ignore[arg-type]
            if request.tools:
                param = "tools"
                encoder.chats.check_tools(self._chat, request.tools)
                param = "messages"
            messages: Prompt = prompt  # type: ignore[assignment]
            if encoder.chats.has_own_tokens:
                return encoder.chats.tokens(messages, self._chat, request.tools)
            return encoder.rendered_tokens(encoder.chats.text(messages, self._chat, request.tools))
        except UserError as error:
            raise ApiError(f"{param}: {error}", param=param) from None

    def choice(self, answer: TokenAnswer, prompt: TokenPrompt, request: Request) -> Choice:
        """Return an answer as the one who asked gets it."""
        text, was_stopped = before_stop(answer.text, request.stop)
        reason = "length" if answer.was_cut and not was_stopped else "stop"
        calls: tuple[tuple[str, dict[str, Any]], ...] = ()
        if request.tools and not (answer.was_cut and not was_stopped):
            tokenizer = self._encoder.tokenizer
            # Of an answer that is cut before a text, the tokens say more than it does.
            ids = [] if was_stopped else list(answer.token_ids)
            message = parse_tool_calls(text, ids, tokenizer, prefix=prompt.token_ids, tools=request.tools)
            functions = [call["function"] for call in message.get("tool_calls", ())]
            calls = tuple((function["name"], function["arguments"]) for function in functions)
            if calls:
                text = message.get("content") or ""
        return Choice(text, "tool_calls" if calls else reason, len(answer.token_ids), calls)  # type: ignore[arg-type]


@dataclass
class _Played:
    """One episode on its rank."""

    index: int
    seat: Seat
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
            {"environment_seconds": found.seconds},
        )


@dataclass(frozen=True)
class _Plan:
    """A request, and where its prompts are among those of the turn."""

    ask: Ask
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
        player: Plays them.

    Attributes:
        number: Argument ``number``.
    """

    def __init__(
        self,
        number: int,
        episodes: Mapping[int, Row],
        *,
        model: str,
        limits: HarnessLimits,
        player: HarnessPlayer,
    ) -> None:
        self.number = number
        self._waiting = deque(episodes.items())
        self._model, self._limits, self._player = model, limits, player
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
                    self._player.desk.answer(ask, refusal)
            if self._prompts:
                return self._prompts

    def answer(self, answers: Sequence[TokenAnswer]) -> None:
        """Give the answers to what ``advance`` returned."""
        for plan in self._plans:
            request = plan.ask.request
            found = [answers[row] for row in plan.rows]
            choices = [
                self._player.choice(answer, self._prompts[row], request)
                for answer, row in zip(found, plan.rows, strict=True)
            ]
            # The most likely answer is the only one: asked for several, it is given several times.
            copies = request.num_choices * len(request.prompts) // len(choices)
            reply = Reply(tuple(c for c in choices for _ in range(copies)), plan.num_prompt_tokens)
            self._note(plan, choices, found)
            self._player.desk.answer(plan.ask, reply)
        self._plans, self._prompts = [], []

    def outcomes(self) -> dict[int, EpisodeOutcome]:
        """Return, by index, what has become of the episodes that have ended since the last call."""
        ended, self._ended = self._ended, {}
        return {index: played.outcome() for index, played in ended.items()}

    def close(self) -> None:
        """Give up the episodes that are not over."""
        self._waiting.clear()
        for episode in self._living:
            self._player.desk.end(episode)

    def _begin_some(self) -> None:
        """Begin episodes, in order, as long as there are places."""
        while self._waiting and len(self._living) < self._player.num_at_once:
            index, row = self._waiting.popleft()
            seat = self._player.desk.admit(self._model)
            self._living[seat.episode] = _Played(index, seat, self._player.start(seat, row))

    def _next_asks(self) -> list[Ask]:
        while True:
            asks = self._player.desk.wait(list(self._living))
            assert asks is not None, "there is no time limit"
            remaining = set(self._player.desk.living(list(self._living)))
            for episode in [each for each in self._living if each not in remaining]:
                played = self._living.pop(episode)
                self._ended[played.index] = played
            if not self._waiting or len(self._living) == self._player.num_at_once:
                return [ask for ask in asks if ask.episode in self._living]
            self._begin_some()  # before anybody is answered: which are asked together must not be chance

    def _plan(self, ask: Ask, played: _Played) -> None:
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
        encoded = [self._player.encode(prompt, request) for prompt in request.prompts]
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
            self._prompts.append(
                TokenPrompt(played.index, ids, room, request.is_greedy, draw, request.stop)
            )
        rows = range(start, len(self._prompts))
        played.num_draws += len(rows)
        self._plans.append(_Plan(ask, played, sum(map(len, encoded)), rows))

    @staticmethod
    def _draw(request: Request, num_drawn: int, place: int) -> int:
        """Return which random numbers draw an answer: those of the seed, or ones that the episode has not had."""
        half = MAX_DRAWS // 2
        if request.seed is None:
            return (num_drawn + place) % half
        digest = hashlib.blake2b(f"{request.seed}/{place}".encode(), digest_size=8).digest()
        return half + int.from_bytes(digest, "big") % half

    @staticmethod
    def _note(plan: _Plan, choices: Sequence[Choice], answers: Sequence[TokenAnswer]) -> None:
        """Keep what was said, for people to read."""
        played, request = plan.played, plan.ask.request
        asked = request.prompts[-1]
        messages = asked if request.is_chat else [{"role": "user", "content": asked}]
        if not played.messages:
            played.first = asked if isinstance(asked, str) else list(messages)  # type: ignore[arg-type]
        played.messages = [*messages, {"role": "assistant", "content": answers[-1].text}]  # type: ignore[misc]
        played.answer, played.answer_ids = answers[-1].text, answers[-1].token_ids
        played.num_tokens.append(sum(len(answer.token_ids) for answer in answers))
        played.num_cut += sum(choice.finish_reason == "length" for choice in choices)


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return a text up to the first of some others in it, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def play(
    player: HarnessPlayer,
    cohorts: Mapping[int, Mapping[int, Row]],
    answer: AnswerFunction,
    *,
    model: str,
    limits: HarnessLimits,
    take: Callable[[int, EpisodeOutcome], None],
    num_lanes: int = 2,
) -> None:
    """Play cohorts to their end, some of them in turn: the episodes of one go on while another is answered.

    Args:
        player: Plays them.
        cohorts: By number, the episodes of each; see ``HarnessPlayer.begin``.
        answer: Answers.
        model: Name of the model that is asked.
        limits: Limits of what episodes may ask.
        take: Takes in each episode that is over: its index, and its outcome.
        num_lanes: Cohorts at a time.
    """
    waiting = deque(cohorts.items())
    lanes: deque[HarnessCohort] = deque()
    try:
        while waiting or lanes:
            while waiting and len(lanes) < num_lanes:
                number, episodes = waiting.popleft()
                lanes.append(player.begin(number, episodes, model=model, limits=limits))
            cohort = lanes.popleft()
            prompts = cohort.advance()
            for index, outcome in cohort.outcomes().items():
                take(index, outcome)
            if prompts:
                lanes.append(cohort)
                cohort.answer(answer(prompts, cohort=cohort.number))
    finally:
        for cohort in lanes:
            cohort.close()
