"""Rewards: where they are found, how they are called, how they add up, and what a failing one costs."""

import asyncio
import functools
import itertools
import math
import os
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from shardes.config.schema import ProblemSetConfig
from shardes.errors import UserError
from shardes.es.member import MemberResult, apply_reward_error_policy, member_rewards
from shardes.rewards import worker
from shardes.rewards.batch import RewardBatch
from shardes.rewards.importing import import_functions, reference_of
from shardes.rewards.pool import InProcessRewards
from shardes.rewards.scorer import Scorer
from shardes.rewards.signature import Signature
from shardes.tasks.base import Component, Task, TaskDefinition
from shardes.tasks.builtin.matching import exact_match_reward, regex_reward
from shardes.tasks.rewards import components


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
    assert import_functions([f"{path}:f"])[0]([], []) == [7]
    write_module(tmp_path, "found_by_name", text.replace("7", "8"))
    monkeypatch.chdir(tmp_path)
    assert import_functions(["found_by_name:f"])[0]([], []) == [8]
    assert import_functions(["found_by_file.py:f"])[0]([], []) == [7]
    assert import_functions(["math:sqrt"])[0] is math.sqrt


@pytest.fixture
def clean_imports(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_file_with_several_rewards_is_executed_once(tmp_path, monkeypatch, clean_imports):
    text = """import os, pickle
COUNT = []
COUNT.append(None)
def f(prompts, completions):
    return [len(COUNT)]
def g(prompts, completions):
    COUNT.append(None)
    return [pickle.loads(pickle.dumps(f)) is f]
"""
    write_module(tmp_path, "two_in_one", text)
    (tmp_path / "link.py").symlink_to(tmp_path / "two_in_one.py")
    monkeypatch.chdir(tmp_path)
    references = [f"{tmp_path}/two_in_one.py:g", "two_in_one.py:f", "two_in_one:f", "link.py:f"]
    g, *all_f = import_functions(references)
    assert len(set(all_f)) == 1
    assert g([], []) == [True]
    assert [f([], []) for f in all_f] == [[2]] * 3
    # Another time, what the file is by then.
    write_module(tmp_path, "two_in_one", "def f(prompts, completions):\n    return [70]")
    assert import_functions(["two_in_one.py:f"])[0]([], []) == [70]


def test_a_reward_can_import_its_neighbours(tmp_path, monkeypatch, clean_imports):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_module(tmp_path / name, "reward_names", f"NAME = {name!r}\n")
        text = "import reward_names\ndef f(prompts, completions):\n    return [reward_names.NAME]\n"
        write_module(tmp_path / name, "reward", text)
    write_module(tmp_path / "b", "random", "from reward import f\n")  # Python has one of that name
    found = import_functions([f"{tmp_path}/{name}.py:f" for name in ("a/reward", "b/reward", "b/random")])
    assert [f([], [])[0] for f in found] == ["a", "b", "b"]
    assert len({sys.modules[f.__module__] for f in found[:2]}) == 2  # so that processes find each
    import random

    assert random.__file__ != f"{tmp_path}/b/random.py"
    assert sys.path[0] == str(tmp_path / "b")


def test_a_module_that_fails_is_not_kept(tmp_path, clean_imports):
    path = write_module(tmp_path, "fails_at_first", "raise RuntimeError('at first')")
    with pytest.raises(ValueError, match="at first"):
        import_functions([f"{path}:f"])[0]
    write_module(tmp_path, "fails_at_first", "def f(completions):\n    return [1.0]")
    assert import_functions([f"{path}:f"])[0]([]) == [1.0]


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
        with pytest.raises(ValueError, match=words):
            import_functions([reference])[0]
        with pytest.raises(UserError, match=words) as caught:
            InProcessRewards([Component("r", reference)])
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
    with pytest.raises(ValueError, match=words) as caught:
        import_functions([f"{path}:f"])[0]
    assert str(path) in str(caught.value)


def scores_of(rewards, completions, *, rows=None, on_error="exclude"):
    """The scores of answers by some components, and the scorer."""
    rows = rows or [{"prompt": f"p{i}"} for i in range(len(completions))]
    task = Task("t", rows, [], lambda row: row["prompt"], tuple(rewards))
    scorer = Scorer(task, rewards=InProcessRewards(task.rewards), on_error=on_error)
    ids = [[len(text)] for text in completions]
    (pending,) = scorer.submit([RewardBatch.of(rows, [row["prompt"] for row in rows], completions, ids)])
    return scorer.collect(pending), scorer


def score(reward, completions, **arguments):
    scores, scorer = scores_of([Component("r", reward)], completions, **arguments)
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
    assert "test_rewards.py:" in first


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
    assert "nan (float), which is no usable number" in first


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


def test_a_reward_may_yield_its_values():
    def ends(completions):
        for completion in completions:
            yield float(completion)

    async def later(completions):
        return map(float, completions)

    for reward in (ends, later):
        assert score(reward, ["1", "0"])[:2] == ([1.0, 0.0], 0)
        values, num_failures, first = score(reward, ["1", "a"])
        assert (values, num_failures) == ([1.0, None], 1)
        assert first.startswith("ValueError: could not convert string to float: 'a'")
    values, _, first = score(lambda completions: itertools.repeat(1.0), ["1", "0"])
    assert values == [None, None]
    assert "returned 3 values for 2 completions" in first


def test_whatever_a_reward_raises_is_described_in_short():
    class SilentError(Exception):
        def __str__(self):
            raise ValueError

    for error, start in (
        (SilentError(), "SilentError: a message that cannot be shown ("),
        (ValueError("x" * 10**6), f"ValueError: {'x' * 2000}... ("),
        (asyncio.CancelledError(), "CancelledError:  ("),
    ):

        def reward(completions, error=error):
            raise error

        _, num_failures, first = score(reward, ["a", "b"])
        assert num_failures == 2
        assert first.startswith(start)


def test_a_wrong_length_is_mended_where_single_calls_are_right():
    values, num_failures, first = score(lambda p, c: [0.5], list("abc"))
    assert (values, num_failures) == ([0.5] * 3, 0)
    assert first.startswith("ValueError: the reward returned 1 values for 3 completions")


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


CHAT = [{"role": "user", "content": "q"}]


def test_a_reward_gets_the_columns_that_it_names():
    rows = [{"prompt": "p", "answer": 3, "hint": 4}]
    assert score(lambda prompts, completions, answer: answer, ["a"], rows=rows)[0] == [3.0]
    assert score(lambda completions, *, hint, **rest: [hint[0] + len(rest)], ["a"], rows=rows)[0] == [6.0]
    assert score(lambda completions: [len(c) for c in completions], ["abc"], rows=rows)[0] == [3.0]
    assert score(lambda completions, completion_ids: completion_ids[0], ["abc"], rows=rows)[0] == [3.0]
    _, num_failures, first = score(lambda completions, other: [1.0], ["a"], rows=rows)
    assert num_failures == 1
    assert "missing 1 required positional argument: 'other'" in first


def test_answers_to_chats_are_messages_for_those_who_want_them():
    seen = []

    def reward(prompts, completions):
        seen.append((prompts, completions))
        return [1.0] * len(completions)

    rows = [{"prompt": CHAT}, {"prompt": "text"}]
    scores_of(
        [Component("theirs", reward, takes_messages=True), Component("ours", reward)], ["a", "b"], rows=rows
    )
    prompts = [CHAT, "text"]
    assert seen == [(prompts, [[{"role": "assistant", "content": "a"}], "b"]), (prompts, ["a", "b"])]


def test_arguments_of_the_configuration_are_passed_on():
    def reward(completions, pattern, scale=1.0):
        return [scale * text.count(pattern) for text in completions]

    component = Component("r", reward, arguments={"pattern": "ab", "scale": 0.5})
    assert scores_of([component], ["abab", "b"])[0].values == [1.0, 0.0]


def test_an_argument_counts_more_than_the_column_of_its_name():
    def reward(completions, answer, **columns):
        return [answer + columns.get("hint", [0])[0]] * len(completions)

    rows = [{"prompt": "p", "answer": "a", "hint": 4}, {"prompt": "q", "answer": "b"}]
    component = Component("r", reward, arguments={"answer": 3})
    assert scores_of([component], ["x", "y"], rows=rows)[0].values == [7.0, 7.0]
    for arguments, values in (({}, [0.0, 1.0]), ({"answer": "A"}, [1.0, 0.0]), ({"answer": "B"}, [0.0, 1.0])):
        built_in = Component("exact_match", exact_match_reward, arguments=arguments)
        assert scores_of([built_in], ["a", "b"], rows=rows[1:] * 2)[0].values == values
    pattern = Component("regex", regex_reward, arguments={"pattern": "x+"})
    assert scores_of([pattern], ["xx", "y"], rows=[{"prompt": "p", "pattern": "y"}] * 2)[0].values == [
        1.0,
        0.0,
    ]


def test_arguments_that_no_call_can_have_are_refused():
    def reward(completions, limit=1):
        return [1.0]

    with pytest.raises(
        UserError, match=r"reward 'r': arguments: the function has no parameter 'limits'; it has"
    ):
        InProcessRewards([Component("r", reward, arguments={"limits": 2})])
    with pytest.raises(UserError, match=r"^eval\.sets\.x\.rewards\.0\.arguments: completions is what every"):
        of_config(rewards=[{"path": "m:f", "arguments": {"completions": []}}])


def test_an_async_reward_runs_where_a_loop_runs_already():
    loops = []

    async def reward(completions):
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return [len(text) for text in completions]

    task = Task("t", [{}], [], lambda row: "p", (Component("r", reward),))
    runner = InProcessRewards(task.rewards)
    batch = RewardBatch.of([{}] * 2, ["p"] * 2, ["a", "bc"], [[]] * 2)

    def judged():
        (future,) = runner.submit(task.rewards, [batch])
        return future.result().components["r"]

    async def notebook():
        return judged()

    assert [judged(), asyncio.run(notebook()), judged()] == [[1.0, 2.0]] * 3
    assert len(set(loops)) == 1  # what it keeps open stays usable


def test_what_coroutines_leave_behind_does_not_reach_the_next_call(monkeypatch):
    monkeypatch.setattr(worker, "_CANCEL_SECONDS", 0.02)
    reached, tasks = [], []

    async def later(*, is_stubborn):
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            if not is_stubborn:
                raise
            await asyncio.sleep(0.1)
        reached.append(is_stubborn)
        raise SystemExit(3)

    async def reward(completions, leaves):
        if leaves == ["exit"]:
            raise SystemExit(3)
        tasks.append(asyncio.ensure_future(later(is_stubborn=leaves == ["stubborn"])))
        await asyncio.sleep(0)
        return [1.0]

    component = Component("r", reward)
    runner = InProcessRewards([component])
    for leaves, failures in (("a task", 0), ("exit", 1), ("stubborn", 0), ("a task", 0)):
        batch = RewardBatch.of([{"leaves": leaves}], ["p"], ["a"], [[]])
        (future,) = runner.submit([component], [batch])
        assert future.result().num_failures == failures
    assert not reached


@pytest.mark.parametrize("name", ["sync", "async"])
def test_a_child_that_comes_back_does_not_go_on_as_this_process(name, tmp_path):
    path = tmp_path / "children"

    def forks(completions):
        if os.fork() == 0:
            with path.open("a") as file:
                file.write("x")
            return [1.0]
        return [float(os.waitstatus_to_exitcode(os.wait()[1]))]

    async def forks_later(completions):
        return forks(completions)

    process = os.getpid()
    try:
        assert score({"sync": forks, "async": forks_later}[name], ["a"])[0] == [0.0]
    finally:
        if os.getpid() != process:
            os._exit(77)
    assert path.read_text() == "x"


def unread(completions, answer, **kwargs):
    return [len(kwargs_) for kwargs_ in answer]


def read(completions, **kwargs):
    return [float(len(v)) for v in kwargs.values()]


def closed_over(completions, **kwargs):
    return [sum(kwargs[key] for key in ("a",))]


def local_names(completions, **kwargs):
    return [len(locals())]


@functools.wraps(unread)
def wrapping(*args, **kwargs):
    return unread(*args, **kwargs)


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        (unread, {"answer", "completions"}),
        (read, None),
        (closed_over, None),
        (local_names, None),
        (wrapping, None),
        (functools.partial(unread), None),
        (lambda completions, answer: [1.0], {"answer", "completions"}),
        (exact_match_reward, {"answer"}),
        (regex_reward, {"prompts", "completions", "pattern"}),
    ],
)
def test_columns_that_a_reward_does_not_look_at_are_known(function, columns):
    assert Signature.of(function).columns == columns


