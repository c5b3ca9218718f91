"""The command ``shardes init``: what it writes is planned, tried and trained as it is."""

import json

import pytest
import yaml

from shardes.config.loading import load_config
from tests.helpers.inprocess import call
from tests.helpers.models import QUICKSTART

MODEL = QUICKSTART / "model"
SMALL = ("parallel.backend=single", "es.iterations=1", "es.population=2", "rollout.max_new_tokens=4")


def init(directory, *options, model=MODEL):
    return call("shardes", "init", directory, "--model", model, *options)


def test_what_it_writes_is_planned_tried_and_trained(tmp_path):
    directory = tmp_path / "my task # 1"
    result = init(directory)
    assert result.returncode == 0, result.stderr
    config = directory / "train.yaml"
    assert f"shardes plan --config {config}" in result.stdout
    assert sorted(path.name for path in directory.iterdir()) == ["problems.jsonl", "reward.py", "train.yaml"]
    planned = call("shardes", "plan", "--config", config)
    assert planned.returncode == 0, planned.stderr
    tried = call("train", "--config", config, "--dry-run", *SMALL)
    assert "nothing was trained" in tried.stdout, tried.stderr
    assert not (directory / "run").exists()
    trained = call("train", "--config", config, *SMALL)
    assert trained.returncode == 0, trained.stderr
    first, last = map(json.loads, (directory / "run" / "metrics.jsonl").read_text().splitlines())
    assert (first["num_reward_failures"], last["iteration"]) == (0, 1)
    assert 0 <= first["reward_mean"] <= 1


def as_messages(answers):
    """Answers to chats, as rewards of one's own get them."""
    return [[{"role": "assistant", "content": answer}] for answer in answers]


def test_its_reward_judges_sums(tmp_path):
    init(tmp_path)
    names = {}
    exec((tmp_path / "reward.py").read_text(), names)
    answers = ["it is 42", "42, no: 41", "none", "-42"]
    for completions in (answers, as_messages(answers)):
        rewards = names["reward"]([""] * 4, completions, answer=[42] * 4, prompt=[""] * 4)
        assert rewards == [1.0, 0.1, 0.0, 0.1]
    rows = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 200
    assert all(eval(row["prompt"].rstrip("=")) == row["answer"] for row in rows)


def test_a_built_in_task_has_its_own_reward_and_made_problems(tmp_path):
    assert init(tmp_path, "--task", "countdown", "--backend", "zero3").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["problems.jsonl", "train.yaml"]
    config = load_config(tmp_path / "train.yaml", [])
    assert (config.task.name, config.task.reward, config.parallel.backend) == ("countdown", None, "zero3")


def test_own_problems_are_left_where_they_are(tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(8)))
    assert init(tmp_path / "task", "--data", data).returncode == 0
    assert sorted(path.name for path in (tmp_path / "task").iterdir()) == ["reward.py", "train.yaml"]
    names = {}
    exec((tmp_path / "task" / "reward.py").read_text(), names)
    for completions in (["ab", "abcd"], as_messages(["ab", "abcd"])):
        assert names["reward"]([""] * 2, completions) == [-0.02, -0.04]
    trained = call("train", "--config", tmp_path / "task" / "train.yaml", *SMALL)
    assert trained.returncode == 0, trained.stderr
    line = json.loads((tmp_path / "task" / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["num_reward_failures"] == 0
    assert line["reward_mean"] <= 0


@pytest.mark.parametrize(
    ("model", "system"),
    [("some-lab/model-7B-Instruct", ""), ("some-lab/gemma-3-1b-it", ""), ("some-lab/model-7B", None)],
)
def test_a_name_on_the_hub_is_taken_as_it_is(tmp_path, model, system):
    assert init(tmp_path, "--task", "arithmetic", model=model).returncode == 0
    found = yaml.safe_load((tmp_path / "train.yaml").read_text())
    assert (found["model"]["path"], found["task"].get("system")) == (model, system)
    assert found["rollout"]["max_new_tokens"] == 128


def test_nothing_is_overwritten_and_mistakes_are_told(tmp_path):
    (tmp_path / "reward.py").write_text("mine")
    refused = init(tmp_path)
    assert refused.returncode == 2
    assert f"{tmp_path / 'reward.py'}: there already; give another directory" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["reward.py"]
    for options, message in (
        (("--task", "gsm8k"), "--data: problems of gsm8k are not made here; give a file"),
        (("--task", "arc"), "Made are those of arithmetic, countdown, sudoku"),
    ):
        refused = init(tmp_path / "new", *options)
        assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
    refused = init(tmp_path / "new", model=tmp_path)
    assert (refused.returncode, "config.json does not exist" in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "new").exists()


def test_training_without_a_configuration_says_how_to_begin():
    for command in ("train",), ("shardes", "train", "es.sigma=1"):
        refused = call(*command)
        assert refused.returncode == 2
        assert "shardes init my-task --model" in refused.stderr
