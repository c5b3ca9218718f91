"""An episode where its environment is: calls of the object, whose failures are data."""

import asyncio
import inspect
import os
import time
from collections.abc import Awaitable, Generator
from typing import Any

from shardes.environments.ambience import Ambience, seed_of
from shardes.environments.answers import (
    Answer,
    answer_to_finish,
    answer_to_reset,
    answer_to_step,
    checked_numbers,
)
from shardes.environments.loading import EnvironmentFactory
from shardes.rewards.worker import described, exit_with

Call = tuple[Any, ...]
"""``("reset", row)``, ``("step", completion, message)``, ``("finish",)`` or ``("close",)``."""

# What an environment may raise without ending its process; others are a user's who interrupts this one.
_FAILURES = (Exception, SystemExit, asyncio.CancelledError)
_OWN_MODULES = (__name__, answer_to_step.__module__)
# Bound here, as guards against other people's programs replace functions of modules.
_getpid, _perf_counter = os.getpid, time.perf_counter


class HostedEpisode:
    """An environment from its making to its ``close``, in any process.

    Besides what the protocol has, an object may have ``numbers``, a dict or a function that returns one, and
    ``finish()``, which returns the last reward as a limit is reached. A ``step`` with a parameter ``message``
    gets what the model has said as a message, too.

    Args:
        factory: Maker of the environment.
    """

    def __init__(self, factory: EnvironmentFactory) -> None:
        self._factory = factory
        self._environment: Any = None
        self._ambience = Ambience(0)
        self._process = _getpid()

    def call(self, call: Call) -> Answer | Awaitable[Answer]:
        """Call the environment; if what it returns has to be awaited, so has the answer."""
        begun = _perf_counter()
        try:
            if call[0] == "reset":
                self._ambience = Ambience(seed_of(call[1]))
            with self._ambience:
                returned = self._returned(call)
        except _FAILURES as error:
            self._leave_if_forked(error)
            return self._failure(error, call, begun)
        self._leave_if_forked(returned)
        if inspect.isawaitable(returned):
            return self._later(returned, call, begun)
        return self._answer(returned, call, begun)

    async def _later(self, awaitable: Awaitable[Any], call: Call, begun: float) -> Answer:
        try:
            returned = await _Enclosed(self, awaitable)
        except _FAILURES as error:
            return self._failure(error, call, begun)
        return self._answer(returned, call, begun)

    def _returned(self, call: Call) -> Any:
        match call:
            case ("reset", row):
                self._environment = self._factory.make()
                return self._environment.reset(**row)
            case ("step", completion, message):
                if "message" in _parameters(self._environment.step):
                    return self._environment.step(completion, message=message)
                return self._environment.step(completion)
            case ("finish",):
                finish = getattr(self._environment, "finish", None)
                return finish() if callable(finish) else 0.0
        close = getattr(self._environment, "close", None)
        self._environment = None
        return close() if callable(close) else None

    def _answer(self, returned: Any, call: Call, begun: float) -> Answer:
        try:
            with self._ambience:
                answer = _checked(returned, call[0])
                numbers = getattr(self._environment, "numbers", None)
                numbers = numbers() if callable(numbers) else numbers
                answer["numbers"] = {} if numbers is None else checked_numbers(numbers)
        except _FAILURES as error:
            self._leave_if_forked(error)
            return self._failure(error, call, begun)
        self._leave_if_forked(returned)
        return answer | {"seconds": _perf_counter() - begun}

    def _failure(self, error: BaseException, call: Call, begun: float) -> Answer:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and trace.tb_frame.f_globals.get("__name__") in _OWN_MODULES:
            error = error.with_traceback(None)  # its line tells the user nothing
        return {
            "failure": described(error, f"in {call[0]}"),
            "lacks_memory": isinstance(error, MemoryError),
            "seconds": _perf_counter() - begun,
        }

    def _leave_if_forked(self, value: Any) -> None:
        """End this process, as Python would, if the environment has forked it and come back here."""
        if _getpid() != self._process:
            exit_with(value)


class _Enclosed:
    """Awaitable whose every piece runs in the episode's ambience, whoever runs between the pieces."""

    def __init__(self, episode: HostedEpisode, awaitable: Awaitable[Any]) -> None:
        self._episode = episode
        self._awaitable = awaitable

    def __await__(self) -> Generator[Any, Any, Any]:
        episode, coroutine = self._episode, _awaiting(self._awaitable)
        resume, value = coroutine.send, None
        while True:
            try:
                with episode._ambience:
                    waited_for = resume(value)
            except BaseException as error:
                episode._leave_if_forked(error)
                if isinstance(error, StopIteration):
                    return error.value
                raise
            episode._leave_if_forked(None)
            try:
                value = yield waited_for
                resume = coroutine.send
            except BaseException as error:
                resume, value = coroutine.throw, error


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _checked(returned: Any, method: str) -> Answer:
    match method:
        case "reset":
            return answer_to_reset(returned)
        case "step":
            return answer_to_step(returned)
        case "finish":
            return answer_to_finish(returned)
    return {}


def _parameters(function: Any) -> Any:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()
