"""Adapter of reasoning_gym: a question of a procedural data set, and its own scoring of the answer."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from shardes.environments.adapters.common import (
    check_choice,
    check_index,
    check_known,
    load_package,
    override,
    take_seed,
)
from shardes.environments.base import Observation

_ANSWERS = ("whole", "last_line", "tag")

# Data sets have a size, and some make all of their items at once, so that the size that a row needs is not
# simply the largest; of two data sets, an item depends on the size, which is a function of the index, then.
_LEAST_SIZE = 512

_SOLVED = 0.99


def make(name: str, arguments: Mapping[str, Any]) -> "partial[ReasoningGymEnvironment]":
    """Return what makes an environment of the data set of this name.

    Args:
        name: Name of a data set of reasoning_gym.
        arguments: Its configuration, without ``size``; further ``seed`` (0), ``system``, a name of
            reasoning_gym's system prompts, and ``answer``, the part of a completion that is scored:
            ``whole``, ``last_line`` or ``tag``, the last <answer>...</answer>, the default with a system
            prompt, as these ask for it; else ``whole`` is.

    Raises:
        ValueError: The package is missing, the data set is unknown, or an argument is wrong.
    """
    package = load_package("reasoning_gym", adapter="reasoning_gym", extra="reasoning-gym")
    check_known(name, package.factory.DATASETS, kind="data set of reasoning_gym")
    options = dict(arguments)
    system = _system_prompt(package, options.pop("system", None))
    answer = options.pop("answer", "tag" if system else "whole")
    check_choice(answer, _ANSWERS, argument="answer")
    seed = take_seed(options)
    if "size" in options:
        raise ValueError(
            "The data set's size follows from the rows (task.data: range:START:STOP): remove size"
        )
    fields = [field.name for field in dataclasses.fields(package.factory.DATASETS[name][1])]
    for option in options:
        kind = f"argument of {name} of reasoning_gym"
        check_known(option, [*(set(fields) - {"size"}), "system", "answer", "seed"], kind=kind)
    datasets = _Datasets(package, name, seed)
    try:
        datasets.get(0, options)
    except Exception as error:
        raise ValueError(f"reasoning_gym cannot make {name} with these arguments: {error}") from error
    return partial(ReasoningGymEnvironment, datasets, options, answer=answer, system=system)


class ReasoningGymEnvironment:
    """One question, whose answer ends the episode.

    Args:
        datasets: Data sets of this process.
        options: Configuration of the data set.
        answer: Part of the completion that is scored.
        system: System prompt; empty: none.
    """

    def __init__(
        self, datasets: "_Datasets", options: Mapping[str, Any], *, answer: str, system: str
    ) -> None:
        self._datasets = datasets
        self._options = options
        self._answer = answer
        self._system = system
        self.numbers: dict[str, float] = {}

    def reset(self, index: int, **row: Any) -> Observation:
        """Return the question of an index; columns with the name of a given argument replace it."""
        self._dataset = self._datasets.get(check_index(index), override(self._options, row))
        self._entry = self._dataset[index]
        question = str(self._entry["question"])
        if not self._system:
            return question
        return [{"role": "system", "content": self._system}, {"role": "user", "content": question}]

    def step(self, completion: str) -> tuple[Observation, float, bool]:
        """Return the data set's score of the answer, from 0 to 1."""
        try:
            score = float(self._dataset.score_answer(self._extract(completion), self._entry))
        except Exception:
            # Some data sets parse what they score, and raise for an answer of another form: it is wrong.
            score = 0.0
        self.numbers = {"success": float(score >= _SOLVED)}
        return "", score, True

    def close(self) -> None:
        """Do nothing: the data set is the process's."""

    def _extract(self, completion: str) -> str | None:
        """Return the part of a completion that is the answer; None if it has none."""
        if self._answer == "tag":
            return self._datasets.package.utils.extract_answer(completion)
        text = completion.strip()
        if self._answer == "last_line" and text:
            return text.splitlines()[-1].strip()
        return text


class _Datasets:
    """Data sets of a process by size and configuration; making one may take long.

    Args:
        package: The package reasoning_gym.
        name: Name of the data set.
        seed: Seed of its items.
    """

    _MAX_KEPT = 16

    def __init__(self, package: Any, name: str, seed: int) -> None:
        self.package = package
        self._name = name
        self._seed = seed
        self._kept: dict[str, Any] = {}

    def get(self, index: int, options: Mapping[str, Any]) -> Any:
        """Return a data set that has this index."""
        size = max(_LEAST_SIZE, 1 << index.bit_length())
        key = json.dumps([size, options], sort_keys=True, default=repr)
        if key not in self._kept:
            if len(self._kept) >= self._MAX_KEPT:
                self._kept.pop(next(iter(self._kept)))
            made = self.package.create_dataset(self._name, seed=self._seed, size=size, **self._typed(options))
            self._kept[key] = made
        return self._kept[key]

    def _typed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options with the specifications of a composite as its configuration wants them."""
        typed = dict(options)
        if self._name == "composite" and "datasets" in typed:
            specification = self.package.composite.DatasetSpec
            typed["datasets"] = [specification(**{"config": {}, **each}) for each in typed["datasets"]]
        return typed


def _system_prompt(package: Any, system: Any) -> str:
    if system is None:
        return ""
    prompts = package.utils.SYSTEM_PROMPTS
    check_known(str(system), prompts, kind="system prompt of reasoning_gym")
    return str(prompts[system]).strip()
