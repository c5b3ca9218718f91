"""The paper's settings as they are shipped, and runs that begin with them as their heads say."""

import json
import shlex
from pathlib import Path

import pytest

from shardes.config.loading import load_config
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model

ROOT = Path(__file__).parents[2]
PATHS = {path.stem: path for path in sorted((ROOT / "configs" / "paper").glob("*.yaml"))}
COUNTDOWN = {"population": 30, "sigma": 1e-3, "alpha": 5e-4, "iterations": 500, "max_new_tokens": 1024}
# What the paper reports.
REPORTED = {name: COUNTDOWN for name in PATHS if name.startswith("countdown-")} | {
    "conciseness-qwen2.5-7b": {"population": 30, "iterations": 1000, "max_new_tokens": 100},
    "math-qwen2.5-math-7b": {"population": 30, "sigma": 1e-3, "batch_size": 1024, "max_new_tokens": 3000},
    "arc-qwen2.5-14b": {"population": 50, "sigma": 1e-3, "alpha": 3e-4},
    "sudoku-qwen2.5-3b": {"population": 32, "iterations": 2500},
}
NUM_PROBLEMS = {"countdown": 200, "conciseness": 2, "sudoku": 800}
PAIR = {"input": [[1, 0]], "output": [[0, 1]]}
# One of each task; a template in words that the tiny model's tokenizer knows.
BEGUN = {
    "countdown-qwen2.5-0.5b": "{{ target }}=",
    "conciseness-qwen2.5-7b": "{{ prompt | length }}=",
    "math-qwen2.5-math-7b": "{{ answer }}=",
    "arc-qwen2.5-14b": "{{ input[0][0] }}=",
    "sudoku-qwen2.5-3b": "{{ puzzle[0][0] }}=",
}


def commands_of(path):
    """The shell commands in the head of a file."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#     ")]
    return [shlex.split(line.removeprefix("#     ").partition(" # ")[0]) for line in lines]


@pytest.mark.parametrize("name", PATHS)
def test_the_settings_are_those_that_the_paper_reports(name):
    config = load_config(PATHS[name], [])
    found = {
        "population": config.es.population,
        "sigma": config.es.sigma,
        "alpha": config.es.alpha_at(config.es.sigma),
        "iterations": config.es.iterations,
        "max_new_tokens": config.rollout.max_new_tokens,
        "batch_size": config.task.batch_size,
    }
    reported = REPORTED[name]
    assert {key: found[key] for key in reported} == reported
    assert (config.rollout.temperature, config.es.noise, config.es.alpha_schedule) == (
        0,
        "gaussian",
        "constant",
    )
    assert "alpha" in reported or config.es.alpha == "auto"
    # Its own name is in its head's command, in its run's directory and in its model's.
    assert commands_of(PATHS[name])[-1][-1] == f"configs/paper/{name}.yaml"
    assert config.run.dir == Path(f"runs/paper/{name}")
    assert name.partition("-")[2] in str(config.model.path).lower()
    assert any(command[-1] == f"models/{config.model.path.name}" for command in commands_of(PATHS[name]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


def bring_what_others_made(task):
    """What the commands that are not ours would have brought."""
    Path("data").mkdir(exist_ok=True)
    if task == "math":
        rows = [{"problem": "1+1", "answer": "2"}, {"problem": "1+2", "answer": "3"}]
        Path("data/math-train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if task == "conciseness":
        source = ROOT / "configs" / "tasks" / "conciseness-train.jsonl"
        first = source.read_text().splitlines(keepends=True)[:2]
        Path("data/conciseness-train.jsonl").write_text("".join(first))
    if task == "arc":
        for part in ("training", "evaluation"):
            Path(f"data/ARC-AGI/data/{part}").mkdir(parents=True)
            Path(f"data/ARC-AGI/data/{part}/a.json").write_text(json.dumps({"train": [PAIR], "test": [PAIR]}))


@pytest.mark.parametrize("name", BEGUN)
def test_a_run_begins_on_problems_made_as_the_head_says(tmp_path, monkeypatch, model, name):
    monkeypatch.chdir(tmp_path)
    config = load_config(PATHS[name], [])
    bring_what_others_made(config.task.name)
    for command in commands_of(PATHS[name]):
        if command[0] == "shardes":
            assert call(*command).returncode == 0, command
    rows = [json.loads(line) for line in config.task.data.read_text().splitlines()]
    assert len(rows) == NUM_PROBLEMS.get(config.task.name, len(rows))
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    shortened = [
        f"model.path={model}",
        "model.dtype=float32",
        "parallel.backend=single",
        "rollout.max_new_tokens=3",
        "rollout.micro_batch_size=4",
        "es.iterations=1",
        "es.population=2",
        "task.data=few.jsonl",
        "task.heldout_data=few.jsonl",
        "task.batch_size=null",
        "task.reward_workers=0",
        f"task.template='{BEGUN[name]}'",
    ]
    result = call("train", "--config", PATHS[name], *shortened)
    assert result.returncode == 0, result.stderr
    first, last = map(json.loads, (config.run.dir / "metrics.jsonl").read_text().splitlines())
    assert first["reward_mean"] is not None
    assert first["num_reward_failures"] == 0
    assert last["heldout_reward"] is not None


def test_one_run_of_each_task_is_begun():
    tasks = {name: load_config(path, []).task.name for name, path in PATHS.items()}
    assert sorted(tasks[name] for name in BEGUN) == sorted(set(tasks.values()))
