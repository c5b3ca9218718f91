from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardes.tasks.expression import ExpressionError, evaluate_expression


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("10-4-3", 3),
        ("100/5/2", 10),
        ("8/3*3", 8),
        ("1/3", Fraction(1, 3)),
        ("0.1+0.2", Fraction(3, 10)),
        ("2.50", Fraction(5, 2)),
        ("007", 7),
        ("-3+5", 2),
        ("3*-2", -6),
        ("3--2", 5),
        ("-(1+2)", -3),
        ("-(-3)", 3),
        ("+1", 1),
        ("1++2", 3),
        ("--3", 3),
        ("-+3", -3),
        ("3---2", 1),
        ("-" * 151 + "3", -3),
        ("0*-1", 0),
        ("0/5", 0),
        (" ( 1 +\t2 )\r\n* 3 ", 9),
        ("(" * 20 + "1" + ")" * 20, 1),
        ("999999999999", 999999999999),
    ],
)
def test_value(text, value):
    assert evaluate_expression(text)[0] == value


def test_literals_are_reported_in_order_and_without_signs():
    assert evaluate_expression("5-(3*-2.5)/5")[1] == [5, 3, Fraction(5, 2), 5]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "()",
        "1+",
        "*1",
        "+",
        "1++",
        "2**3",
        "98**47**47",
        "9//2",
        "2^3",
        "7%4",
        "2(3)",
        "(2)(3)",
        "(2)3",
        "1 2",
        "(1",
        "1)",
        ")(",
        "(" * 21 + "1" + ")" * 21,
        "(" * 200,
        "(" * 100_000,
        "1" * 13,
        "1.000000000000",
        "9*" * 100_000 + "9",
        "1/0",
        "1/(2-2)",
        ".5",
        "5.",
        "1.2.3",
        "1e5",
        "0x10",
        "1_000",
        "1,000",
        "3=3",
        "x",
        "__import__('os')",
        "\u0663+\u0664",
        "\uff13+4",
        "\u00b2",
        "1\u00a0+2",
        "1\x00",
        "\ud800",
        "2\u00d73",
    ],
)
def test_refused(text):
    with pytest.raises(ExpressionError):
        evaluate_expression(text)


def test_the_limit_on_length_counts_every_character():
    assert evaluate_expression("1" + " " * 199)[0] == 1
    with pytest.raises(ExpressionError, match="201 characters"):
        evaluate_expression("1" + " " * 200)


@pytest.mark.parametrize("operator", "+-*/")
def test_the_most_expensive_expressions_are_cheap(operator):
    text = operator.join(["999999999989"] * 15)
    value, literals = evaluate_expression(text)
    assert len(literals) == 15
    assert len(str(value.numerator)) + len(str(value.denominator)) < 400


@st.composite
def _expressions(draw, depth=3):
    """Fully parenthesised text with its value, computed alongside with fractions."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(0, 99))
        return str(number), Fraction(number), [number]
    (left, left_value, left_literals) = draw(_expressions(depth=depth - 1))
    (right, right_value, right_literals) = draw(_expressions(depth=depth - 1))
    operator = draw(st.sampled_from("+-*/" if right_value else "+-*"))
    value = {
        "+": lambda: left_value + right_value,
        "-": lambda: left_value - right_value,
        "*": lambda: left_value * right_value,
        "/": lambda: left_value / right_value,
    }[operator]()
    return f"({left}{operator}{right})", value, left_literals + right_literals


@settings(deadline=None)
@given(_expressions())
def test_agrees_with_values_built_alongside(case):
    text, value, literals = case
    assert evaluate_expression(text) == (value, literals)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(1, 99)), min_size=1, max_size=8))
def test_precedence_agrees_with_python(terms):
    text = "7" + "".join(f"{operator}{number}" for operator, number in terms)
    assert evaluate_expression(text)[0] == eval(text)  # the text holds nothing but what is built here


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("0123456789.+-*/() =^%eE_x\u0663\n"), max_size=220) | st.text(max_size=300))
@example("(" * 200)
@example("-" * 200)
def test_any_text_gives_a_value_or_an_expression_error(text):
    try:
        value, literals = evaluate_expression(text)
    except ExpressionError as error:
        assert str(error)
    else:
        assert isinstance(value, Fraction)
        assert literals
        assert text.isascii()
