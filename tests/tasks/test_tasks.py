"""The built-in tasks on recorded answers, good and bad, and what each refuses as a row."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from shardes.config.schema import ProblemSetConfig
from shardes.errors import UserError
from shardes.rewards.batch import RewardBatch
from shardes.rewards.importing import import_functions, reference_of
from shardes.rewards.pool import RewardProcessPool
from shardes.tasks import builtin
from shardes.tasks.base import Choices
from shardes.tasks.builtin.boxed import boxed_reward, expression_reward
from shardes.tasks.builtin.matching import regex_reward, think_answer_reward
from shardes.tasks.registry import REWARDS, TASKS, definition_of

RECORDED = [json.loads(line) for line in (Path(__file__).parents[1] / "data" / "answers.jsonl").open()]
FILES = sorted(Path(builtin.__file__).parent.glob("*.py"))
GENERATION = sorted(name for name, task in TASKS.items() if task.choices is None)


def test_every_task_that_judges_answers_has_recorded_ones():
    assert {record["task"] for record in RECORDED} == set(GENERATION) - {"countdown", "countdown_short"}


@pytest.mark.parametrize("name", sorted({record["task"] for record in RECORDED}))
def test_recorded_answers(name):
    if name == "math":
        pytest.importorskip("math_verify")
    records = [record for record in RECORDED if record["task"] == name]
    wrong = []
    for record in records:
        TASKS[name].check_row(record["row"], "row")
        columns = {key: [value] for key, value in record["row"].items() if key != "prompt"}
        values = {}
        for component in TASKS[name].rewards:
            (values[component.name],) = component.function([""], [record["response"]], **columns)
        if values != pytest.approx(record["expected"]) or {type(value) for value in values.values()} != {
            float
        }:
            wrong.append((record["note"], record["response"][:80], record["expected"], values))
    assert not wrong
    values = {record["expected"][TASKS[name].rewards[0].name] for record in records}
    assert len(values) > 1  # good ones and bad ones


@pytest.mark.parametrize("name", sorted({record["task"] for record in RECORDED} - {"math"}))
def test_a_batch_is_judged_like_its_answers_one_by_one(name):
    records = [record for record in RECORDED if record["task"] == name]
    columns = {
        key: [record["row"][key] for record in records] for key in records[0]["row"] if key != "prompt"
    }
    for component in TASKS[name].rewards:
        together = component.function([""] * len(records), [r["response"] for r in records], **columns)
        assert together == pytest.approx([record["expected"][component.name] for record in records])


def test_every_module_declares_tasks_and_rewards_of_its_own():
    modules = [import_module(f"{builtin.__name__}.{path.stem}") for path in FILES if path.stem != "__init__"]
    assert sum(len(module.TASKS) for module in modules) == len(TASKS)
    assert sum(len(getattr(module, "REWARDS", {})) for module in modules) == len(REWARDS)
    for task in TASKS.values():
        assert (task.choices is None) == bool(task.rewards)
        assert len({component.name for component in task.rewards}) == len(task.rewards)
        assert task.generate is None or task.row_key is not None


def test_every_reward_can_be_found_by_another_process():
    for function in REWARDS.values():
        assert import_functions([reference_of(function)])[0] is function
    components = [component for task in TASKS.values() for component in task.rewards]
    assert {component.function for component in components} <= set(REWARDS.values())


ROWS = {
    "arc": {"examples": [{"input": [[1]], "output": [[2]]}], "input": [[3]], "output": [[4]]},
    "arithmetic": {"expression": "1 + 1", "answer": 2},
    "boolq": {"passage": "Cats purr.", "question": "do cats purr", "label": 1},
    "classification": {"text": "t", "label": "good"},
    "conciseness": {"prompt": "q", "answer": "a"},
    "copa": {
        "premise": "It rained.",
        "choice1": "It was wet.",
        "choice2": "I slept.",
        "question": "effect",
        "label": 0,
    },
    "countdown": {"numbers": [1, 2], "target": 3},
    "countdown_short": {"numbers": [1, 2], "target": 3},
    "exact_match": {"prompt": "q", "answer": "a"},
    "gsm8k": {"question": "q", "answer": "x #### 3"},
    "math": {"problem": "q", "answer": "x"},
    "multiple_choice": {"prompt": "q", "choices": ["a", " b"], "label": 1},
    "perplexity": {"text": "t"},
    "regex": {"prompt": "q", "pattern": "a+"},
    "sst2": {"sentence": "a fine film ", "label": 1},
    "sudoku": {"puzzle": [[4, 1, 2, 3], [3, 0, 0, 0], [0, 3, 4, 0], [2, 0, 3, 0]]},
}


COPA = [" it was wet.", " I slept."]


def definition(name):
    words = ["bad", "good"] if name == "classification" else None
    config = ProblemSetConfig(name=name, data="d", label_words=words)
    return definition_of(config.name, label_words=config.label_words)


@pytest.mark.parametrize("name", TASKS)
def test_a_good_row_is_accepted_and_every_missing_column_is_named(name):
    task, row = definition(name), ROWS[name]
    task.check_row(row, "file line 3")
    assert task.make_prompt(row) or name == "perplexity"
    for column in row:
        if column == "prompt":
            continue  # checked where rows are read, as a template may stand in for it
        rest = {key: value for key, value in row.items() if key != column}
        with pytest.raises(UserError, match=r"file line 3: column '.*' is missing") as caught:
            task.check_row(rest, "file line 3")
        if name != "math":
            assert f"column '{column}' is missing; the row has " in str(caught.value)
            assert f"task.columns={{{column}: COLUMN}}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("arc", {"input": [[1, 2], [3]]}),
        ("arc", {"output": [[10]]}),
        ("arc", {"output": []}),
        ("arc", {"examples": []}),
        ("arc", {"examples": [{"input": [[1]]}]}),
        ("arithmetic", {"answer": "two"}),
        ("arithmetic", {"answer": True}),
        ("boolq", {"label": 2}),
        ("boolq", {"label": "maybe"}),
        ("boolq", {"passage": ""}),
        ("classification", {"label": 2}),
        ("classification", {"label": "fine"}),
        ("conciseness", {"answer": 3}),
        ("copa", {"question": "reason"}),
        ("copa", {"label": -1}),
        ("copa", {"label": True}),
        ("exact_match", {"answer": " "}),
        ("gsm8k", {"answer": "so it is 3 apples"}),
        ("gsm8k", {"answer": True}),
        ("gsm8k", {"question": None}),
        ("math", {"answer": " "}),
        ("math", {"answer": None, "solution": "no box"}),
        ("multiple_choice", {"choices": ["a"]}),
        ("multiple_choice", {"choices": ["a", " a"]}),
        ("multiple_choice", {"choices": ["a", 3]}),
        ("multiple_choice", {"label": 2}),
        ("multiple_choice", {"label": "c"}),
        ("perplexity", {"text": "\n"}),
        ("regex", {"pattern": "("}),
        ("sst2", {"label": -1}),
        ("sst2", {"sentence": 3}),
        ("sudoku", {"puzzle": [[1, 2, 3, 4]]}),
        ("sudoku", {"puzzle": [[5, 0, 0, 0], [0] * 4, [0] * 4, [0] * 4]}),
        ("sudoku", {"puzzle": [[1, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4]}),
        ("sudoku", {"puzzle": "1234"}),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_with_its_place_and_column(name, changes):
    with pytest.raises(UserError, match=r"^file line 3: column '\w+' is .*; wanted: ") as caught:
        definition(name).check_row(ROWS[name] | changes, "file line 3")
    assert f"'{list(changes)[-1]}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "prompt", "choices"),
    [
        ("sst2", {}, "Review: a fine film\nThe verdict on the film is", Choices([" bad", " good"], 1)),
        ("sst2", {"label": 0}, None, Choices([" bad", " good"], 0)),
        ("sst2", {"label": "bad"}, None, Choices([" bad", " good"], 0)),
        ("boolq", {}, "Cats purr.\nQuestion: Do cats purr?\nAnswer:", Choices([" no", " yes"], 1)),
        ("boolq", {"question": "Do cats purr?", "label": False}, None, Choices([" no", " yes"], 0)),
        ("copa", {}, "It rained so", Choices(COPA, 0)),
        (
            "copa",
            {"question": "cause", "label": 1},
            "It rained because",
            Choices(COPA, 1),
        ),
        ("classification", {}, "t\nLabel:", Choices([" bad", " good"], 1)),
        ("multiple_choice", {}, "q", Choices([" a", " b"], 1)),
        ("multiple_choice", {"label": "a"}, "q", Choices([" a", " b"], 0)),
        ("perplexity", {}, "", Choices(["t"], 0)),
        ("perplexity", {"prompt": "p"}, "p", Choices(["t"], 0)),
    ],
)
def test_likelihood_tasks(name, row, prompt, choices):
    task = definition(name)
    row = ROWS[name] | row
    task.check_row(row, "row")
    if prompt is not None:
        assert task.make_prompt(row) == prompt
    assert task.choices(row) == choices
    assert task.rewards == ()
    assert task.metric == ("log_likelihood" if name == "perplexity" else "cross_entropy")


def test_label_words_replace_the_tasks_own():
    task = definition_of("sst2", label_words=["terrible", " great"])
    row = {"sentence": "s", "label": "great"}
    task.check_row(row, "row")
    assert task.choices(row) == Choices([" terrible", " great"], 1)


def test_chat_prompts_show_the_problem_but_not_its_answer():
    texts = {
        name: "\n".join(m["content"] for m in definition(name).make_prompt(row))
        for name, row in ROWS.items()
        if isinstance(definition(name).make_prompt(row), list)
    }
    assert "4 1 2 3\n3 0 0 0\n0 3 4 0\n2 0 3 0" in texts["sudoku"]
    assert "Input 1:\n1\n\nOutput 1:\n2" in texts["arc"]
    assert "input:\n3" in texts["arc"]
    assert "4" not in texts["arc"]
    assert texts["gsm8k"].startswith("q\n\n")
    assert "3" not in texts["gsm8k"]
    assert r"\boxed{}" in texts["math"]
    assert texts["conciseness"] == "q"


def test_regex_with_one_pattern_for_all_and_the_format_rewards():
    assert regex_reward(["", ""], ["aa", "b"], pattern="a+") == [1.0, 0.0]
    responses = ["<think>a</think> <answer>b</answer>", "<answer>b</answer>", ""]
    assert think_answer_reward([""] * 3, responses) == [1.0, 0.0, 0.0]
    assert boxed_reward([""] * 3, [r"so \boxed{1}", r"\boxed{ }", "1"]) == [1.0, 0.0, 0.0]


def test_without_math_verify_math_is_refused_by_name(monkeypatch):
    from shardes.tasks.builtin import boxed

    monkeypatch.setattr(boxed, "_has_math_verify", lambda: False)
    with pytest.raises(UserError, match=r"math-verify; install it with: pip install 'shardes\[math\]'"):
        TASKS["math"].check_row(ROWS["math"], "row")
    # Numbers and equal texts need no package.
    columns = {"answer": ["0.5", "x"]}
    assert expression_reward(["", ""], [r"\boxed{\frac12}", r"\boxed{x}"], **columns) == [1.0, 1.0]


@pytest.mark.slow
def test_an_expression_that_never_ends_costs_the_time_limit_and_no_other_answer():
    pytest.importorskip("math_verify")
    completions = [r"\boxed{(1+x)^2}", r"\boxed{(x+y+z)^{99}}", r"\boxed{2x+1+x^2}", r"\boxed{x^2}"]
    answers = RewardBatch.of([{"answer": "x^2+2x+1"}] * 4, ["p"] * 4, completions, [[]] * 4)
    (component,) = TASKS["math"].rewards
    with RewardProcessPool([component], timeout_seconds=10, max_workers=4, memory_bytes=None) as rewards:
        (future,) = rewards.submit([component], [answers])
        output = future.result(120)
    assert output.components[component.name] == [1.0, None, 1.0, 0.0]
    assert output.has_failed == [False, True, False, False]
