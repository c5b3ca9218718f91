"""Samples of a run as a page: answers, and conversations."""

import json

import pytest

from tests.helpers.inprocess import call

CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]
TALK = [
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is\n3.", "tool_call_error": "no such tool"},
]


@pytest.fixture
def run_dir(tmp_path):
    answer = {"prompt": "Say a.", "completion": "a\x1b]0;owned\x07", "token_ids": [1], "reward": None}
    lines = [
        {"iteration": 0, "member": 0, **answer},
        {"iteration": 0, **answer, "reward": 0.25},
        {"iteration": 2, **answer, "reward": 1.0, "set": "other"},
        {"iteration": 2, **answer, "reward": 1.5, "messages": TALK},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path


def test_the_last_samples_of_the_centre_are_shown(run_dir):
    result = call("shardes", "samples", run_dir)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        "iteration 2, the centre: 2 of 2 samples",
        "",
        "-- 1, other: reward 1",
        *(
            "prompt:",
            "    Say a.",
            "answer:",
            "    a\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}",
        ),
        "",
        "-- 2: reward 1.5",
        *("user:", "    What is 1 + 2?"),
        *("assistant:", "    calls add with {'a': 1, 'b': 2}"),
        *("tool (add):", "    3"),
        *("assistant:", "    It is", "    3.", "    [no such tool]"),
    ]


def test_samples_may_be_chosen(run_dir):
    result = call("shardes", "samples", run_dir, "--iteration", 2, "--num-samples", 1)
    assert result.stdout.splitlines()[0] == "iteration 2, the centre: 1 of 2 samples"
    assert "What is" not in result.stdout
    result = call("shardes", "samples", run_dir, "--member")
    assert result.stdout.splitlines()[:3] == [
        *("iteration 0, the first member: 1 of 1 samples", "", "-- 1: no reward"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--iteration", 1],
            "--iteration 1: {}/samples.jsonl has no samples of the centre of it; there are: 0, 2",
        ),
        (["--member", "--iteration", 2], "has no samples of the first member of it; there are: 0"),
    ],
)
def test_what_is_not_there_is_said(run_dir, arguments, message):
    result = call("shardes", "samples", run_dir, *arguments)
    assert result.returncode == 2
    assert message.format(run_dir) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_directory_that_is_none_of_a_run_is_refused(tmp_path):
    result = call("shardes", "samples", tmp_path)
    assert result.returncode == 2
    assert f"{tmp_path}/samples.jsonl cannot be read (it does not exist)" in result.stderr


def test_what_is_no_text_is_shown_too(run_dir):
    """An episode may have failed by it."""
    message = {"role": "user\udfff", "content": "a\ud800"}
    line = {"iteration": 3, "completion": "", "messages": [message], "reward": None}
    (run_dir / "samples.jsonl").write_text(json.dumps(line) + "\n")
    result = call("shardes", "samples", run_dir)
    assert result.returncode == 0, result.stderr
    assert "user\ufffd:\n    a\ufffd" in result.stdout
