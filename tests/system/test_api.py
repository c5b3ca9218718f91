"""Training from Python: the same run as the command line's, with data, rewards and callbacks as objects."""

import json
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM

import shardes
from shardes import TrainConfig, Trainer, UserError
from shardes.runs.journal import read_journal
from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import ROOT
from tests.helpers.rewards import spread
from tests.helpers.runs import steady_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]


@pytest.fixture
def given(tmp_path, model):
    """A configuration without data and reward, and the rows."""
    sections = tree(tmp_path, model=model, run_dir=tmp_path / "python")
    for key in ("data", "heldout_data", "reward"):
        del sections["task"][key]
    return TrainConfig(**sections), rows_of(tmp_path)


@pytest.fixture(scope="module")
def by_command(model, tmp_path_factory):
    """The same run, by the command line."""
    root = tmp_path_factory.mktemp("command")
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(tree(root, model=model, run_dir=root / "run")))
    assert call("train", "--config", path).returncode == 0
    assert call("shardes", "export", root / "run", root / "export").returncode == 0
    return root


def test_it_is_the_command_lines_run(given, by_command, tmp_path):
    config, rows = given
    trainer = Trainer(config, data=rows, heldout_data=rows, reward=spread)
    result = trainer.train()
    assert result.is_finished
    assert steady_metrics(result.run_dir) == steady_metrics(by_command / "run")
    heldout = [line["heldout_reward"] for line in result.metrics if "heldout_reward" in line]
    assert list(result.heldout_rewards.items()) == list(zip([0, 2, 3], heldout, strict=True))
    assert trainer.export(tmp_path / "export") == tmp_path / "export"
    assert fingerprint(tmp_path / "export") == fingerprint(by_command / "export")
    AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    # The directory has its data: the commands need nothing of this program.
    assert call("shardes", "verify", result.run_dir).returncode == 0
    written = sorted(path.name for path in result.run_dir.glob("*data-*.jsonl"))
    assert [name.partition("-")[0] for name in written] == ["data", "heldout_data"]
    assert json.loads((result.run_dir / written[0]).read_text().splitlines()[0]) == rows[0]


def test_a_file_is_read_with_overrides_and_trains_on_one_process(by_command, tmp_path):
    text = (by_command / "config.yaml").read_text().replace("backend: single", "backend: zero3")
    (tmp_path / "config.yaml").write_text(text)
    config = TrainConfig.load(tmp_path / "config.yaml", f"run.dir={tmp_path / 'run'}", "es.iterations=2")
    trainer = Trainer(config)
    assert (trainer.config.parallel.backend, trainer.config.es.iterations) == ("single", 2)
    result = trainer.train()
    wanted = steady_metrics(by_command / "run")
    assert [line["weights_digest"] for line in result.metrics[:2]] == [
        line["weights_digest"] for line in wanted[:2]
    ]


def test_a_callback_may_stop_the_run_which_goes_on_when_asked_to(given, by_command):
    config, rows = given
    told, evaluated = [], []

    def stop(metrics):
        told.append(metrics)
        if metrics["iteration"] == 1 and len(told) == 2:
            trainer.stop()

    trainer = Trainer(
        config,
        data=rows,
        heldout_data=rows,
        reward=spread,
        on_iteration=stop,
        on_evaluation=[evaluated.append, lambda metrics: True],
    )
    result = trainer.train()
    assert not result.is_finished
    assert [line["iteration"] for line in result.metrics] == [0, 1] == [line["iteration"] for line in told]
    assert len(evaluated) == 1
    again = trainer.train()
    assert again.is_finished
    assert steady_metrics(again.run_dir) == steady_metrics(by_command / "run")
    assert told == again.metrics
    assert [each["heldout_reward"] for each in evaluated] == list(again.heldout_rewards.values())


def test_what_a_callback_raises_ends_the_run_and_loses_nothing(given):
    config, rows = given

    def fail(metrics):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Trainer(config, data=rows, reward=spread, on_iteration=fail).train()
    assert Trainer(config, data=rows, reward=spread).train().is_finished


def test_other_data_are_another_run(given):
    config, rows = given
    Trainer(config, data=rows, reward=spread).train()
    with pytest.raises(UserError, match=r"task\.data sha256"):
        Trainer(config, data=rows[1:], reward=spread).train()


