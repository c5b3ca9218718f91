"""Calls of reward functions, whose failures are data; light enough to be imported in any process."""

import asyncio
import contextlib
import inspect
import itertools
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NoReturn

from shardes.rewards.batch import RewardBatch, RewardOutput
from shardes.rewards.importing import import_functions
from shardes.rewards.signature import Signature
from shardes.tasks.base import Component

# Beyond it, the squares in the standard deviation would overflow.
MAX_REWARD = 1e100

# Bound here, as guards against other people's programs replace functions of this module.
_exit, _getpid = os._exit, os.getpid

# What a reward may raise and be called again in the same process.
_FAILURES = (Exception, SystemExit, asyncio.CancelledError)
_MAX_MESSAGE_CHARACTERS = 2000

# How long coroutines that a call has left behind may take to end when they are cancelled.
_CANCEL_SECONDS = 1.0


class RewardCaller:
    """Caller of the reward functions of some components.

    Args:
        components: Components whose functions are called; references to functions are imported.

    Attributes:
        after_call: Called after each call of a function.

    Raises:
        ValueError: A function does not exist, or importing it fails.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = components
        references = [c.function for c in components if isinstance(c.function, str)]
        imported = dict(zip(references, import_functions(references), strict=True))
        self._functions = [
            imported[c.function] if isinstance(c.function, str) else c.function for c in components
        ]
        self._signatures = [Signature.of(function) for function in self._functions]
        for component, signature in zip(components, self._signatures, strict=True):
            try:
                signature.check_arguments(component.arguments)
            except ValueError as error:
                raise ValueError(f"reward {component.name!r}: {error}") from None
        self._loop = _EventLoop()
        self._process = _getpid()
        self.after_call: Callable[[], object] = lambda: None

    @property
    def columns(self) -> list[list[str] | None]:
        """Return the columns that each component looks at; None: all."""
        return [None if s.columns is None else sorted(s.columns) for s in self._signatures]

    def judge(self, indices: Sequence[int], batch: RewardBatch) -> RewardOutput:
        """Judge completions by some components.

        A component gets all completions in one call. If that fails, it is called for each completion by
        itself, so that only those fail that cause it.

        Args:
            indices: Indices of the components.
            batch: The completions.

        Returns:
            The components' values; their weighted sum is not computed here.
        """
        outputs = []
        for i, found in zip(indices, self._attempt([(i, batch) for i in indices]), strict=True):
            if isinstance(found, str) and len(batch) > 1:
                parts = self._attempt([(i, single) for single in batch.alone()])
                joined = RewardOutput.concatenated([self._or_failed(part, i, 1) for part in parts])
                found = replace(joined, first_failure=found)
            outputs.append(self._or_failed(found, i, len(batch)))
        return RewardOutput.merged(outputs)

    def _or_failed(self, found: RewardOutput | str, i: int, num_completions: int) -> RewardOutput:
        if isinstance(found, str):
            return RewardOutput.failed([self._components[i].name], num_completions, found)
        return found

    def _attempt(self, calls: Sequence[tuple[int, RewardBatch]]) -> list[RewardOutput | str]:
        """Return the output of each call, or why there is none; coroutines run concurrently."""
        returned = [self._call(i, batch) for i, batch in calls]
        awaitables = {place: value for place, value in enumerate(returned) if inspect.isawaitable(value)}
        if awaitables:
            values = self._loop.run(
                [self._settle(value, len(calls[place][1])) for place, value in awaitables.items()]
            )
            self.after_call()
            for place, value in zip(awaitables, values, strict=True):
                returned[place] = value
        return [
            described(value, f"reward {label!r}")
            if isinstance(value, BaseException)
            else _checked(value, label, batch)
            for value, label, batch in (
                (value, self._components[i].name, batch)
                for value, (i, batch) in zip(returned, calls, strict=True)
            )
        ]

    def _call(self, i: int, batch: RewardBatch) -> Any:
        """Return what the function returns, or the exception that it raises."""
        component = self._components[i]
        completions: list[Any] = list(batch.completions)
        if component.takes_messages:
            completions = [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(batch.prompts, batch.completions, strict=True)
            ]
        positional, keywords = _bind(self._signatures[i], completions, batch)
        given = component.arguments
        if getattr(self._functions[i], "is_per_completion", False):
            given = {name: [value] * len(batch) for name, value in given.items()}
        try:
            # What the configuration gives counts more than a column of that name.
            value = _listed(self._functions[i](*positional, **(keywords | dict(given))), len(batch))
        except _FAILURES as error:
            value = error
        self._leave_if_forked(value)
        self.after_call()
        return value

    async def _settle(self, awaitable: Awaitable[Any], num_values: int) -> Any:
        """Return what a coroutine returns, or the exception that it raises."""
        try:
            value = _listed(await awaitable, num_values)
        except _FAILURES as error:
            value = error
        self._leave_if_forked(value)
        return value

    def _leave_if_forked(self, value: Any) -> None:
        """End this process, as Python would, if the reward has forked it and come back here."""
        if _getpid() != self._process:
            exit_with(value)


def exit_with(value: Any) -> NoReturn:
    """End a process that returns a value, or raises it."""
    status = 0
    try:
        if isinstance(value, SystemExit):
            status = value.code if isinstance(value.code, int) else int(value.code is not None)
            if value.code is not None and not isinstance(value.code, int):
                sys.stderr.write(f"{value.code}\n")
        elif isinstance(value, BaseException):
            status = 1
            sys.excepthook(type(value), value, value.__traceback__)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        _exit(status & 0xFF)


def _bind(
    signature: Signature, completions: list[Any], batch: RewardBatch
) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional arguments of a call and those by name."""
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    prompts = list(batch.prompts)
    if "completions" in signature.names:  # by name, so that a function need not take the prompts
        keywords["completions"] = completions
        if signature.takes_any or "prompts" in signature.names:
            keywords["prompts"] = prompts
    else:
        positional = [prompts, completions]
    for key, values in batch.columns.items():
        if signature.takes_any or key in signature.names:
            keywords[key] = list(values)
    if "completion_ids" in signature.names:
        keywords["completion_ids"] = [list(ids) for ids in batch.token_ids]
    return positional, keywords


