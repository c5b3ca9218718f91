"""The built-in tasks and rewards, by the names that a configuration uses."""

from collections.abc import Callable, Mapping, Sequence

from shardes.config.schema import ProblemSetConfig
from shardes.tasks import arc, arithmetic, boxed, choosing, conciseness, countdown, matching, sudoku
from shardes.tasks.base import RewardFunction, TaskDefinition

TASKS: Mapping[str, TaskDefinition] = {
    "arc": arc.TASK,
    "arithmetic": arithmetic.TASK,
    "conciseness": conciseness.TASK,
    "copa": choosing.COPA,
    "countdown": countdown.CHAT,
    "countdown_short": countdown.SHORT,
    "exact_match": matching.EXACT_MATCH,
    "gsm8k": boxed.GSM8K,
    "math": boxed.MATH,
    "multiple_choice": choosing.MULTIPLE_CHOICE,
    "perplexity": choosing.PERPLEXITY,
    "regex": matching.REGEX,
    "sudoku": sudoku.TASK,
}
"""Tasks that are the same for every configuration."""

LABEL_WORD_TASKS: Mapping[str, Callable[[Sequence[str] | None], TaskDefinition]] = {
    "boolq": choosing.boolq,
    "classification": choosing.classification,
    "sst2": choosing.sst2,
}
"""Tasks that depend on ``task.label_words``."""

REWARDS: Mapping[str, RewardFunction] = {
    "arc.solved": arc.solved_reward,
    "arc.cells": arc.cells_reward,
    "arc.format": arc.format_reward,
    "arithmetic.answer": arithmetic.answer_reward,
    "arithmetic.format": arithmetic.format_reward,
    "boxed": boxed.boxed_reward,
    "boxed.expression": boxed.expression_reward,
    "boxed.number": boxed.number_reward,
    "countdown.answer": countdown.answer_reward,
    "countdown.format": countdown.chat_format_reward,
    "countdown.short_format": countdown.short_format_reward,
    "exact_match": matching.exact_match_reward,
    "length": conciseness.length_reward,
    "regex": matching.regex_reward,
    "sudoku.solved": sudoku.solved_reward,
    "sudoku.units": sudoku.units_reward,
    "sudoku.format": sudoku.format_reward,
    "think_answer": matching.think_answer_reward,
}
"""What ``task.rewards`` can name."""


def definition_of(config: ProblemSetConfig) -> TaskDefinition | None:
    """The built-in task that a configuration names; None if it names none."""
    if config.name is None:
        return None
    if config.name in LABEL_WORD_TASKS:
        return LABEL_WORD_TASKS[config.name](config.label_words)
    return TASKS[config.name]
