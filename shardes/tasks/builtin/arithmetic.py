"""Arithmetic: the value of an expression of small integers, for demonstrations and for small models.

A row is ``{"expression": "12 - 3 * 4", "answer": 0}``. The result stands between answer tags.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

from shardes.tasks.answers import exact_number, is_bare_answer, last_answer
from shardes.tasks.base import Component, Prompt, Row, TaskDefinition
from shardes.tasks.drawing import draw_distinct
from shardes.tasks.expression import evaluate_expression
from shardes.tasks.rows import column, text_column, wrong


def answer_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], *, answer: Sequence[Any], **columns: Sequence[Any]
) -> list[float]:
    """Return 1.0 if the last answer pair holds the right number and nothing else, else 0.0."""
    return [
        float(
            (written := last_answer(text)) is not None
            and (number := exact_number(written)) is not None
            and number == exact_number(str(gold))
        )
        for text, gold in zip(completions, answer, strict=True)
    ]


def format_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """Return 1.0 for one pair of answer tags with nothing around it but white space, else 0.0."""
    return [float(is_bare_answer(text.strip())) for text in completions]


def make_prompt(row: Row) -> Prompt:
    """Ask for the expression's value."""
    ask = "What is the value of this expression? Reply with the number between <answer> and </answer> only."
    return [{"role": "user", "content": f"{ask}\n{row['expression']}"}]


def check_row(row: Row, where: str) -> None:
    """Refuse a row without an expression, or without a number as its answer.

    Raises:
        UserError: Naming the place and the column.
    """
    text_column(row, "expression", where, wanted="an expression as text, such as 12 - 3 * 4")
    answer = column(row, "answer", where, wanted="a number")
    if isinstance(answer, bool) or exact_number(str(answer)) is None:
        raise wrong("answer", answer, where, wanted="a number")


def generate_problems(
    num_problems: int, *, seed: int, num_numbers: Sequence[int] = (2, 3), max_number: int = 99
) -> list[dict[str, Any]]:
    """Draw distinct expressions with +, - and *; a pure function of the arguments.

    Args:
        num_problems: Number of problems.
        seed: Seed of the draws.
        num_numbers: Numbers in an expression; each entry is drawn equally often.
        max_number: Numbers are drawn from 1 to this.

    Returns:
        Rows ``{"expression": text, "answer": integer}``.

    Raises:
        UserError: If so many distinct expressions are not found.
    """
    random = Random(seed).random

    def draw() -> dict[str, Any]:
        length = num_numbers[int(random() * len(num_numbers))]
        parts = [str(1 + int(random() * max_number))]
        for _ in range(length - 1):
            parts += ["+-*"[int(random() * 3)], str(1 + int(random() * max_number))]
        expression = " ".join(parts)
        return {"expression": expression, "answer": int(evaluate_expression(expression)[0])}

    what = f"expressions with num_numbers={tuple(num_numbers)}, max_number={max_number}"
    return draw_distinct(num_problems, draw, key=problem_key, what=what)


def problem_key(row: Row) -> str:
    """Return the expression, which identifies a problem."""
    return str(row["expression"])


TASK = TaskDefinition(
    "arithmetic",
    make_prompt,
    check_row,
    rewards=(Component("answer", answer_reward), Component("format", format_reward, weight=0.1)),
    row_key=problem_key,
    generate=generate_problems,
)
TASKS = (TASK,)
REWARDS = {"arithmetic.answer": answer_reward, "arithmetic.format": format_reward}
