"""The graders of mathematics on recorded answers, right or wrong by construction, beside math-verify."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from shardes.tasks.amounts import amount_in
from shardes.tasks.builtin import boxed
from shardes.tasks.builtin.boxed import expression_reward, number_reward
from tests.helpers.math_answers import PATH, make_answers, verdict

DOCS = (Path(__file__).parents[2] / "docs" / "graders.md").read_text()
HEADER, *ROWS = [json.loads(line) for line in PATH.read_text().splitlines()]


def ours(row):
    return expression_reward([""], [rf"\boxed{{{row['boxed']}}}"], answer=[row["gold"]]) == [1.0]


@pytest.fixture
def judged(monkeypatch):
    """The recorded answers with our verdicts, given that math-verify says what is recorded."""
    found = []
    for row in ROWS:
        monkeypatch.setattr(boxed, "ask_math_verify", lambda *texts, row=row: row["asked"])
        assert (row["asked"] is None) or isinstance(row["asked"], bool)
        found.append(row | {"ours": ours(row)})
    return found


def shown(text):
    """A text as the documentation shows it."""
    return text if text.isascii() else text.encode("unicode_escape").decode().replace("\\\\", "\\")


def listed(cells):
    """The rows of the documentation's table with so many cells, as texts without the last."""
    lines = [line.strip("|\n ").split(" | ") for line in DOCS.splitlines() if line.startswith("| ")]
    rows = [[cell.strip("`") for cell in line] for line in lines]
    return [tuple(row) for row in rows if len(row) == cells and row[-1] != "why"]


def test_the_file_is_what_the_helper_writes():
    kept = [{key: row[key] for key in ("kind", "gold", "boxed", "right")} for row in ROWS]
    assert kept == make_answers()
    assert len({(row["gold"], row["boxed"]) for row in ROWS}) == len(ROWS) >= 300
    assert 200 < sum(row["right"] for row in ROWS) < len(ROWS) - 200


def test_every_answer_gets_what_it_was_made_to_be_worth_but_for_those_that_are_listed(judged):
    words = {True: "right", False: "wrong"}
    wrong = [
        (row["gold"], row["boxed"], words[row["right"]], words[row["ours"]])
        for row in judged
        if row["ours"] != row["right"]
    ]
    table = [row[:-1] for row in listed(5) if row[2] in words.values()]
    assert sorted(wrong) == sorted(table)
    assert all(row["math_verify"] == row["ours"] for row in judged if row["ours"] != row["right"])


def test_every_difference_from_math_verify_is_listed_and_ours_is_right(judged):
    differing = [row for row in judged if row["ours"] != row["math_verify"]]
    words = {True: "right", False: "wrong"}
    rows = [(r["kind"], shown(r["gold"]), shown(r["boxed"]), words[r["right"]]) for r in differing]
    table = [row[:-1] for row in listed(5) if row[2] not in words.values()]
    assert rows == table
    num_wrong = sum(row["math_verify"] != row["right"] for row in judged)
    counts = (
        f"has {len(ROWS)} answers",
        f"alone judges {num_wrong} of them wrongly",
        f"these {len(rows)}, and",
    )
    for count in counts:
        assert count in re.sub(r"\s+", " ", DOCS)


