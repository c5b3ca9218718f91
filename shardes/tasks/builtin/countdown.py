"""Countdown: combine the given numbers, each exactly once, into an expression that equals the target.

The task of Qiu et al. 2025, "Evolution Strategies at Scale" (arXiv 2509.24372), after TinyZero (Pan et al.
2025): reward = answer + 0.1 * format. Both parts are judged on the response alone; docs/tasks.md lists where
this reading differs from the paper's.

Two styles share the answer and differ in prompt and format:

- ``chat``, for instruct models: ``<think>...</think><answer>...</answer>``, whitespace allowed around the
  tags. The prompt is plain chat messages and opens no tag on the model's behalf, so both pairs have to be
  in the response.
- ``short``, for models of a few thousand parameters: prompt ``3 5 2=13:``, response ``<answer>...</answer>``
  and not one character more.

A row is ``{"numbers": [...], "target": ...}``; other keys are left alone.
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from operator import add, mul, sub, truediv
from random import Random
from typing import Any

from shardes.tasks.answers import is_bare_answer, is_think_answer, last_answer
from shardes.tasks.base import Component, Prompt, Row, TaskDefinition
from shardes.tasks.drawing import draw_distinct
from shardes.tasks.expression import MAX_LITERAL_DIGITS, ExpressionError, evaluate_expression
from shardes.tasks.rows import column, wrong

FORMAT_WEIGHT = 0.1

_OPERATIONS = (add, sub, mul, truediv)


def answer_reward(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    numbers: Sequence[Sequence[Any]],
    target: Sequence[Any],
    **columns: Sequence[Any],
) -> list[float]:
    """Return 1.0 for a response whose last ``<answer>`` pair holds a right expression, else 0.0.

    Right is an expression that uses exactly the numbers and equals the target exactly, whatever stands around
    the pair. ``3*5-2=13`` is no expression and is not repaired.

    Args:
        prompts: Unused: they contain an example, which must earn nothing.
        completions: The responses.
        numbers: The numbers given in each row.
        target: The target of each row.
        **columns: The rows' other columns; unused.
    """
    return [_answer(*args) for args in zip(completions, numbers, target, strict=True)]


def chat_format_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """Return 1.0 for a pair of think tags and a pair of answer tags and nothing else, else 0.0."""
    return [float(is_think_answer(response)) for response in completions]


def short_format_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """Return 1.0 for a pair of answer tags and not one character around it, else 0.0."""
    return [float(is_bare_answer(response)) for response in completions]


def chat_prompt(row: Row) -> Prompt:
    """Ask for an expression in chat messages."""
    system = (
        "You solve arithmetic puzzles. Reason between <think> and </think>, then state your solution "
        "between <answer> and </answer>, and write nothing after it."
    )
    user = (
        f"Numbers: {', '.join(map(str, row['numbers']))}. Target: {row['target']}.\n"
        "Find an expression that equals the target and contains every one of these numbers exactly once. "
        "It may use +, -, *, / and parentheses. The answer is the expression alone, without an equals "
        "sign. For the numbers 2, 3, 4 and the target 20, a reply could be:\n"
        "<think>20 is 5 times 4, and 5 is 2 plus 3.</think>\n<answer>(2 + 3) * 4</answer>"
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def short_prompt(row: Row) -> Prompt:
    """Ask for an expression in as few characters as possible."""
    return f"{' '.join(map(str, row['numbers']))}={row['target']}:"


def _answer(response: str, numbers: Sequence[Any], target: Any) -> float:
    expression = last_answer(response)
    return float(expression is not None and _solves(expression, numbers, target))


def _solves(expression: str, numbers: Sequence[Any], target: Any) -> bool:
    try:
        value, literals = evaluate_expression(expression)
    except ExpressionError:
        return False
    return value == _exact(target) and Counter(literals) == Counter(map(_exact, numbers))


def _exact(value: Any) -> Fraction:
    """Convert a row's number to the fraction that its decimal text denotes: 0.1 is 1/10, "7/2" is 7/2.

    Rows are untrusted too (``Fraction("1e999999999")`` fills the memory), so the reader of answers reads
    them, all but small integers.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ExpressionError(f"{type(value).__name__} is no number")
    if isinstance(value, int) and abs(value) < 10**MAX_LITERAL_DIGITS:
        return Fraction(value)
    return evaluate_expression(str(value))[0]


def check_row(row: Row, where: str) -> None:
    """Refuse a row that is no Countdown problem, before a run is started on it.

    Whether the problem has a solution is not checked.

    Args:
        row: The row, as parsed from JSON.
        where: Names the row in the message, e.g. ``data.jsonl line 7``.

    Raises:
        UserError: Naming the place, the column, what was got and what is wanted.
    """
    wanted = {
        "numbers": "a list of one or more non-negative numbers of at most 12 digits, e.g. [3, 5, 2.5]",
        "target": 'a number of at most 12 digits, or a fraction as text, e.g. 13, -4, 2.5 or "7/2"',
    }
    numbers = column(row, "numbers", where, wanted=wanted["numbers"])
    target = column(row, "target", where, wanted=wanted["target"])
    if not isinstance(numbers, list) or not numbers or not all(map(_is_literal, numbers)):
        raise wrong("numbers", numbers, where, wanted=wanted["numbers"])
    if not _is_target(target):
        raise wrong("target", target, where, wanted=wanted["target"])


