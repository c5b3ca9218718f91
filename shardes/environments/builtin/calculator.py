"""Arithmetic word problems with a calculator: the model calls a tool as often as it likes, and then answers.

A row is ``{"index": i}``; its problem is a function of the index alone. The environment is a class as TRL's
``environment_factory`` takes it, whose public methods are tools; ``answer_reward`` judges the last answer.
``calculate`` is a tool for problems of your own as well, with ``task.tools``.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from shardes.tasks.answers import exact_number, last_answer
from shardes.tasks.expression import evaluate_expression
from shardes.tasks.judging import per_completion


def calculate(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    Args:
        expression: Numbers, parentheses and the operators +, -, * and /, such as "3 * (17 - 4.5)".

    Returns:
        The value as a decimal number.
    """
    value = evaluate_expression(expression)[0]
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"


class WordProblems:
    """Environment of one problem, with the tool ``calculate``."""

    def reset(self, index: int) -> str:
        """Ask the question."""
        return (
            f"{make_problem(index).question} Use the calculator, and then write the answer, a number, "
            "between <answer> and </answer>."
        )

    def calculate(self, expression: str) -> str:
        """Calculate the value of an arithmetic expression.

        Args:
            expression: Numbers, parentheses and the operators +, -, * and /, such as "3 * (17 - 4.5)".

        Returns:
            The value as a decimal number.
        """
        return calculate(expression)


@per_completion
def answer_reward(text: str, /, *, index: int) -> bool:
    """Return 1.0 if the last answer pair holds the number that the problem asks for, else 0.0."""
    written = last_answer(text)
    number = None if written is None else exact_number(written)
    return number is not None and number == make_problem(index).answer


@dataclass(frozen=True)
class Problem:
    """A question whose answer is a whole number."""

    question: str
    answer: int


def make_problem(index: int) -> Problem:
    """Return the problem of an index, from 0."""
    ask, answer = _KINDS[index % len(_KINDS)]
    digest = hashlib.sha256(f"problem {index}".encode()).digest()
    # Two bytes for each of three numbers, from 12 to 97.
    a, b, c = (12 + int.from_bytes(digest[place : place + 2]) % 86 for place in (0, 2, 4))
    return Problem(ask(a, b, c), answer(a, b, c))


_Kind = tuple[Callable[[int, int, int], str], Callable[[int, int, int], int]]
_KINDS: list[_Kind] = [
    (
        lambda a, b, c: (
            f"A shop has {a} boxes with {b} pencils in each, and sells {c} pencils. How many pencils are "
            "left?"
        ),
        lambda a, b, c: a * b - c,
    ),
    (
        lambda a, b, c: (
            f"A train has {a} seats in each of its {b} carriages. All seats are taken, and {c} people stand. "
            "How many people are in the train?"
        ),
        lambda a, b, c: a * b + c,
    ),
    (
        lambda a, b, c: (
            f"Ann walks {a} km a day for {b} days, and then {c} km a day for as many days. How many km "
            "does she walk?"
        ),
        lambda a, b, c: (a + c) * b,
    ),
    (
        lambda a, b, c: (
            f"In {c} classes there are {a + b} children each, {a} of whom come by bus. How many children do "
            "not come by bus?"
        ),
        lambda a, b, c: b * c,
    ),
    (
        lambda a, b, c: (
            f"{a} friends share {a * b} cherries equally, and each finds {c} more. How many "
            "cherries does each have?"
        ),
        lambda a, b, c: b + c,
    ),
    (
        lambda a, b, c: (
            f"A tank holds {a * b} litres. Every minute {a} litres flow out, and it takes {c} minutes more "
            "to clean it. How many minutes does it take to empty and clean the tank?"
        ),
        lambda a, b, c: b + c,
    ),
]
