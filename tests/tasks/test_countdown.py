import json
import pickle
import time
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.errors import UserError
from shardes.tasks.builtin.countdown import (
    CHAT,
    SHORT,
    check_row,
    generate_problems,
    problem_key,
    split_problems,
)


def judge(style, response, numbers, target, *, prompt=""):
    """The task's components for one response: answer and format."""
    columns = {"numbers": [list(numbers)], "target": [target], "other": [None]}
    values = [component.function([prompt], [response], **columns) for component in style.rewards]
    assert all(len(value) == 1 for value in values)
    return tuple(value[0] for value in values)


def chat(expression, thoughts="let me see"):
    return f"<think>{thoughts}</think>\n<answer>{expression}</answer>"


def reward_of(style, response, numbers=(3, 5, 2), target=13, prompt=""):
    parts = judge(style, response, numbers, target, prompt=prompt)
    return sum(c.weight * part for c, part in zip(style.rewards, parts, strict=True))


@pytest.mark.parametrize(
    ("expression", "numbers", "target", "answer"),
    [
        ("3*5-2", [3, 5, 2], 13, 1),
        (" (5 * 3) - 2 ", [2, 3, 5], 13, 1),
        ("-2+3*5", [3, 5, 2], 13, 1),
        ("3*5+2", [3, 5, 2], 13, 0),
        ("13", [3, 5, 2], 13, 0),
        ("3*5-2", [3, 5, 2, 2], 13, 0),  # a number is missing
        ("3*5-2*1", [3, 5, 2], 13, 0),  # a number that is not given
        ("5+5+3", [5, 3], 13, 0),  # used twice, given once
        ("5+5+3", [5, 5, 3], 13, 1),
        ("5+8", [5, 5, 3], 13, 0),
        ("3*5-2=13", [3, 5, 2], 13, 0),  # an equation is not an expression
        ("", [3, 5, 2], 13, 0),
        ("", [], 0, 0),
        ("five", [5], 5, 0),
        ("\u0665", [5], 5, 0),
        ("98**47**47", [98, 47, 47], 1, 0),
        ("3/2", [3, 2], 1.5, 1),
        ("7/2", [7, 2], "7/2", 1),
        ("7/2", [7, 2], 3.5, 1),
        ("7/2", [7, 2], 3, 0),  # exact, so never rounded to the target
        ("1/3", [1, 3], 0.33333333333, 0),
        ("1/3", [1, 3], "1/3", 1),
        ("0.1+0.2", [0.1, 0.2], 0.3, 1),
        ("2.50*2", [2.5, 2], 5, 1),
        ("2-6", [2, 6], -4, 1),
        ("2-6", [2, 6], "-4", 1),
        ("6-2", [2, 6], -4, 0),
        ("100000000-1", [100000000, 1], 99999999, 1),
        ("(8/(3-8/3))", [8, 3, 8, 3], 24, 1),
    ],
)
def test_answer(expression, numbers, target, answer):
    assert judge(CHAT, chat(expression), numbers, target)[0] == answer
    assert judge(SHORT, f"<answer>{expression}</answer>", numbers, target) == (answer, 1)


@pytest.mark.parametrize("digits", [50, 100_000])
def test_a_huge_number_or_answer_is_worth_nothing_and_costs_nothing(digits):
    start = time.perf_counter()
    for expression in (
        "9" * digits,
        "9*" * digits + "9",
        "(" * digits,
        "-" * (digits + 1) + "9",
        " " * digits,
    ):
        assert judge(CHAT, chat(expression), [9], 9) == (0, 1)
    assert time.perf_counter() - start < 1


PIECES = ["a", "<", " ", "\n", "<think>", "</think>", "<answer>", "</answer>", "<answer>1"]


