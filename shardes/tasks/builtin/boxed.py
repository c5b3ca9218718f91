r"""Mathematics with the result in ``\boxed{...}``: word problems with numbers (gsm8k), any expression (math).

``gsm8k`` compares numbers exactly and needs no further package. ``math`` asks math-verify (extra ``math``)
whether two expressions are equal, which reads LaTeX and simplifies with SymPy. What a model writes can keep
SymPy busy for ever: the obvious cases are refused before, and a reward's process is killed for the others.
"""

import functools
import importlib.util
import logging
import math
import re
from fractions import Fraction
from typing import Any

from shardes.errors import UserError
from shardes.tasks.amounts import MAX_CHARACTERS, amount_in, plain
from shardes.tasks.answers import exact_number, last_boxed
from shardes.tasks.base import Component, Prompt, Row, TaskDefinition
from shardes.tasks.judging import per_completion
from shardes.tasks.rows import column, text_column, wrong

_COSTLY = re.compile(
    r"\^\s*\{?\s*-?\s*[0-9]{4}|[)}\]]\s*\^\s*\{?\s*[0-9]{3}"  # a large exponent, of a sum above all
    r"|\^\s*\{[^{}]*\^|[)}]\s*\^.*\^|\*\*"  # a power of a power
    r"|[0-9]{3}\s*!|!\s*[)}]?\s*!"  # the factorial of a large number, or of a factorial
    r"|[0-9]{20}"
)

_BASE = re.compile(r"[0-9]\s*_\s*\{?([0-9]+)\}?$")
# A bound is no value, and math-verify takes some products of variables, "2ab", for their number.
_NO_VALUE = re.compile(
    r"[<>]|\\(?:[lg](?:eq?|eqslant|t)|neq?|not)(?![a-zA-Z])|[0-9][a-zA-Z]{2,3}(?![a-zA-Z])"
)


@per_completion
def number_reward(text: str, /, *, answer: Any) -> bool:
    """Return 1.0 if the number in the last box is the row's, exactly, else 0.0.

    Words and units around a single number do not count, but what changes it does: ``5!`` and ``2x`` are not
    numbers. The row's answer may end with ``#### 72``, as in GSM8K.
    """
    return (found := _boxed_number(text)) is not None and found == _gold_number(answer)


@per_completion
def expression_reward(text: str, /, *, answer: Any = None, solution: Any = None) -> bool:
    """Return 1.0 if the last box holds an expression equal to the row's, else 0.0.

    Args:
        text: The response.
        answer: The right expression; None: the last box of ``solution``.
        solution: A worked solution, as MATH has it.
    """
    return _is_equal(last_boxed(text), _gold_expression(answer, solution))


@per_completion
def boxed_reward(text: str, /) -> bool:
    r"""Return 1.0 for a response with a complete ``\boxed{...}`` that is not empty, else 0.0."""
    return bool((last_boxed(text) or "").strip())


def _boxed_number(response: str) -> Fraction | None:
    boxed = last_boxed(response)
    amount = None if boxed is None else amount_in(boxed, any_words=True)
    return None if amount is None else amount.value


def _gold_number(answer: Any) -> Fraction | None:
    if isinstance(answer, int | float):
        return Fraction(str(answer)) if math.isfinite(answer) else None
    return exact_number(plain(str(answer).rpartition("####")[2]))


def _gold_expression(answer: Any, solution: Any) -> str | None:
    if answer is None:
        return last_boxed(solution) if isinstance(solution, str) else None
    return str(answer)


def _is_equal(boxed: str | None, gold: str | None) -> bool:
    if boxed is None or gold is None or not boxed.strip():
        return False
    if boxed.strip() == gold.strip():
        return True
    boxed, gold = plain(boxed), plain(gold)
    if boxed == gold:
        return True
    bases = [_BASE.search(text) for text in (boxed, gold)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return False
    if _NO_VALUE.search(boxed) and amount_in(gold, any_words=False) is not None:
        return amount_in(boxed, any_words=False) == amount_in(gold, any_words=False)
    if not ("=" in boxed and "=" in gold):  # else the variables count
        amounts = amount_in(boxed, any_words=False), amount_in(gold, any_words=False)
        if amounts[0] is not None and amounts[1] is not None:
            return amounts[0].is_same(amounts[1])
    if len(boxed) > MAX_CHARACTERS or _COSTLY.search(boxed):
        return False
    return ask_math_verify(gold, boxed)


def ask_math_verify(gold: str, boxed: str) -> bool:
    """Return True if math-verify takes two expressions for equal; nothing limits its time."""
    # Imported by the process in which the reward runs: it takes a second.
    import math_verify

    # Both warn once that nothing limits their time; here the process of the reward is what is limited.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed = [math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, boxed)]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))


def _prompt(question: str) -> Prompt:
    ask = r"Work step by step. Write the final result, and nothing but it, inside \boxed{}."
    return [{"role": "user", "content": f"{question}\n\n{ask}"}]


def _gsm8k_prompt(row: Row) -> Prompt:
    return _prompt(row["question"])


def _math_prompt(row: Row) -> Prompt:
    return _prompt(row["problem"])


def check_gsm8k_row(row: Row, where: str) -> None:
    """Refuse a row without a question, or whose answer is no number.

    Raises:
        UserError: Naming the place and the column.
    """
    text_column(row, "question", where, wanted="a question as text")
    wanted = 'a number, or a worked answer that ends with one, such as "... #### 72"'
    answer = column(row, "answer", where, wanted=wanted)
    if isinstance(answer, bool) or _gold_number(answer) is None:
        raise wrong("answer", answer, where, wanted=wanted)


def check_math_row(row: Row, where: str) -> None:
    r"""Refuse a row without a problem, or without both an answer and a solution that contains one.

    Raises:
        UserError: Naming the place and the column, or the package that is missing.
    """
    text_column(row, "problem", where, wanted="a problem as text")
    if row.get("answer") is None:
        wanted = r"a worked solution with the result in \boxed{}, if there is no column 'answer'"
        solution = text_column(row, "solution", where, wanted=wanted)
        if not (last_boxed(solution) or "").strip():
            raise wrong("solution", solution, where, wanted=wanted)
    elif not str(row["answer"]).strip():
        raise wrong("answer", row["answer"], where, wanted="the right expression, such as \\frac{3}{4}")
    if not _has_math_verify():
        raise UserError(
            f"{where}: the task math compares expressions with the package math-verify; install it "
            "with: pip install 'shardes[math]'"
        )


@functools.cache
def _has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


GSM8K = TaskDefinition("gsm8k", _gsm8k_prompt, check_gsm8k_row, rewards=(Component("answer", number_reward),))
MATH = TaskDefinition("math", _math_prompt, check_math_row, rewards=(Component("answer", expression_reward),))
TASKS = (GSM8K, MATH)
REWARDS = {"boxed": boxed_reward, "boxed.expression": expression_reward, "boxed.number": number_reward}
