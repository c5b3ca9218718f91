r"""Parsers of the answer in a response: between tags, in the last ``\boxed{}``, or as a plain number.

All functions take any text and cost time linear in its length.
"""

import re
from decimal import Decimal
from fractions import Fraction

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_BOX = r"\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a backslash and what it belongs to, or a brace
_MAX_NUMBER_CHARACTERS = 40
# What may stand around a number in an answer without being part of it.
_UNITS = re.compile(r"\\[,;!% ]|\\\$|[$€£%]|\\(?:text|mathrm|mbox)\{[^{}]*\}|\\(?:left|right)")
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])")
_FRACTION = re.compile(
    r"(?P<sign>[-+]?)(?:\\[dt]?frac\{(?P<a>[0-9]+)\}\{(?P<b>[0-9]+)\}|\\[dt]?frac(?P<c>[0-9])(?P<d>[0-9])"
    r"|(?P<e>[0-9]+) ?/ ?(?P<f>[0-9]+))"
)


def last_answer(response: str) -> str | None:
    """Return the text of the last ``<answer>`` pair, or None if there is none."""
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else response[start + len("<answer>") : end]


def is_think_answer(response: str) -> bool:
    """Return True if the whole response is ``<think>...</think><answer>...</answer>``.

    Each tag occurs exactly once, and white space alone stands before, between and after the two pairs.
    """
    if any(response.count(tag) != 1 for tag in _TAGS):
        return False
    text = response.strip()
    thought_end, answer_start = text.find("</think>"), text.find("<answer>")
    return (
        text.startswith("<think>")
        and text.endswith("</answer>")
        and thought_end < answer_start
        and not text[thought_end + len("</think>") : answer_start].strip()
    )


def is_bare_answer(response: str) -> bool:
    """Return True if the response is ``<answer>...</answer>``, with no further tag and nothing around it."""
    return (
        response.startswith("<answer>")
        and response.endswith("</answer>")
        and [response.count(tag) for tag in _TAGS] == [0, 0, 1, 1]
    )


def last_boxed(response: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` whose braces are balanced; None if there is none."""
    end = len(response)
    while (start := response.rfind(_BOX, 0, end)) >= 0:
        closing = _closing_brace(response, start + len(_BOX), end)
        if closing is not None:
            return response[start + len(_BOX) : closing]
        # Cut off in the middle of it: an earlier one may be complete.
        end = start
    return None


def _closing_brace(text: str, start: int, end: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, start, end):
        if brace[0] in "{}":
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return brace.start()
    return None


def exact_number(text: str) -> Fraction | None:
    r"""Parse a text as one exact number; None if it is something else.

    Read are decimal numbers (also with thousands separators: ``1,234.50``) and fractions (``3/4``,
    ``\frac{3}{4}``), with a sign and with what usually stands around an amount: a currency sign, a percent
    sign (which does not divide by 100), LaTeX spacing, ``\text{...}`` and a full stop at the end.

    Args:
        text: At most 40 characters are read; a longer text is None.
    """
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    text = _UNITS.sub(" ", text).strip().removesuffix(".").strip()
    text = _THOUSANDS.sub(lambda match: re.sub(r"[{},]", "", match[0]), text)
    text = re.sub(r"^([-+])\s+", r"\1", text)
    if _DECIMAL.fullmatch(text):
        return Fraction(Decimal(text))
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    sign, *digits = match.groups()
    numerator, denominator = (int(part) for part in digits if part is not None)
    if denominator == 0:
        return None
    return Fraction(-numerator if sign == "-" else numerator, denominator)