@pytest.mark.parametrize("piece", PIECES)
def test_judging_takes_linear_time(piece):
    start = time.perf_counter()
    for response in (piece * 100_000, f"<think>{piece * 100_000}", chat("1", thoughts=piece * 100_000)):
        for style in (CHAT, SHORT):
            judge(style, response, [1], 1)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("response", "answer", "form"),
    [
        (chat("3*5-2"), 1, 1),
        ("  <think></think><answer>3*5-2</answer>\n", 1, 1),
        ("<think>\na\n\nb <b>c</b> 1 < 2\n</think>\n\n<answer>3*5-2</answer>", 1, 1),
        ("<answer>3*5-2</answer>", 1, 0),
        ("let me see</think><answer>3*5-2</answer>", 1, 0),
        ("<think>let me see<answer>3*5-2</answer>", 1, 0),
        ("Sure! " + chat("3*5-2"), 1, 0),
        (chat("3*5-2") + " Done.", 1, 0),
        ("<think>a</think> so <answer>3*5-2</answer>", 1, 0),
        ("<think>a</think><think>b</think><answer>3*5-2</answer>", 1, 0),
        ("<think>a<think>b</think></think><answer>3*5-2</answer>", 1, 0),
        (chat("3*5-2", thoughts="<answer>3+5+2</answer>"), 1, 0),
        (chat("3+5+2", thoughts="<answer>3*5-2</answer>"), 0, 0),  # the last answer counts
        (chat("3+5+2") + "<answer>3*5-2</answer>", 1, 0),
        (chat("3*5-2") + "<answer>3+5+2</answer>", 0, 0),
        (chat("3*5-2") + "<answer>3+5", 1, 0),  # cut off: the last complete pair
        ("<think>a</think><answer><answer>3*5-2</answer></answer>", 0, 0),
        ("<think>a</think><answer><think>3*5-2</think></answer>", 0, 0),
        ("</answer>3*5-2<answer>", 0, 0),
        ("<think>a</think><answer>3*5-2", 0, 0),
        ("<THINK>a</THINK><ANSWER>3*5-2</ANSWER>", 0, 0),
        (chat(""), 0, 1),
        ("", 0, 0),
    ],
)
def test_chat_format(response, answer, form):
    assert judge(CHAT, response, [3, 5, 2], 13) == (answer, form)
    assert reward_of(CHAT, response) == pytest.approx(answer + 0.1 * form)


