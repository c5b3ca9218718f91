"""Registry of the built-in tasks and rewards, by the names that a configuration uses."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence

from shardes.tasks import builtin
from shardes.tasks.base import RewardFunction, TaskDefinition

_NAMES = sorted(module.name for module in pkgutil.iter_modules(builtin.__path__))
_MODULES = [importlib.import_module(f"{builtin.__name__}.{name}") for name in _NAMES]
_DEFINITIONS: list[TaskDefinition] = [definition for module in _MODULES for definition in module.TASKS]

TASKS: Mapping[str, TaskDefinition] = {task.name: task for task in sorted(_DEFINITIONS, key=lambda t: t.name)}
"""Built-in tasks by the name that ``task.name`` gives."""

REWARDS: Mapping[str, RewardFunction] = {
    name: function for module in _MODULES for name, function in getattr(module, "REWARDS", {}).items()
}
"""Built-in reward functions by the name that ``task.rewards`` gives."""


def definition_of(name: str | None, *, label_words: Sequence[str] | None = None) -> TaskDefinition | None:
    """Return a built-in task, with its label words; None if no task is named.

    Args:
        name: ``task.name``.
        label_words: ``task.label_words``.

    Raises:
        ValueError: Label words are given to a task without classes, or are missing.
    """
    definition = None if name is None else TASKS[name]
    if definition is not None and definition.with_label_words is not None:
        return definition.with_label_words(label_words)
    if label_words:
        labelled = ", ".join(each for each, task in TASKS.items() if task.with_label_words is not None)
        raise ValueError(f"label_words are for {labelled}; got name: {name}")
    return definition