def test_coroutines_are_awaited_together():
    running, most = [], []

    async def reward(completions, wait):
        running.append(None)
        await asyncio.sleep(0.01)
        most.append(len(running))
        await asyncio.sleep(0.01)
        running.pop()
        return [len(text) for text in completions]

    async def raising(completions):
        raise LookupError("gone")

    parts = [Component(name, reward, arguments={"wait": 0}) for name in "ab"]
    scores, _ = scores_of([*parts, Component("c", lambda completions: [0.25] * 2)], ["x", "yz"])
    assert scores.values == [2.25, 4.25]
    assert max(most) == 2
    scores, scorer = scores_of([Component("r", raising)], ["x", "yz"])
    assert scores.num_failures == 2
    assert "LookupError: gone" in scorer.first_failure


def test_components_add_up_by_weight_and_are_known_apart():
    parts = [
        Component("answer", lambda completions: [1.0, 0.0, None, None]),
        Component("format", lambda completions: [1.0, 1.0, 0.5, None], weight=0.1),
        Component("length", lambda completions: [3, 2, 1, None], weight=-2.0),
    ]
    scores, _ = scores_of(parts, list("abcd"))
    assert scores.values == [math.fsum([1.0, 0.1, -6.0]), math.fsum([0.1, -4.0]), 0.05 - 2.0, None]
    assert scores.components == {
        "answer": [1.0, 0.0, None, None],
        "format": [1.0, 1.0, 0.5, None],
        "length": [3.0, 2.0, 1.0, None],
    }
    assert scores.num_failures == 0


