"""Following a run from its files: what is told, when it ends, and files that change under the reader."""

import json

import pytest
import yaml

from shardes.errors import UserError
from shardes.monitor.watch import RunView, watch
from tests.helpers.inprocess import call

HEADER = {
    "type": "header",
    "config": {
        "model": {"path": "models/some-model"},
        "task": {"name": "countdown"},
        "es": {"iterations": 4, "population": 3},
    },
}


def members(iteration, number):
    return [
        {"type": "member", "iteration": iteration, "member": m, "reward": 0.1 * m, "by_problem": [0.0] * 9}
        for m in range(number)
    ]


def update(iteration):
    return [
        *members(iteration, 3),
        {"type": "update", "iteration": iteration, "coefficients": [0.0] * 3},
        {"type": "weights", "iteration": iteration + 1, "digest": "00"},
    ]


def evaluation(iteration, reward):
    return {
        "type": "evaluation",
        "iteration": iteration,
        "reward": reward,
        "sets": {"other": {"reward": 0.75}},
    }


def line(iteration, reward):
    return {
        "iteration": iteration,
        "reward_mean": reward,
        "reward_std": 0.125,
        "reward_min": 0.0,
        "reward_max": 0.5,
        "num_members": 3,
        "num_tokens": 600,
        "seconds": {"rollout": 2.0, "update": 1.0},
    }


def write(path, lines, mode="a"):
    with path.open(mode) as file:
        file.writelines(json.dumps(each) + "\n" for each in lines)


@pytest.fixture
def run(tmp_path):
    """A run of four iterations in the middle of the third."""
    journal = [HEADER, evaluation(0, 0.25), *update(0), *update(1), evaluation(2, 0.125), *members(2, 2)]
    write(tmp_path / "journal.jsonl", journal)
    write(tmp_path / "metrics.jsonl", [line(0, 0.1), line(1, 0.3)])
    return tmp_path


def screen(run):
    following = RunView(run)
    following.look()
    return following.screen(now=(run / "metrics.jsonl").stat().st_mtime + 20)


def test_the_state_of_a_run_that_goes_on(run):
    text = screen(run)
    assert text.splitlines() == [
        f"{run}  some-model, countdown",
        "iterations   2 of 4, 3.0 s each, about 6.0 s left",
        "members      2 of 3 in iteration 2",
        "reward       0.3000, std 0.1250, from 0.0000 to 0.5000",
        "             ▁█",
        "held-out     0.1250 after 2 iterations; the best 0.2500 after 0",
        "             █▁",
        "  other: 0.7500",
        "time         rollout 67%, update 33%",
        "tokens       200 a second, 600 an iteration",
        "last written 20 s ago",
    ]


def test_the_environment_of_episodes_is_named(run):
    task = {"name": None, "rewards": [{"name": "x"}], "environment": "guess.py:Guess"}
    header = HEADER | {"config": HEADER["config"] | {"task": task}}
    write(run / "journal.jsonl", [header], mode="w")
    assert screen(run).splitlines()[0] == f"{run}  some-model, guess.py:Guess"


def test_silence_is_told(run):
    following = RunView(run)
    following.look()
    text = following.screen(now=(run / "metrics.jsonl").stat().st_mtime + 4000)
    assert text.endswith("last written 1 h 7 min ago; does the job still run?")


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "journal.jsonl").touch()
    assert "iterations   0 of ?" in RunView(tmp_path).screen(now=0)
    write(tmp_path / "journal.jsonl", [HEADER])
    following = RunView(tmp_path)
    following.look()
    assert "iterations   0 of 4" in following.screen(now=0)


def test_it_is_followed_until_it_is_finished(run, monkeypatch):
    def grow(seconds):
        assert seconds == 0.5
        write(run / "journal.jsonl", [members(2, 3)[2], *update(2)[3:], *update(3), evaluation(4, 0.5)])
        write(run / "metrics.jsonl", [line(2, 0.4), line(3, 0.5), {"iteration": 4, "heldout_reward": 0.5}])
        monkeypatch.setattr("shardes.monitor.watch.time.sleep", lambda _: pytest.fail("it is finished"))

    monkeypatch.setattr("shardes.monitor.watch.time.sleep", grow)
    first, last = watch(run, once=False, every_seconds=0.5, is_terminal=False)
    assert "2 of 4" in first
    assert "iterations   4 of 4\n" in last
    assert "held-out     0.5000 after 4 iterations; the best 0.5000 after 4" in last
    assert last.endswith("finished\n")
    assert "in iteration" not in last


def test_without_a_terminal_there_is_one_text_an_iteration_and_no_escape(run, monkeypatch):
    calls = []

    def grow(_):
        calls.append(None)
        if len(calls) == 3:
            write(run / "metrics.jsonl", [line(2, 0.4)])
        if len(calls) == 6:
            write(run / "metrics.jsonl", [line(3, 0.4), {"iteration": 4}])

    monkeypatch.setattr("shardes.monitor.watch.time.sleep", grow)
    texts = list(watch(run, once=False, every_seconds=1, is_terminal=False))
    assert len(texts) == 3
    assert not any("\x1b" in text for text in texts)
    calls.clear()
    (text,) = watch(run, once=False, every_seconds=1, is_terminal=True)
    assert text.startswith("\x1b[H\x1b[J")


def test_torn_lines_wait_until_they_are_whole(run):
    following = RunView(run)
    torn = json.dumps(line(2, 0.4))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(torn[:40])
    following.look()
    assert "2 of 4" in following.screen(now=0)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(torn[40:] + "\n")
    following.look()
    assert "3 of 4" in following.screen(now=0)


@pytest.mark.parametrize("is_longer", [False, True])
def test_what_a_new_job_wrote_anew_is_read_anew(run, is_longer):
    following = RunView(run)
    following.look()
    rest = [evaluation(0, 0.0625), *members(0, 1)]
    # As long as before or longer, with other line breaks, so that going on in the middle would not do.
    padding = [HEADER | {"padding": "x" * 4000}] if is_longer else [HEADER]
    write(run / "journal.jsonl", padding + rest, mode="w")
    write(run / "new.jsonl", [line(0, 0.7)])
    (run / "new.jsonl").replace(run / "metrics.jsonl")
    following.look()
    text = following.screen(now=0)
    assert "1 of 4" in text
    assert "held-out     0.0625 after 0 iterations" in text


def test_the_configuration_knows_of_more_iterations_than_the_journal(run, tmp_path):
    tree = {
        "model": {"path": "models/some-model"},
        "run": {"dir": str(run)},
        "rollout": {"max_new_tokens": 3},
        "es": {"iterations": 9},
        "task": {"name": "countdown", "data": "x.jsonl"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert "iterations   2 of 9, 3.0 s each, about 21 s left" in screen(run)


def test_populations_may_grow(run):
    header = json.loads(json.dumps(HEADER))
    header["config"]["es"]["population"] = {"0": 3, "2": 8}
    write(run / "journal.jsonl", [header, *update(0), *update(1), *members(2, 2)], mode="w")
    assert "members      2 of 8 in iteration 2" in screen(run)


def test_the_command_prints_once_and_refuses_what_is_no_run(run, tmp_path):
    result = call("shardes", "watch", run, "--once")
    assert result.returncode == 0
    assert "iterations   2 of 4" in result.stdout
    refused = call("shardes", "watch", tmp_path / "nothing")
    assert refused.returncode == 2
    assert "has no journal.jsonl; give the directory of a run" in refused.stderr


def test_a_damaged_line_is_told(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{'no': json}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: a line is damaged"):
        screen(run)