@pytest.mark.parametrize(
    ("response", "answer", "form"),
    [
        ("<answer>3*5-2</answer>", 1, 1),
        ("<answer>3+5+2</answer>", 0, 1),
        ("<answer></answer>", 0, 1),
        ("3+5+2", 0, 0),
        ("3*5-2", 0, 0),
        ("<answer>3*5-2", 0, 0),
        ("<answer>3*5-2</answer> ", 1, 0),
        ("=<answer>3*5-2</answer>", 1, 0),
        ("<answer>3+5+2</answer><answer>3*5-2</answer>", 1, 0),
        ("<answer><answer>3*5-2</answer></answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_short_format(response, answer, form):
    assert judge(SHORT, response, [3, 5, 2], 13) == (answer, form)
    assert reward_of(SHORT, response) == pytest.approx(answer + 0.1 * form)


def test_the_prompt_is_never_judged():
    row = {"numbers": [2, 3, 4], "target": 20}
    prompt = CHAT.make_prompt(row)
    text = "".join(message["content"] for message in prompt)
    # The prompt's own example would be a perfect response to this very row...
    example = text[text.rindex("<think>") :]
    assert reward_of(CHAT, example, row["numbers"], row["target"]) == pytest.approx(1.1)
    # ...and earns nothing where it belongs.
    for given_prompt in (prompt, text, chat("(2+3)*4")):
        assert reward_of(CHAT, "no idea", row["numbers"], row["target"], prompt=given_prompt) == 0


def test_prompts():
    assert SHORT.make_prompt({"numbers": [3, 5, 2], "target": 13}) == "3 5 2=13:"
    assert SHORT.make_prompt({"numbers": [2.5, 4], "target": "-7/2"}) == "2.5 4=-7/2:"
    messages = CHAT.make_prompt({"numbers": [3, 5.5, 2], "target": -13})
    assert [message["role"] for message in messages] == ["system", "user"]
    assert "3, 5.5, 2" in messages[1]["content"]
    assert "-13" in messages[1]["content"]


@pytest.mark.parametrize("style", [CHAT, SHORT])
def test_the_parts_are_named_weighted_and_judge_several_answers_at_once(style):
    assert [(c.name, c.weight) for c in style.rewards] == [("answer", 1.0), ("format", 0.1)]
    answer, form = (component.function for component in style.rewards)
    completions = ["<answer>3*5-2</answer>", "<answer>1+1+0</answer>"]
    columns = {"numbers": [[3, 5, 2], [1, 1]], "target": [13, 2], "source": ["a", "b"]}
    assert answer(["", ""], completions, **columns) == [1, 0]
    assert form(["", ""], completions, **columns) == [float(style is SHORT)] * 2
    assert pickle.loads(pickle.dumps(answer)) is answer


def test_columns_of_another_length_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        SHORT.rewards[0].function(["", ""], ["", ""], numbers=[[1]], target=[1])


@pytest.mark.parametrize(
    "row",
    [
        {"numbers": [3, 5, 2], "target": 13},
        {"numbers": [0, 2.5], "target": -2.5, "id": None},
        {"numbers": [1], "target": "7/2"},
        {"numbers": [10**12 - 1], "target": 10**12 - 1},
    ],
)
def test_check_row_accepts(row):
    check_row(json.loads(json.dumps(row)), "data.jsonl line 7")


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("numbers", {"target": 13}),
        ("target", {"numbers": [1, 2]}),
        *(
            ("numbers", {"numbers": numbers, "target": 13})
            for numbers in (
                [],
                5,
                "12",
                None,
                {"a": 1},
                [1, "2"],
                [1, None],
                [True],
                [-1],
                [-0.0],
                [[1]],
                [10**12],
                [1e300],
                [1e-20],
                [1 / 3],
                [float("nan")],
                [10**5000],
            )
        ),
        *(
            ("target", {"numbers": [1, 2], "target": target})
            for target in (
                None,
                True,
                [13],
                "",
                "thirteen",
                "1/0",
                "1e999999999",
                "7/2/",
                "\u0661\u0663",
                10**12,
                -(10**5000),
                float("inf"),
                float("nan"),
            )
        ),
    ],
)
def test_check_row_refuses(key, row):
    with pytest.raises(UserError, match=rf"data\.jsonl line 7: column '{key}' is .*; wanted: ") as caught:
        check_row(row, "data.jsonl line 7")
    assert len(str(caught.value)) < 300


def _values(numbers):
    """All that can be made of all the numbers: an independent, exhaustive solver."""
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for left, right, *rest in permutations(numbers):
        for value in (left + right, left - right, left * right, left / right if right else None):
            if value is not None:
                values |= _values([value, *rest])
    return values


def test_generated_problems_are_solvable_distinct_and_in_range():
    problems = generate_problems(60, seed=3, num_numbers=(3, 4), max_number=20, max_target=50)
    assert len(problems) == 60
    assert len({problem_key(row) for row in problems}) == 60
    assert {len(row["numbers"]) for row in problems} == {3, 4}
    for index, row in enumerate(problems):
        check_row(row, f"problem {index}")
        assert all(1 <= number <= 20 for number in row["numbers"])
        assert 1 <= row["target"] <= 50
        assert row["target"] in _values([Fraction(number) for number in row["numbers"]])


def test_generated_problems_are_pinned():
    assert generate_problems(3, seed=0) == [
        {"numbers": [43, 11, 26], "target": 28},
        {"numbers": [67, 84, 34], "target": 51},
        {"numbers": [14, 3, 8], "target": 34},
    ]
    assert generate_problems(40, seed=0)[:3] == generate_problems(3, seed=0)
    assert generate_problems(3, seed=1) != generate_problems(3, seed=0)


def test_asking_for_more_problems_than_there_are():
    # Of 1 and 1: 1+1, 1*1 and 1/1; 1-1 is not a target.
    assert len(generate_problems(2, seed=0, num_numbers=(2,), max_number=1)) == 2
    with pytest.raises(UserError, match=r"only 2 distinct .* max_number=1, .*wanted: 3"):
        generate_problems(3, seed=0, num_numbers=(2,), max_number=1)


def test_a_split_keeps_permutations_together():
    problems = generate_problems(200, seed=0, max_number=9)
    rows = [
        {"numbers": list(order), "target": row["target"]}
        for row in problems
        for order in sorted(set(permutations(row["numbers"])))
    ]
    parts = split_problems(rows, shares=(0.7, 0.2, 0.1), seed=0)
    keys = [{problem_key(row) for row in part} for part in parts]
    assert [len(part_keys) for part_keys in keys] == [140, 40, 20]
    assert sum(map(len, parts)) == len(rows)
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])

    turned = split_problems(rows[::-1], shares=(0.7, 0.2, 0.1), seed=0)
    assert [part[::-1] for part in turned] == parts
    assert split_problems(rows, shares=(0.7, 0.2, 0.1), seed=1) != parts


def test_a_split_treats_equal_numbers_alike():
    rows = [{"numbers": [2, 0.5], "target": 1}, {"numbers": [0.50, 2.0], "target": "1"}]
    for seed in range(8):
        assert sorted(map(len, split_problems(rows, shares=(0.5, 0.5), seed=seed))) == [0, 2]


def test_shares_that_do_not_sum_to_one():
    with pytest.raises(ValueError, match="sum to"):
        split_problems([], shares=(0.7, 0.2), seed=0)


@settings(deadline=None)
@given(st.text(max_size=60), st.sampled_from([CHAT, SHORT]))
def test_any_response_is_judged(text, style):
    for response in (text, f"<answer>{text}</answer>", chat(text)):
        answer, form = judge(style, response, [1, 2], 3)
        assert answer in (0.0, 1.0)
        assert form in (0.0, 1.0)