def test_a_failing_component_fails_the_answer_and_no_other():
    def fragile(completions):
        return [1 / len(text) for text in completions]

    parts = [Component("good", lambda completions: [2.0] * len(completions)), Component("bad", fragile)]
    scores, scorer = scores_of(parts, ["a", "", "bb"])
    assert scores.values == [3.0, None, 2.5]
    assert scores.has_failed == [False, True, False]
    assert scores.components == {"good": [2.0, 2.0, 2.0], "bad": [1.0, None, 0.5]}
    assert "reward 'bad'" in scorer.first_failure


@pytest.mark.parametrize(
    "returned",
    [
        np.array([1, 0]),
        np.array([1.0, 0.0], dtype=np.float16),
        [np.float32(1), np.int64(0)],
        [np.array([1.0]), np.bool_(False)],
        torch.tensor([1.0, 0.0]),
        torch.tensor([1, 0]),
        [torch.tensor(1.0), torch.tensor([0])],
        (True, False),
        [Fraction(1), Decimal("0")],
    ],
    ids=lambda returned: f"{type(returned).__name__} of {type(returned[0]).__name__}",
)
def test_numbers_of_any_kind_are_numbers(returned):
    values, num_failures, _ = score(lambda completions: returned, ["a", "b"])
    assert (values, num_failures) == ([1.0, 0.0], 0)
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (["0.5", 1.0], "the reward returned '0.5' (str), which is no usable number"),
        ([math.nan, 1.0], "the reward returned nan (float), which is no usable number"),
        ([1.0] * 3, "the reward returned 3 values for 2 completions"),
        ("ab", "the reward returned 'ab' (str); wanted a list of 2 numbers"),
        ({"a": 1, "b": 2}, "(dict); wanted a list of 2 numbers"),
        (None, "the reward returned None (NoneType); wanted a list of 2 numbers"),
        (torch.tensor(1.0), "the reward returned 1.0 (float); wanted a list of 2 numbers"),
    ],
)
def test_what_is_wrong_is_said_with_the_reward_that_returned_it(returned, words):
    _, num_failures, first = score(lambda completions: returned, ["a", "b"])
    assert num_failures >= 1
    assert words in first
    assert first.endswith("(reward 'r')")