def test_any_callable_is_a_reward_and_gets_the_columns(given):
    config, rows = given
    seen = []

    class Length:
        def __call__(self, prompts, completions, wanted):
            seen.append((len(prompts), wanted))
            return [-abs(len(c) - w) for c, w in zip(completions, wanted, strict=True)]

    rows = [row | {"wanted": i} for i, row in enumerate(rows)]
    result = Trainer(config, data=rows, reward=Length()).train()
    assert result.is_finished
    assert result.metrics[0]["num_reward_failures"] == 0
    assert list(result.metrics[0]["components"]) == [Length.__qualname__]
    assert {w for _, wanted in seen for w in wanted} <= set(range(11))
    header = read_journal(result.run_dir / "journal.jsonl")[0].header
    assert header["config"]["task"]["reward"].startswith("tests.system.test_api:")


def test_a_reward_may_judge_answers_to_a_built_in_tasks_prompts(model, tmp_path):
    sections = tree(tmp_path, model=model, run_dir=tmp_path / "run", es__iterations=1)
    sections["task"] = {"name": "countdown_short"}
    rows = [{"numbers": [3, 5, 2], "target": 13}, {"numbers": [1, 2, 4], "target": 7}]
    prompts = set()

    def judge(prompts_, completions):
        return prompts.update(prompts_) or [float(len(c)) for c in completions]

    def given(prompts, completions):
        return judge(prompts, completions)

    result = Trainer(TrainConfig(**sections), data=rows, reward=given).train()
    assert prompts == {"3 5 2=13:", "1 2 4=7:"}
    assert list(result.metrics[0]["components"]) == [given.__qualname__]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "data: there are no rows"),
        ({"data": ["3+4="]}, r"data: row 0 is '3\+4='; wanted: a dictionary"),
        ({"data": [{"prompt": "1="}, {"prompt": {1, 2}}]}, "data: row 1 cannot be written as JSON"),
        ({"data": [{"prompt": "1=", "x": float("nan")}]}, "data: row 0 cannot be written as JSON"),
        ({"data": None}, r"task\.data: missing"),
        ({"reward": None}, "give either name"),
        ({"reward": "no-colon"}, "module:function"),
    ],
)
def test_what_cannot_be_used_is_told_at_once(given, change, message):
    config, rows = given
    with pytest.raises(UserError, match=message):
        Trainer(config, **({"data": rows, "reward": spread} | change))
    assert not config.run_dir.exists()


def test_mistakes_in_the_configuration_are_told_at_once(model, tmp_path):
    sections = tree(tmp_path, model=model, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"es\.sgima: unknown key; did you mean 'es\.sigma'"):
        TrainConfig(**(sections | {"es": {"iterations": 3, "sgima": 1}}))
    for section, message in (("task", "task is 3; wanted: a dictionary"), ("es", "es: got 3")):
        with pytest.raises(UserError, match=message):
            TrainConfig(**(sections | {section: 3}))
    with pytest.raises(UserError, match="run: missing"):
        TrainConfig(**{name: keys for name, keys in sections.items() if name != "run"})
    sections["task"]["data"] = [{"nonsense": 1}]
    with pytest.raises(UserError, match=r"task\.data"):
        TrainConfig(**sections)


def test_a_row_without_a_prompt_is_told(given):
    config, rows = given
    with pytest.raises(UserError, match="line 2: prompt is None"):
        Trainer(config, data=[rows[0], {"text": "x"}], reward=spread).train()


def test_on_a_launchers_ranks_the_backend_is_that_of_the_file(given, monkeypatch):
    sections = {name: dict(keys) for name, keys in given[0]._tree.items()}
    sections["parallel"]["backend"] = "fsdp"
    config = TrainConfig(**sections)
    assert Trainer(config, data=given[1], reward=spread).config.parallel.backend == "single"
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(config, data=given[1], reward=spread)
    assert (trainer.config.parallel.backend, trainer.is_main) == ("fsdp", False)
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="the launcher's variables are half set"):
        Trainer(config, data=given[1], reward=spread)


def test_importing_shardes_is_light_and_names_what_there_is():
    code = (
        "import sys, shardes; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules); "
        "from shardes import *; assert 'torch' not in sys.modules; print(Trainer.__module__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert found.stdout.strip() == "shardes.api"
    assert set(shardes.__all__) == set(dir(shardes))
    with pytest.raises(AttributeError, match="no attribute 'trainr'"):
        _ = shardes.trainr
