"""Rewards of the user's own: where they are found, and what a failing one costs."""

import json
import math
import sys

import pytest

from shardes.config import TaskConfig
from shardes.errors import UserError
from shardes.rollout.scoring import Scorer
from shardes.tasks.base import Task
from shardes.tasks.loading import import_reward, load_task

REWARD = "tests/helpers/rewards.py:spread"


def write_module(tmp_path, name, text):
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    return path


def test_a_reward_is_found_by_file_and_by_module(tmp_path, monkeypatch):
    text = """from dataclasses import dataclass
@dataclass
class A:
    x: "int"
def f(prompts, completions):
    return [A(7).x]
"""
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = write_module(tmp_path, "found_by_file", text)
    assert import_reward(f"{path}:f")([], []) == [7]
    write_module(tmp_path, "found_by_name", text.replace("7", "8"))
    monkeypatch.chdir(tmp_path)
    assert import_reward("found_by_name:f")([], []) == [8]
    assert import_reward("found_by_file.py:f")([], []) == [7]
    assert import_reward("math:sqrt") is math.sqrt


def test_a_reward_that_does_not_exist_is_refused(tmp_path):
    path = write_module(tmp_path, "with_a_number", "f = 3\n")
    cases = {
        f"{tmp_path}/absent.py:f": "FileNotFoundError",
        "no_such_module_anywhere:f": "ModuleNotFoundError",
        f"{path}:g": "has no function 'g'",
        f"{path}:f": "has no function 'f'",
        "math:": "has no function ''",
        ":f": "cannot be imported",
    }
    for reference, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            import_reward(reference)
        assert str(caught.value).startswith("task.reward: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise RuntimeError('no key set')", "RuntimeError: no key set"),
        ("def f(:", "SyntaxError"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        pytest.param(
            "import sys\nsys.exit(0)",
            "SystemExit",
        ),
    ],
)
def test_a_module_that_fails_to_import_is_refused_with_its_reason(tmp_path, text, words):
    path = write_module(tmp_path, "broken_reward", text)
    with pytest.raises(UserError, match=words) as caught:
        import_reward(f"{path}:f")
    assert str(path) in str(caught.value)


def score(reward, completions, *, rows=None, on_error="exclude"):
    rows = rows or [{"prompt": f"p{i}"} for i in range(len(completions))]
    task = Task("t", rows, [], lambda row: row["prompt"], reward)
    scorer = Scorer(task, on_error=on_error)
    scores = scorer.score(rows, [row["prompt"] for row in rows], completions)
    return scores.values, scores.num_failures, scorer.first_failure


def test_a_reward_gets_prompts_completions_and_columns_of_equal_length():
    calls = []

    def reward(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [1, 2.5]

    rows = [
        {"prompt": "p", "answer": 3, "completions": "mine"},
        {"prompt": [{"role": "user", "content": "q"}], "hint": "h", "prompts": 0},
    ]
    values, num_failures, _ = score(reward, ["a", "b"], rows=rows)
    assert values == [1.0, 2.5]
    assert all(type(value) is float for value in values)
    assert num_failures == 0
    prompts = ["p", [{"role": "user", "content": "q"}]]
    assert calls == [(prompts, ["a", "b"], {"answer": [3, None], "hint": [None, "h"]})]


def test_a_raising_reward_costs_the_failing_answers_only():
    def reward(prompts, completions):
        return [10 / int(completion) for completion in completions]

    values, num_failures, first = score(reward, ["1", "0", "2", "x", "4"])
    assert values == [10.0, None, 5.0, None, 2.5]
    assert num_failures == 2
    assert first.startswith("ZeroDivisionError: division by zero (")
    assert "test_loading.py:" in first


def test_a_raising_reward_costs_no_answer_whose_row_lacks_a_column():
    def reward(prompts, completions, answer):
        return [0.5 if known is None else 1 / known for known in answer]

    rows = [{"prompt": "p", "answer": 0}, {"prompt": "q"}, {"prompt": "r", "answer": 4}]
    assert score(reward, ["a", "b", "c"], rows=rows)[:2] == ([None, 0.5, 0.25], 1)


@pytest.mark.parametrize(("on_error", "substitute"), [("exclude", None), (0.0, 0.0), (-1.5, -1.5), (2, 2.0)])
def test_what_is_not_a_finite_number_counts_what_on_error_says(on_error, substitute):
    given = [1.0, math.nan, math.inf, None, -math.inf, 0]
    values, num_failures, first = score(lambda p, c: given, list("abcdef"), on_error=on_error)
    assert values == [1.0, substitute, substitute, None, substitute, 0.0]
    assert num_failures == 3
    assert "nan, which is no usable number" in first


def test_on_error_as_a_number_counts_for_rewards_that_raise():
    def reward(prompts, completions):
        if "bad" in completions:
            raise KeyError("bad")
        return [1.0] * len(completions)

    assert score(reward, ["a", "bad", "c"], on_error=-1.0)[:2] == ([1.0, -1.0, 1.0], 1)


@pytest.mark.parametrize(
    "returned", [[1.0], [1.0] * 4, [], None, 3.0, ["a", "b", "c"], [[1], [2], [3]]], ids=str
)
def test_a_reward_that_returns_something_else_fails_for_every_answer(returned):
    def reward(prompts, completions):
        return returned if len(completions) == 3 else [1.0, 1.0]

    values, num_failures, first = score(reward, list("abc"))
    assert values == [None] * 3
    assert num_failures == 3
    assert first is not None


def test_a_wrong_length_is_mended_where_single_calls_are_right():
    values, num_failures, first = score(lambda p, c: [0.5], list("abc"))
    assert (values, num_failures) == ([0.5] * 3, 0)
    assert first.startswith("ValueError: the reward returned 1 values for 3 completions")


def test_no_answers_are_not_sent_to_the_reward():
    assert score(lambda p, c: 1 / 0, [])[:2] == ([], 0)


def test_a_reward_cannot_change_what_others_see():
    rows = [{"prompt": "p", "n": 1}, {"prompt": "q", "n": 2}]

    def reward(prompts, completions, n):
        result = [float(x) for x in n]
        prompts.clear(), completions.clear(), n.clear()
        return result

    completions = ["a", "b"]
    assert score(reward, completions, rows=rows)[0] == [1.0, 2.0]
    assert completions == ["a", "b"]
    assert [row["n"] for row in rows] == [1, 2]