@pytest.mark.exhaustive
def test_math_verify_says_what_is_recorded():
    pytest.importorskip("math_verify")
    if version("math-verify") != HEADER["math_verify"]:
        pytest.skip("another version")
    for row in ROWS:
        assert verdict(row["gold"], row["boxed"]) == row["math_verify"], row
        if row["asked"] is not None:
            assert ours(row) == row["asked"], row


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", "5"),
        ("\u22125", "-5"),
        ("- 5", "-5"),
        ("the answer is - 5", "-5"),
        ("Answer: -5", "-5"),
        ("-\\$5", "-5"),
        ("\\$-5.50", "-5.5"),
        ("10\\,000", "10000"),
        ("1 234 567", "1234567"),
        ("\uff11\uff12", "12"),
        ("about 72 pens", "72"),
        ("72 pens (approx.)", "72"),
        ("72\u5143", "72"),
        ("12 m/s^2", "12"),
        ("5 million", "5000000"),
        ("50\\%", "50"),
        ("2\\frac{3}{4} cups", "11/4"),
        ("2 3/4", "11/4"),
        ("3 \\times 10^{-2}", "3/100"),
        ("0.1\\overline{6}", "1/6"),
        ("f(x) = 5", "5"),
        ("2 + 3 = 5", "5"),
        ("**72**", "72"),
        ("= 5", "5"),
        ("5\\ ", "5"),
        ("\\frac{-3}{4}", "-3/4"),
        ("\\frac{1.5}{2}", "3/4"),
        ("\\text{\u22125}", "-5"),
        ("5 boxes of pens", "5"),
        ("5 times", "5"),
        ("5 left over", "5"),
        ("5 more apples", "5"),
        ("5 feet squared", "5"),
        ("a total of 5", "5"),
        ("3\\text{ m}^{2}/\\text{s}", "3"),
        ("1,00,000", "100000"),
        ("1'234", "1234"),
        ("1\u2019234", "1234"),
        ("(1,200)", "1200"),
        ("5e3", "5000"),
        ("5 x 10^3", "5000"),
        ("10^{5}", "100000"),
        ("5 dozen", "60"),
        ("5 hundred thousand", "500000"),
        ("5\\text{ million}", "5000000"),
        ("5 bn", "5000000000"),
        ("x\\approx 5", "5"),
        ("\\text{Total} = 5", "5"),
        ("3a = 3 \\times 2 = 6", None),
        ("{\\bf 5}", "5"),
        ("\\fbox{5}", "5"),
        ("\\cfrac{1}{2}", "1/2"),
        ("5^\\text{th}", "5"),
        ("5\\\\", "5"),
        ("\u20145", "-5"),
        ("3 x 4 = 12", "12"),
        ("$3x4 = $12", "12"),
        ("10 m - 5 m = 5 m", "5"),
        ("1 h = 60 min", "60"),
        ("\\left(1,200\\right)", "1200"),
        ("5L", "5"),
        ("5 \\text{ third-graders}", "5"),
        ("5 thousandths", None),
        ("m - 5 = 5", None),
        ("a + b = 5", None),
        ("2x = 5", None),
        ("x + 1 = 5", None),
        ("x^2 = 5", None),
        ("\\sqrt{x} = 5", None),
        ("-x = 5", None),
        ("|x| = 5", None),
        ("x \\not= 5", None),
        ("\\frac{x}{2} = 5", None),
        ("\\text{minus }5", None),
        ("\\text{half of }5", None),
        ("\\text{less than }5", None),
        ("5\\text{ squared}", None),
        ("5\\text{ or more}", None),
        ("5M", None),
        ("0.333...", None),
        ("negative 5", None),
        ("more than 5", None),
        ("half of 5", None),
        ("5 squared", None),
        ("5 and a half", None),
        ("5 or so", None),
        ("2 thirds", None),
        ("5!", None),
        ("5x", None),
        ("x - 5", None),
        ("5 - x", None),
        ("5^2", None),
        ("5\\pi", None),
        ("5\u03c0", None),
        ("5 pi", None),
        ("\\sqrt{5}", None),
        ("\\pm 5", None),
        ("> 5", None),
        ("x <= 5", None),
        ("x != 5", None),
        ("x = 5, y = 6", None),
        ("5 or 6", None),
        ("5, 6", None),
        ("1,5", None),
        ("1,00", None),
        ("10,100,1000", None),
        ("0,100", None),
        ("7 2", None),
        ("5\u201310", None),
        ("6 \\times 12", None),
        ("1010_2", None),
        ("3:30", None),
        ("5/0", None),
        ("\\frac{1}{0}", None),
        ("seventy-two", None),
        ("=", None),
        ("5 =", None),
        ("", None),
        ("\\text{", None),
        ("9" * 301, None),
    ],
)
def test_one_number_in_a_word_problem(text, value):
    amount = amount_in(text, any_words=True)
    assert (amount and str(amount.value)) == (value and str(type(amount.value)(value)))
    gold = "0" if value is None else value
    assert number_reward([""], [rf"\boxed{{{text}}}"], answer=[gold]) == [float(value is not None)]


@pytest.mark.parametrize(
    ("gold", "text", "is_equal"),
    [
        ("(0, 100)", "(0,100)", True),
        ("[0, 100]", "[0,100]", True),
        ("(1,200)", "(1, 200)", True),
        ("(1, 100, 200)", "(1,100,200)", True),
        ("\\{1, 200\\}", "\\{1,200\\}", True),
        ("10, 100, 1000", "10,100,1000", True),
        ("(0,1000)", "(0,1{,}000)", True),
        ("(10000, 5)", "(10,000, 5)", True),
        ("0100", "[0,100]", False),
        ("1200", "(1,200)", False),
        ("10000", "(10,000)", True),
        ("5", "\\ge 5", False),
        ("5", "> 5", False),
        ("5", "x \u2260 5", False),
        ("2", "2ab", False),
        ("101", "101_2", True),
        ("2516_9", "2516_8", False),
        ("2516_{8}", "2516_8", True),
        ("\\sqrt{8}", "\u221a(8)", True),
        ("2\\pi", "2pi", True),
        ("\\frac13", "0.\\bar{3}", True),
        ("[1,2]", "x\u2208[1,2]", True),
        ("\\varnothing", "\\emptyset", True),
        ("5", "5\\text{ million}", False),
    ],
)
def test_expressions_beside_those_of_the_file(gold, text, is_equal):
    pytest.importorskip("math_verify")
    assert expression_reward([""], [rf"\boxed{{{text}}}"], answer=[gold]) == [float(is_equal)]


def test_gold_numbers_in_any_form():
    for answer in (72, 72.0, "72", "x\n#### 72", "72.00", "\u2007 72"):
        assert number_reward([""], [r"\boxed{72}"], answer=[answer]) == [1.0]
    for answer in (-1e16, "\u221210000000000000000", "#### -10\\,000\\,000\\,000\\,000\\,000"):
        assert number_reward([""], [r"\boxed{- 10 000 000 000 000 000}"], answer=[answer]) == [1.0]
    for answer in (float("nan"), float("inf"), "5!"):
        assert number_reward([""], [r"\boxed{5}"], answer=[answer]) == [0.0]


def test_hostile_texts_cost_little():
    """Their cost would double with each character, if it were not linear."""
    for unit in ("a", " ", "1 ", "{", "\\text{", "(", "-", "\\frac", "a1", "= ", "\\,", "1/", "^{"):
        for any_words in (True, False):
            amount_in(unit * (300 // len(unit)), any_words=any_words)
            expression_reward([""], [r"\boxed{" + unit * 100_000 + "}"], answer=["5"])
