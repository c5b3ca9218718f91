"""State of a process that an episode takes for its own, though it shares the process with others."""

import contextlib
import json
import os
import random
import sys
import zlib
from collections.abc import Mapping
from typing import Any


class Ambience:
    """What an episode has drawn, entered and set in its process, there only while the episode is called.

    The global generators of ``random`` and numpy, the working directory and the environment variables. So an
    episode that seeds ``random`` plays alike whoever is played in between.

    Args:
        seed: Seed of both generators when the episode begins.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random: Any = random.Random(seed).getstate()
        self._numpy: Any = None
        self._directory: str | None = None
        self._variables: dict[str, str] | None = None
        self._outside: tuple[Any, Any, str | None, dict[str, str]] | None = None

    def __enter__(self) -> None:
        self._outside = random.getstate(), _numpy_state(), _directory(), dict(os.environ)
        random.setstate(self._random)
        if (numpy := _numpy_random()) is not None:
            numpy.seed(self._seed) if self._numpy is None else numpy.set_state(self._numpy)
        _enter(self._directory)
        _set_variables(self._variables)

    def __exit__(self, *_: object) -> None:
        assert self._outside is not None
        state, numpy_state, directory, variables = self._outside
        self._random, self._numpy = random.getstate(), _numpy_state()
        random.setstate(state)
        if numpy_state is not None and (numpy := _numpy_random()) is not None:
            numpy.set_state(numpy_state)
        now = _directory()
        self._directory = None if now == directory else now
        if self._directory is not None:
            _enter(directory)
        self._variables = None if os.environ == variables else dict(os.environ)
        if self._variables is not None:
            _set_variables(variables)


def seed_of(row: Mapping[str, Any]) -> int:
    """Return a seed that is the same for equal rows, in any process."""
    try:
        text = json.dumps(row, sort_keys=True, default=lambda value: type(value).__qualname__)
    except (TypeError, ValueError):
        return 0
    return zlib.crc32(text.encode(errors="replace"))


def _numpy_random() -> Any:
    """Return numpy's global generator; None if nobody has imported it."""
    module = sys.modules.get("numpy.random")
    return module if hasattr(module, "set_state") else None


def _numpy_state() -> Any:
    numpy = _numpy_random()
    return None if numpy is None else numpy.get_state()


def _directory() -> str | None:
    with contextlib.suppress(OSError):  # somebody has removed it
        return os.getcwd()  # noqa: PTH109 - a Path for each call takes too long
    return None


def _enter(directory: str | None) -> None:
    if directory is not None:
        with contextlib.suppress(OSError):
            os.chdir(directory)


def _set_variables(variables: dict[str, str] | None) -> None:
    if variables is not None and os.environ != variables:
        os.environ.clear()
        os.environ.update(variables)
