"""Adapter of TextArena: its games of one player."""

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from shardes.environments.adapters.common import (
    check_index,
    check_known,
    load_package,
    override,
    take_seed,
)
from shardes.environments.ambience import Ambience
from shardes.environments.base import Observation

# Of every game, TextArena registers variants that differ in how they show it to a model.
_SHOWN = ("-raw", "-train")


def make(name: str, arguments: Mapping[str, Any]) -> "partial[TextArenaEnvironment]":
    """Return what makes an environment of the game of this name.

    Args:
        name: Name of a game of TextArena, such as ``Sudoku-v0-easy``; without a version: its ``-v0``.
        arguments: Arguments of the game's class, which replace those of its name, and ``seed`` (0).

    Raises:
        ValueError: The package is missing, the game is unknown, takes more players than one, needs what is
            not here, or does not take an argument.
    """
    package = load_package("textarena", adapter="textarena", extra="textarena")
    registered = package.envs.registration.ENV_REGISTRY
    games = [game for game in registered if not game.endswith(_SHOWN)]
    name = f"{name}-v0" if f"{name}-v0" in games else name
    check_known(name, games, kind="game of TextArena")
    options = dict(arguments)
    seed = take_seed(options)
    try:
        with _without_downloads():
            _check_arguments(package, name, options)
        probe = TextArenaEnvironment(package, name, options, seed=seed)
        with Ambience(0):
            probe.reset(index=0)
    except Exception as error:
        raise ValueError(f"The game {name} of TextArena cannot be played here: {_reason(error)}") from error
    return partial(TextArenaEnvironment, package, name, options, seed=seed)


class TextArenaEnvironment:
    """One game.

    The model is shown what the game says after each of its moves, without the move itself, which is in the
    conversation already. The reward is the game's, and comes with its end.

    Args:
        package: The package textarena.
        name: Name of the game.
        options: Arguments of its class.
        seed: The seed of a game is this and the row's index.
    """

    def __init__(self, package: Any, name: str, options: Mapping[str, Any], *, seed: int) -> None:
        self._package = package
        self._name = name
        self._options = options
        self._seed = seed
        self.numbers: dict[str, float] = {}

    def reset(self, index: int, **row: Any) -> Observation:
        """Begin the game of an index; columns with the name of a given argument replace it."""
        seed = self._seed + check_index(index)
        # Games draw from the process's generators, of which each episode has a state of its own (Ambience).
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with _without_downloads():
            self._game = self._make_game(override(self._options, row))
            self._game.reset(num_players=1, seed=seed)
        if not isinstance(self._game.state, self._package.SinglePlayerState):
            raise ValueError(f"{self._name} is a game of several players")
        self.numbers = {}
        return self._observe()

    def step(self, completion: str) -> tuple[Observation, float, bool]:
        """Make a move; the game's answer, its reward if it has ended, and whether it has."""
        is_done, _ = self._game.step(action=completion)
        if not is_done:
            return self._observe(), 0.0, False
        rewards, information = self._game.close()
        reward = (rewards or {}).get(0)
        # A few games, such as Cryptarithm, give the reason of an invalid move in place of its reward.
        reward = float(reward) if isinstance(reward, int | float) else 0.0
        is_lost = bool(information[0].get("invalid_move"))
        self.numbers = {"success": float(reward >= 1 and not is_lost), "invalid_move": float(is_lost)}
        return "", reward, True

    def close(self) -> None:
        """Do nothing: a game holds memory alone."""

    def _make_game(self, options: Mapping[str, Any]) -> Any:
        """Return the game with what it does to actions, but without what shows the whole game every turn."""
        wrappers = self._package.envs.registration.ENV_REGISTRY[self._name].default_wrappers or []
        game = self._package.make(_plain(self._package, self._name), **options)
        for wrapper in wrappers:
            if issubclass(wrapper, self._package.ActionWrapper):
                game = wrapper(game)
        return game

    def _observe(self) -> str:
        """Return what the game has said since the last call."""
        _, messages = self._game.get_observation()
        own = self._package.ObservationType.PLAYER_ACTION
        return "\n\n".join(str(text).strip() for _, text, kind in messages if kind != own)


def _plain(package: Any, name: str) -> str:
    """Return the name of the variant without wrappers."""
    return f"{name}-raw" if f"{name}-raw" in package.envs.registration.ENV_REGISTRY else name


def _check_arguments(package: Any, name: str, options: Mapping[str, Any]) -> None:
    if not options:
        return
    game = package.make(_plain(package, name))
    known = [
        parameter for parameter in inspect.signature(type(game).__init__).parameters if parameter != "self"
    ]
    for option in options:
        check_known(option, [*known, "seed"], kind="argument")


def _reason(error: Exception) -> str:
    """Return one line that says why a game could not be made."""
    if isinstance(error, LookupError) and "nltk" in str(error).lower():
        return (
            "it needs word lists of NLTK, which are not here and are never fetched by a worker: "
            "python -m nltk.downloader words averaged_perceptron_tagger_eng"
        )
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip() if lines else ""
    if isinstance(error, AssertionError | ValueError) and "player" in text.lower():
        return f"only games of one player can be ({text})"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _without_downloads() -> Iterator[None]:
    """Keep games from fetching word lists whenever their module is imported, in every worker anew."""
    import nltk

    download = nltk.download
    nltk.download = lambda *_args, **_options: False
    try:
        yield
    finally:
        nltk.download = download
