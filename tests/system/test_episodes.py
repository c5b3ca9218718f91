"""Episodes of many turns: the same bytes, however many ranks there are and whatever holds the shards."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from shardes import TrainConfig, Trainer
from tests.helpers.models import tree
from tests.helpers.ranks import Ranks
from tests.helpers.runs import run_cases, steady_metrics

GAME = "tests.helpers.games:Count"
CASES = [
    ("zero3", "layer", {}),
    ("zero3", "member", {}),
    ("zero3", "iteration", {}),
    ("fsdp", "layer", {}),
    ("fsdp", "member", {}),
    ("zero3", "layer", {"rollout__temperature": 1.0, "rollout__samples_per_prompt": 2}),
]


def episodes(root, *, model, run_dir, **keys):
    settings = {
        "task__environment": GAME,
        "task__reward": None,
        "task__data": "range:0:7",
        "task__heldout_data": "range:7:10",
        "task__batch_size": None,
        "task__max_turns": 3,
        "rollout__micro_batch_size": 2,
        "rollout__max_context": 15,
        **keys,
    }
    return tree(root, model=model, run_dir=run_dir, **settings)


@pytest.fixture(scope="module")
def oracle(model_dirs, tmp_path_factory):
    """One process, one rank, plain tensors: greedy, and sampled."""
    root = tmp_path_factory.mktemp("oracle")
    trees = [
        episodes(root, model=model_dirs["tied"], run_dir=root / name, **keys)
        for name, keys in (("greedy", {}), ("sampled", CASES[-1][-1]))
    ]
    prints = run_cases(root, "oracle", trees, 1)
    return dict(zip(("greedy", "sampled"), prints, strict=True)), {
        name: steady_metrics(root / name) for name in ("greedy", "sampled")
    }


def test_the_oracle_plays_whole_episodes_and_tells_members_apart(oracle):
    prints, lines = oracle
    assert prints["greedy"] != prints["sampled"]
    for line in lines["greedy"][:-1]:
        assert line["reward_std"] > 0
        assert 2 <= line["components"]["turns"] <= 3
    assert any(line["components"]["context_full"] > 0 for line in lines["greedy"][:-1])
    assert any(line["components"]["ones"] > 0 for line in lines["greedy"][:-1])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_episodes_are_played_alike_on_any_ranks(world_size, model_dirs, oracle, tmp_path):
    prints, lines = oracle
    # All on two ranks; on three, which divide nothing, those whose ranks share a member's cohorts.
    cases = CASES if world_size == 2 else [case for case in CASES if case[1] == "layer"]
    trees = [
        episodes(
            tmp_path,
            model=model_dirs["tied"],
            run_dir=tmp_path / f"run{i}",
            parallel__backend=backend,
            rollout__gather=gather,
            **keys,
        )
        for i, (backend, gather, keys) in enumerate(cases)
    ]
    found = run_cases(tmp_path, "cases", trees, world_size)
    for i, (backend, gather, keys) in enumerate(cases):
        name = "sampled" if keys else "greedy"
        assert found[i] == prints[name], (backend, gather, keys)
        assert steady_metrics(tmp_path / f"run{i}") == lines[name]
        line = json.loads((tmp_path / f"run{i}" / "metrics.jsonl").read_text().splitlines()[0])
        assert line["num_environment_kills"] == 0


@pytest.mark.slow
def test_a_run_whose_ranks_and_environments_are_killed_ends_with_the_same_bytes(model_dirs, oracle, tmp_path):
    """Each job is killed in the middle: by an environment process or two, then by a rank."""
    config = tmp_path / "config.json"
    keys = {"parallel__backend": "zero3", "rollout__gather": "member", "log__samples_every": 1}
    run_dir = tmp_path / "run"
    config.write_text(json.dumps(episodes(tmp_path, model=model_dirs["tied"], run_dir=run_dir, **keys)))
    arguments = ["launch/train.py", "--config", str(config)]
    killed = set()
    for wanted in (4, 9):
        with Ranks(arguments, world_size=2, log_dir=tmp_path / f"logs{wanted}") as ranks:
            while num_records(run_dir) < wanted:
                assert all(process.poll() is None for process in ranks.processes), ranks.output()
                if num_records(run_dir) >= wanted - 3:  # one killed in its import ends the job with a word
                    killed |= kill_environments(ranks.processes, not_again=killed)
                time.sleep(0.02)
            os.kill(ranks.processes[wanted % 2].pid, signal.SIGKILL)
            assert 0 not in ranks.wait(60)
    assert killed
    found = run_cases(tmp_path, "rest", [json.loads(config.read_text())], 2)
    prints, lines = oracle
    assert found == [prints["greedy"]]
    assert steady_metrics(run_dir) == lines["greedy"]


def num_records(run_dir):
    journal = run_dir / "journal.jsonl"
    return journal.read_text().count("\n") if journal.exists() else 0


def kill_environments(ranks, *, not_again):
    """Kills a process that hosts environments in one rank, if it has not been killed there before."""
    done = set()
    for rank in ranks:
        servers = [pid for pid in children_of(rank.pid) if b"fork_server" in command_of(pid)]
        hosts = [pid for server in servers for pid in children_of(server)]
        for pid in hosts:
            if len(not_again) + len(done) < 4 and pid not in not_again:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    done.add(pid)
    return done


def children_of(pid):
    with contextlib.suppress(OSError):
        found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        return [int(child) for text in found for child in text.split()]
    return []


def command_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.slow
def test_a_harness_is_answered_alike_on_any_ranks(model_dirs, tmp_path):
    pytest.importorskip("openai")
    keys = {
        "task__harness": "tests/helpers/games.py:talk",
        "task__environment": None,
        "rollout__max_context": 60,
        "es__iterations": 2,
        "eval__every": 1,
    }
    alone, together = (
        episodes(tmp_path, model=model_dirs["tied"], run_dir=tmp_path / name, **keys, **others)
        for name, others in (
            ("alone", {}),
            ("together", {"parallel__backend": "zero3", "rollout__gather": "layer"}),
        )
    )
    wanted = run_cases(tmp_path, "alone-cases", [alone], 1)
    assert run_cases(tmp_path, "together-cases", [together], 2) == wanted
    lines = steady_metrics(tmp_path / "alone")
    assert lines == steady_metrics(tmp_path / "together")
    assert lines[0]["components"]["turns"] == pytest.approx((4 * 2 + 3 * 3) / 7)
    assert lines[0]["reward_std"] > 0


# The calls and the tools are of characters that the tiny model knows.
TOOLS = (
    "{{ tools | tojson }}{% for m in messages %}({{ m.role[:1] }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %})"
    "{% endfor %}{% if add_generation_prompt %}(a:{% endif %}"
)


@pytest.mark.slow
def test_a_class_as_trl_has_it_trains_in_ten_lines(model_dirs, tmp_path):
    config = TrainConfig(
        model={"path": str(model_dirs["tied"]), "dtype": "float32"},
        run={"dir": str(tmp_path / "run")},
        rollout={"max_new_tokens": 6, "max_context": 64},
        es={"iterations": 2, "population": 4, "sigma": 0.05},
        log={"samples_every": 1},
        task={"environment": "tests/helpers/games.py:Counter", "max_turns": 3, "chat_template": TOOLS},
    )
    rows = [{"prompt": [{"role": "user", "content": f"{n}"}], "target": n} for n in range(6)]
    result = Trainer(config, data=rows, heldout_data=rows[:2]).train()
    assert result.is_finished
    line = result.metrics[0]
    # The model calls nothing yet: each episode is one turn, and earns what is missing.
    assert line["components"]["turns"] == 1
    assert line["reward_mean"] == pytest.approx(-sum(range(6)) / 6 / 10)
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["messages"][0] == {"role": "user", "content": "0 (0)"}