def test_only_functions_that_another_process_can_find_have_a_reference():
    assert reference_of(components) == "shardes.tasks.rewards:components"
    assert reference_of("a.py:f") == "a.py:f"
    for function in (lambda: 0, MemberResult.of_record):
        with pytest.raises(ValueError, match="at the top level of a module"):
            reference_of(function)


def of_config(definition=None, **keys):
    known = {"length": len, "spread": sum}
    return components(ProblemSetConfig(data="d", **keys), definition, known=known, key="eval.sets.x")


GENERATION = TaskDefinition("t", lambda row: "p", lambda row, where: None, rewards=(Component("own", abs),))
LIKELIHOOD = TaskDefinition("t", lambda row: "p", lambda row, where: None, choices=lambda row: None)


def test_rewards_come_from_the_configuration_or_else_from_the_task():
    assert of_config(reward="a/b.py:f") == (Component("f", "a/b.py:f", takes_messages=True),)
    assert of_config(GENERATION, name="countdown") == GENERATION.rewards
    assert of_config(LIKELIHOOD, name="boolq", metric="accuracy") == ()
    parts = [
        {"name": "length", "weight": 0.5, "arguments": {"limit": 3}},
        {"path": "m:f"},
        {"path": "n:f", "label": "g", "weight": -1},
    ]
    wanted = (
        Component("length", len, 0.5, {"limit": 3}),
        Component("f", "m:f", takes_messages=True),
        Component("g", "n:f", -1.0, takes_messages=True),
    )
    assert of_config(rewards=parts) == wanted
    assert of_config(GENERATION, name="countdown", rewards=parts) == wanted