class _EventLoop:
    """Event loop of all calls, so that what a function keeps open stays usable."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._thread: ThreadPoolExecutor | None = None

    def run(self, coroutines: Sequence[Any]) -> list[Any]:
        """Run coroutines at the same time; also where a loop runs already, as in a notebook."""
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="rewards")
        if self._thread is not None:
            return self._thread.submit(self._run, coroutines).result()
        return self._run(coroutines)

    def _run(self, coroutines: Sequence[Any]) -> list[Any]:
        values, is_clean = self._runner.run(_gather(coroutines))
        if not is_clean:  # what goes on in that loop never runs again
            self._runner = asyncio.Runner()
        return values


async def _gather(coroutines: Sequence[Any]) -> tuple[list[Any], bool]:
    """Return what coroutines return, and whether all that they started has ended."""
    values = await asyncio.gather(*coroutines, return_exceptions=True)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    pending = (await asyncio.wait(left, timeout=_CANCEL_SECONDS))[1] if left else set()
    return values, not pending


def _listed(returned: Any, num_values: int) -> Any:
    """Return the values of an iterator, such as a generator, and at most one too many of them."""
    return list(itertools.islice(returned, num_values + 1)) if isinstance(returned, Iterator) else returned


def _checked(returned: Any, label: str, batch: RewardBatch) -> RewardOutput | str:
    """Return a component's output, or why what its function returned is none."""
    if hasattr(returned, "tolist"):  # a tensor, or an array
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str | bytes):
        return (
            f"TypeError: the reward returned {shown(returned)}; wanted a list of {len(batch)} numbers "
            f"(reward {label!r})"
        )
    returned = list(returned)
    if len(returned) != len(batch):
        return (
            f"ValueError: the reward returned {len(returned)} values for {len(batch)} completions "
            f"(reward {label!r})"
        )
    values = [None if given is None else number(given) for given in returned]
    has_failed = [given is not None and value is None for given, value in zip(returned, values, strict=True)]
    first_failure = None
    if any(has_failed):
        first_failure = (
            f"ValueError: the reward returned {shown(returned[has_failed.index(True)])}, which is no usable "
            f"number (reward {label!r})"
        )
    return RewardOutput({label: values}, has_failed, first_failure)


def number(given: Any) -> float | None:
    """Convert a value, also numpy's or a tensor of one element, to a float; None if it is no usable one."""
    if isinstance(given, str | bytes):
        return None
    try:
        value = float(given.item() if hasattr(given, "item") else given)
    except Exception:  # a hostile object may raise anything
        return None
    return value if abs(value) < MAX_REWARD else None


def shown(value: Any) -> str:
    """Return a value and its type, for messages."""
    try:
        text = repr(value)
    except Exception:
        text = "a value that cannot be shown"
    return f"{text if len(text) <= 80 else text[:80] + '...'} ({type(value).__name__})"


def described(error: BaseException, place: str) -> str:
    """Describe an exception, with the line that raised it, and the place that it concerns."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}, " if trace is not None else ""
    try:
        text = str(error)
    except Exception:
        text = "a message that cannot be shown"
    if len(text) > _MAX_MESSAGE_CHARACTERS:
        text = f"{text[:_MAX_MESSAGE_CHARACTERS]}..."
    return f"{type(error).__name__}: {text} ({where}{place})"
