"""Adapter of Gymnasium: environments whose observations and actions are text, or can be made of text."""

import importlib
import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from shardes.environments.adapters.common import (
    check_index,
    check_known,
    load_package,
    override,
    take_seed,
)
from shardes.environments.base import Observation

_COLORS = ("gray", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_COLORED = re.compile(r"\x1b\[([0-9;]*)m(.*?)\x1b\[0?m", re.DOTALL)
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_INTEGER = re.compile(r"(?<![\w.])-?\d+(?![\w.]*\w)")


def make(name: str, arguments: Mapping[str, Any]) -> "partial[GymnasiumEnvironment]":
    """Return what makes an environment of this id.

    Args:
        name: Id of the environment, such as ``Taxi-v4``, or ``package.module:Id-v0`` to import first what
            registers it.
        arguments: Arguments of ``gymnasium.make``, and ``actions``, a mapping of words to actions;
            ``prompt``, text before the first observation, instead of one that says how to answer; ``seed``
            (0).

    Raises:
        ValueError: The package is missing, the environment is unknown or cannot be made with the arguments,
            or its actions are neither text nor discrete and ``actions`` does not name them.
    """
    package = load_package("gymnasium", adapter="gymnasium", extra="gymnasium")
    if ":" in name:
        _register(name.partition(":")[0])
    identifier = name.rpartition(":")[2]
    check_known(identifier, package.registry, kind="environment of gymnasium")
    options = dict(arguments)
    seed = take_seed(options)
    prompt = options.pop("prompt", None)
    named = options.pop("actions", None)
    if "render_mode" not in options and "ansi" in _render_modes(package, identifier):
        options["render_mode"] = "ansi"
    try:
        probe = package.make(identifier, disable_env_checker=True, **options)
    except Exception as error:
        raise ValueError(f"gymnasium cannot make {name} with these arguments: {error}") from error
    try:
        actions = _Actions(package, probe.action_space, named, name=name)
    finally:
        probe.close()
    return partial(GymnasiumEnvironment, package, identifier, options, actions, prompt=prompt, seed=seed)


class GymnasiumEnvironment:
    """One episode of an environment of Gymnasium.

    An observation is shown as it is if it is text; else as the environment draws itself in text, with colors
    as tags, such as ``<red>S</red>``; else as JSON. A completion without an action changes nothing, and is
    answered with what an answer has to have.

    Args:
        package: The package gymnasium.
        identifier: Id of the environment.
        options: Arguments of ``gymnasium.make``.
        actions: Its actions as text.
        prompt: Text before the first observation; None: how to answer.
        seed: The seed of an episode is this and the row's index.
    """

    def __init__(
        self,
        package: Any,
        identifier: str,
        options: Mapping[str, Any],
        actions: "_Actions",
        *,
        prompt: str | None,
        seed: int,
    ) -> None:
        self._package = package
        self._identifier = identifier
        self._options = options
        self._actions = actions
        self._prompt = actions.instruction if prompt is None else prompt
        self._seed = seed
        self._environment: Any = None
        self.numbers: dict[str, float] = {}

    def reset(self, index: int, **row: Any) -> Observation:
        """Begin the episode of an index; columns with the name of a given argument replace it."""
        seed = self._seed + check_index(index)
        self.numbers = {"invalid_actions": 0.0}
        options = override(self._options, row)
        self._environment = self._package.make(self._identifier, disable_env_checker=True, **options)
        observation, _ = self._environment.reset(seed=seed)
        shown = self._show(observation)
        return f"{self._prompt}\n\n{shown}" if self._prompt else shown

    def step(self, completion: str) -> tuple[Observation, float, bool]:
        """Do the action of a completion."""
        action = self._actions.find(completion)
        if action is None:
            self.numbers["invalid_actions"] += 1
            return f"There is no action in this answer. {self._actions.instruction}", 0.0, False
        observation, reward, is_terminated, is_truncated, information = self._environment.step(action)
        is_done = bool(is_terminated or is_truncated)
        shown = "" if is_done else self._show(observation)
        for key in ("success", "is_success"):
            if key in information:
                self.numbers["success"] = float(information[key])
        return shown, float(reward), is_done

    def close(self) -> None:
        """Close the environment of Gymnasium."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def _show(self, observation: Any) -> str:
        if isinstance(observation, str):
            return observation
        if self._environment.render_mode == "ansi":
            return _without_escapes(str(self._environment.render())).strip("\n")
        return json.dumps(_plain(observation))


class _Actions:
    """Actions of an environment as text.

    Args:
        package: The package gymnasium.
        space: The environment's space of actions.
        named: Actions by the word that stands for each; None: numbers, or the completion itself.
        name: Name of the environment, for messages.

    Attributes:
        instruction: Sentence that says how to answer.

    Raises:
        ValueError: The space needs names and has none, or names stand for what is no action of it.
    """

    def __init__(self, package: Any, space: Any, named: Any, *, name: str) -> None:
        spaces = package.spaces
        self._named: dict[str, Any] = {}
        self._range = range(0)
        self.instruction = ""
        if named is not None:
            if not isinstance(named, Mapping) or not named:
                raise ValueError(f"The environment's argument actions is {named!r}; it maps words to actions")
            for word, action in named.items():
                converted = _converted(spaces, space, action)
                if not space.contains(converted):
                    raise ValueError(
                        f"The environment's argument actions: {action!r} ({word}) is no action of {name}, "
                        f"whose actions are {space}"
                    )
                self._named[str(word).lower()] = converted
            self.instruction = f"Answer with one of these actions: {', '.join(map(str, named))}."
        elif isinstance(space, spaces.Discrete):
            first = int(space.start)
            self._range = range(first, first + int(space.n))
            self.instruction = f"Answer with the number of an action, from {first} to {self._range[-1]}."
        elif not isinstance(space, spaces.Text):
            raise ValueError(
                f"The actions of {name} are {space}, neither text nor discrete: name those that the model "
                "may choose in task.environment_arguments, as actions: {word: action, ...}"
            )
        words = sorted(self._named, key=len, reverse=True)
        self._word = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)

    def find(self, completion: str) -> Any:
        """Return the last action that a completion names; None if it names none."""
        if self._named:
            words = self._word.findall(completion)
            return self._named[words[-1].lower()] if words else None
        if self._range:
            numbers = _INTEGER.findall(completion)
            return int(numbers[-1]) if numbers and int(numbers[-1]) in self._range else None
        return completion.strip()


def _register(module: str) -> None:
    """Import a module that registers environments.

    Raises:
        ValueError: It cannot be imported.
    """
    try:
        importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"The adapter gymnasium cannot import {module}, to register: {error}") from error


def _converted(spaces: Any, space: Any, action: Any) -> Any:
    """Return an action of a configuration file in the type that its space wants."""
    if isinstance(space, spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary):
        import numpy as np

        return np.asarray(action, dtype=space.dtype)
    return tuple(action) if isinstance(space, spaces.Tuple) else action


def _render_modes(package: Any, identifier: str) -> list[str]:
    """Return the ways in which an environment can draw itself."""
    entry = package.registry[identifier].entry_point
    made = package.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    return list((getattr(made, "metadata", None) or {}).get("render_modes") or [])


def _without_escapes(text: str) -> str:
    """Return text with the colors of a terminal as tags, and without its other commands."""

    def tagged(match: re.Match[str]) -> str:
        codes = [int(code) for code in match[1].split(";") if code]
        colors = [_COLORS[code % 10] for code in codes if 30 <= code <= 37 or 40 <= code <= 47]
        return f"<{colors[-1]}>{match[2]}</{colors[-1]}>" if colors else match[2]

    return _ESCAPE.sub("", _COLORED.sub(tagged, text))


def _plain(value: Any) -> Any:
    """Return an observation as what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, int | float | bool | None) else str(value)
