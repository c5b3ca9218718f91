"""Worker's side of harnesses: programs of the user's that play an episode through the endpoint.

A harness is ``async def harness(row, client, **arguments) -> float``, or a plain function. Here it is called
as rewards are, in a process of rewards, one episode at a time, so whatever it does there is undone or ended
as theirs is. ``harness_pool`` has the rank's side.
"""

import importlib
import inspect
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from shardes.rewards import fork_server

try:  # before processes are forked, which then have it at once
    import openai
    import openai.resources.chat
    import openai.resources.completions
except ImportError:
    openai = None

Harness = Callable[..., Any]


def serve(connection: socket.socket) -> None:
    """Serve a pool as a process of rewards does, one of which is ``play``."""
    fork_server.serve_rewards(connection)


async def play(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    row: Sequence[Mapping[str, Any] | None],
    url: Sequence[str],
    key: Sequence[str],
    model: Sequence[str],
    reference: str,
    arguments: Mapping[str, Any],
) -> list[float]:
    """Play one episode, with the signature of a reward for one answer.

    Args:
        prompts: Nothing that a harness needs.
        completions: The same.
        row: The episode's row; None only checks whether the harness can be called.
        url: The episode's base URL.
        key: Its API key.
        model: Name of the model that it asks.
        reference: The harness, which has been imported.
        arguments: Its further arguments.

    Returns:
        The episode's return.

    Raises:
        TypeError: The harness does not take these arguments, or returns no number.
    """
    harness = _imported(reference)
    if row[0] is None:
        _check(harness, arguments)
        return [0.0]
    # The process's environment is put back after the call.
    os.environ.update(OPENAI_BASE_URL=url[0], OPENAI_API_KEY=key[0], OPENAI_MODEL=model[0])
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    # Nothing is lost on loopback; and lock-step may have an answer wait for longer than any time limit.
    http_client = openai.DefaultAsyncHttpxClient(verify=False, trust_env=False)
    async with openai.AsyncOpenAI(max_retries=0, timeout=None, http_client=http_client) as client:
        found = harness(dict(row[0]), client, **arguments)
        if inspect.isawaitable(found):
            found = await found
    if hasattr(found, "item"):  # a tensor, or a number of NumPy's
        found = found.item()
    if not isinstance(found, int | float):
        raise TypeError(
            f"the harness returned {found!r:.200} ({type(found).__name__}); wanted a number, the return of "
            "the episode"
        )
    return [float(found)]


def _imported(reference: str) -> Harness:
    """Return a harness that this process has imported by its reference."""
    source, _, name = reference.rpartition(":")
    modules = [importlib.import_module(source)] if not source.endswith(".py") else _modules_of(source)
    found: Harness = next(getattr(module, name) for module in modules if hasattr(module, name))
    return found


def _modules_of(source: str) -> list[ModuleType]:
    """Return the modules that have been imported from a file."""
    file = Path(source).expanduser().resolve()
    return [
        module
        for module in list(sys.modules.values())
        if isinstance(path := getattr(module, "__file__", None), str) and Path(path).resolve() == file
    ]


def _check(harness: Harness, arguments: Mapping[str, Any]) -> None:
    if openai is None:
        raise ValueError(
            "openai is not installed, of which a harness gets a client: pip install 'shardes[endpoint]'"
        )
    try:
        inspect.signature(harness).bind({}, None, **arguments)
    except TypeError as error:
        raise TypeError(
            f"the harness cannot be called ({error}); wanted async def harness(row, client, **arguments)"
        ) from None
    check = getattr(harness, "check", None)
    if check is not None:
        check(**arguments)
