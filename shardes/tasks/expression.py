"""Evaluator of arithmetic written by a model: exact, in bounded time, and without executing any of it.

What a model writes is untrusted text. Python's own reader would evaluate ``98**47**47`` until memory is gone,
and rounds ``1/3`` to a binary fraction. Here the grammar has no power operator, every size that drives the
cost is limited before work starts, and values are exact fractions::

    sum     = product { ("+" | "-") product }
    product = factor  { ("*" | "/") factor }
    factor  = { "+" | "-" } ( literal | "(" sum ")" )
    literal = digits [ "." digits ]

Spaces, tabs and line breaks may stand between tokens. Signs in front of a factor are read as everywhere:
``3*-2``, ``+3``, ``3---2``. Two factors side by side, as in ``2(3)``, are not a product.
"""

import re
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_LITERAL_DIGITS = 12
MAX_NESTING = 20

# `[0-9]`, not `\d`: the latter takes every script's digits, which int() would then silently convert.
_TOKEN = re.compile(r"[ \t\r\n]*(?:([0-9]+(?:\.[0-9]+)?)|([-+*/()]))")
_END = ""


class ExpressionError(ValueError):
    """Error of a text that is no expression of the grammar, exceeds a limit, or divides by zero."""


def evaluate_expression(text: str) -> tuple[Fraction, list[Fraction]]:
    """Evaluate an arithmetic expression.

    Nothing that fits in ``MAX_CHARACTERS`` costs much: no numerator or denominator has more than a few
    hundred digits, and the recursion is a few frames for each of ``MAX_NESTING`` parentheses.

    Args:
        text: Any string; see the module's grammar for what is accepted.

    Returns:
        The exact value, and the literals in the order in which they are written (without their signs).

    Raises:
        ExpressionError: For every text that is not accepted; nothing else is raised.
    """
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"{len(text)} characters; at most {MAX_CHARACTERS} are read")
    return _Parser(_tokenize(text)).parse()


def _tokenize(text: str) -> list[str]:
    text = text.rstrip(" \t\r\n")
    tokens = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"no number, operator or parenthesis at {text[position : position + 10]!r}")
        literal, symbol = match.groups()
        if literal is not None and len(literal.replace(".", "")) > MAX_LITERAL_DIGITS:
            raise ExpressionError(f"a literal of more than {MAX_LITERAL_DIGITS} digits")
        tokens.append(literal or symbol)
        position = match.end()
    return tokens


class _Parser:
    """Recursive-descent parser of tokens; one method for each rule of the grammar."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [*tokens, _END]
        self._position = 0
        self._nesting = 0
        self._literals: list[Fraction] = []

    def parse(self) -> tuple[Fraction, list[Fraction]]:
        value = self._sum()
        if self._token != _END:
            raise ExpressionError(f"{self._token!r} where an operator or the end belongs")
        return value, self._literals

    @property
    def _token(self) -> str:
        return self._tokens[self._position]

    def _take(self) -> str:
        token = self._token
        # The end is never passed, so that no lookahead can run off the list.
        if token != _END:
            self._position += 1
        return token

    def _sum(self) -> Fraction:
        value = self._product()
        while self._token in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self._token in ("*", "/"):
            if self._take() == "*":
                value *= self._factor()
            else:
                divisor = self._factor()
                if divisor == 0:
                    raise ExpressionError("division by zero")
                value /= divisor
        return value

    def _factor(self) -> Fraction:
        is_negative = False
        while self._token in ("+", "-"):
            is_negative ^= self._take() == "-"
        value = self._primary()
        return -value if is_negative else value

    def _primary(self) -> Fraction:
        token = self._take()
        if token == "(":
            return self._parenthesised()
        if not token[:1].isdigit():
            raise ExpressionError(f"{token or 'the end'!r} where a number or '(' belongs")
        # An integer need not go through Fraction's own parser, which takes longer than all the rest.
        value = Fraction(int(token)) if token.isdecimal() else Fraction(token)
        self._literals.append(value)
        return value

    def _parenthesised(self) -> Fraction:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise ExpressionError(f"parentheses nested deeper than {MAX_NESTING}")
        value = self._sum()
        if self._take() != ")":
            raise ExpressionError("'(' without ')'")
        self._nesting -= 1
        return value