def _is_target(value: Any) -> bool:
    try:
        _exact(value)
    except ValueError:
        # ExpressionError, or str() of an integer of thousands of digits.
        return False
    return True


def _is_literal(value: Any) -> bool:
    """Return True if an answer can contain the value as one literal: signs and fractions are expressions."""
    return isinstance(value, int | float) and _is_target(value) and str(value)[0] != "-"


def generate_problems(
    num_problems: int,
    *,
    seed: int,
    num_numbers: Sequence[int] = (3, 4),
    max_number: int = 99,
    max_target: int = 100,
) -> list[dict[str, Any]]:
    """Draw distinct problems, each solvable because its target is the value of a drawn expression.

    Two problems are the same if their targets and their sorted numbers are. The result is a function of the
    arguments alone: only ``Random.random`` is used, the one method whose values Python keeps from version to
    version.

    Args:
        num_problems: Number of problems.
        seed: Seed of the draws.
        num_numbers: Numbers in a problem; each entry is drawn equally often.
        max_number: Numbers are drawn from 1 to this.
        max_target: Targets are integers from 1 to this.

    Returns:
        Rows ``{"numbers": [...], "target": ...}``.

    Raises:
        UserError: If so many distinct problems are not found.
    """
    random = Random(seed).random

    def draw() -> dict[str, Any] | None:
        length = num_numbers[int(random() * len(num_numbers))]
        numbers = [1 + int(random() * max_number) for _ in range(length)]
        target = _combine(numbers, random)
        if target is None or target.denominator != 1 or not 1 <= target <= max_target:
            return None
        return {"numbers": numbers, "target": int(target)}

    return draw_distinct(
        num_problems,
        draw,
        key=problem_key,
        what=f"Countdown problems with num_numbers={tuple(num_numbers)}, max_number={max_number}, "
        f"max_target={max_target}",
        remedy="allow larger numbers or ask for fewer problems",
    )


def _combine(numbers: Sequence[int], random: Callable[[], float]) -> Fraction | None:
    """Return the value of a random expression tree over the numbers; None if it divides by zero."""
    values = [Fraction(number) for number in numbers]
    while len(values) > 1:
        left = values.pop(int(random() * len(values)))
        right = values.pop(int(random() * len(values)))
        operation = _OPERATIONS[int(random() * len(_OPERATIONS))]
        if operation is truediv and right == 0:
            return None
        values.append(operation(left, right))
    return values[0]


def problem_key(row: Row) -> str:
    """Return a problem's key, the same in whatever order its numbers are, e.g. ``2 3 5=13``."""
    numbers = sorted(map(_exact, row["numbers"]))
    return f"{' '.join(map(str, numbers))}={_exact(row['target'])}"


def split_problems(rows: Sequence[Row], *, shares: Sequence[float], seed: int) -> list[list[Row]]:
    """Split rows into parts such that no problem is in two, in whatever order its numbers are given.

    A part is a range of the problems ordered by a hash of seed and problem, so the split depends on neither
    the order of the rows nor a random generator.

    Args:
        rows: The rows to split.
        shares: Each part's share of the distinct problems; they sum to 1.
        seed: Another seed gives another split.

    Returns:
        One list for each share; rows keep their order within it.
    """
    if abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares sum to {sum(shares)}; wanted: 1")
    keys = [problem_key(row) for row in rows]
    ordered = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    ends = [round(share * len(ordered)) for share in accumulate(shares)]
    part_of = {key: bisect_right(ends, index) for index, key in enumerate(ordered)}
    parts: list[list[Row]] = [[] for _ in shares]
    for key, row in zip(keys, rows, strict=True):
        parts[part_of[key]].append(row)
    return parts


CHAT = TaskDefinition(
    "countdown",
    chat_prompt,
    check_row,
    rewards=(
        Component("answer", answer_reward),
        Component("format", chat_format_reward, weight=FORMAT_WEIGHT),
    ),
    row_key=problem_key,
    generate=generate_problems,
)
SHORT = TaskDefinition(
    "countdown_short",
    short_prompt,
    check_row,
    rewards=(
        Component("answer", answer_reward),
        Component("format", short_format_reward, weight=FORMAT_WEIGHT),
    ),
    row_key=problem_key,
)
TASKS = (CHAT, SHORT)
REWARDS = {
    "countdown.answer": answer_reward,
    "countdown.format": chat_format_reward,
    "countdown.short_format": short_format_reward,
}