@pytest.mark.parametrize(
    ("definition", "keys", "words"),
    [
        (
            None,
            {"rewards": [{"name": "no"}]},
            r"rewards\.0\.name: got 'no'; known rewards: length, spread",
        ),
        (None, {"rewards": [{"path": "m:f"}, {"path": "n:f"}]}, r"rewards\.1: two rewards are called 'f'"),
        (LIKELIHOOD, {"name": "boolq", "rewards": [{"path": "m:f"}]}, r"rewards: boolq compares likelihoods"),
        (
            GENERATION,
            {"name": "countdown", "metric": "accuracy"},
            r"metric: got accuracy, which is for",
        ),
    ],
)
def test_rewards_that_do_not_fit_are_refused_by_their_key(definition, keys, words):
    with pytest.raises(UserError, match=rf"^eval\.sets\.x\.{words}"):
        of_config(definition, **keys)


def test_with_worst_a_failure_counts_as_the_least_of_all_members():
    results = [
        MemberResult(0, 0.5, 0, 9, num_scored=4, least=0.25),
        MemberResult(1, 1.0, 3, 9, num_scored=1, least=1.0),
        MemberResult(2, None, 4, 9, num_scored=0, least=None),
        MemberResult(3, 0.0, 2, 9, num_scored=2, least=-1.0),
    ]
    wanted = [0.5, (1.0 - 3.0) / 4, -1.0, (0.0 - 2.0) / 4]
    assert member_rewards(results, on_error="worst") == wanted
    assert member_rewards(results[::-1], on_error="worst") == wanted[::-1]
    for rule in ("exclude", 0.0):  # these are part of the results
        assert member_rewards(results, on_error=rule) == [0.5, 1.0, None, 0.0]
    nothing = [MemberResult(0, None, 4, 9), MemberResult(1, None, 4, 9)]
    assert member_rewards(nothing, on_error="worst") == [None, None]


def test_what_one_evaluation_earned_is_settled_by_itself():
    rewards, has_failed = [0.5, None, 2.0, None], [False, True, False, False]
    assert apply_reward_error_policy(rewards, has_failed, on_error="worst") == [0.5, 0.5, 2.0, None]
    assert apply_reward_error_policy(rewards, has_failed, on_error="exclude") == rewards
    assert apply_reward_error_policy([None], [True], on_error="worst") == [None]
