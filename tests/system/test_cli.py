"""What a user who made a mistake sees: one message, exit status 2, no traceback, and nothing lost."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import ROOT, free_port, run_command

SCRIPTS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


def write_config(tmp_path, model, **changes):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / "run", **changes)))
    return path


def train(config, *overrides):
    return call("train", "--config", config, *overrides)


def assert_refused(result, *fragments):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("es.sgima=0.1", ["es.sgima: unknown key", "did you mean 'es.sigma'?"]),
        ("es.population=many", ["es.population: got 'many'", "valid integer"]),
        ("es.sigma=0", ["es.sigma: got 0", "greater than 0"]),
        ("es.sigma=-1e-3", ["es.sigma: got", "greater than 0"]),
        (
            "model.path=no/such/model",
            ["model.path", "no/such/model/config.json does not exist", "ORGANISATION/MODEL"],
        ),
        ("task.data=no/such.jsonl", ["task.data: no/such.jsonl cannot be read"]),
        ("task.reward=tests/helpers/rewards.py:nothing", ["task.reward", "has no function 'nothing'"]),
        ("parallel.deepspeed=no.json", ["parallel.deepspeed: no.json cannot be read"]),
        ("parallel.deepspeed=for-single.json", ["parallel.deepspeed", "is for parallel.backend: zero3"]),
    ],
)
def test_a_wrong_value_is_refused(tmp_path, model, override, fragments):
    changes = {"parallel__backend": "zero3"} if "no.json" in override else {}
    assert_refused(train(write_config(tmp_path, model, **changes), override), *fragments)
    assert not (tmp_path / "run").exists()


def test_a_model_directory_without_weights_is_refused(tmp_path, model):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    result = train(write_config(tmp_path, model), f"model.path={bare}")
    assert_refused(result, "model.path", "has no *.safetensors files")
    (bare / "model.safetensors").symlink_to(model / "model.safetensors")
    result = train(write_config(tmp_path, model), f"model.path={bare}")
    assert_refused(result, "model.path", "its tokenizer has no vocabulary")


def test_a_line_that_is_not_json_is_refused_by_its_number(tmp_path, model):
    config = write_config(tmp_path, model)
    with (tmp_path / "problems.jsonl").open("a") as data:
        data.write("{'prompt': 'single quotes'}\n")
    assert_refused(train(config), "task.data", "line 12: not JSON")


def test_a_reward_that_always_raises_stops_the_run_with_its_message(tmp_path, model):
    config = write_config(tmp_path, model)
    result = train(config, "task.reward=tests/helpers/rewards.py:always_raises", "eval.every=0")
    assert_refused(result, "task.reward", "KeyError: 'no such column'", "rewards.py")


def test_a_mended_reward_goes_on_in_the_same_directory(tmp_path, model):
    reward = tmp_path / "reward.py"
    config = write_config(tmp_path, model, task__reward=f"{reward}:score", eval__every=0)
    reward.write_text("def score(prompts, completions, **columns):\n    raise OSError('not yet')\n")
    assert_refused(train(config), "OSError: not yet")
    reward.write_text(
        "def score(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    result = train(config)
    assert result.returncode == 0, result.stderr


def test_a_reward_that_sometimes_raises_is_counted(tmp_path, model):
    config = write_config(tmp_path, model)
    result = train(config, "task.reward=tests/helpers/rewards.py:fragile")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("a reward failed") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["num_reward_failures"] > 0 for line in lines[:-1])
    assert all(line["reward_mean"] is not None for line in lines[:-1])


def test_a_second_job_in_the_same_directory_is_refused(tmp_path, model):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / ".lock"
    code = (
        "import sys, pathlib; from shardes.runs.lock import DirectoryLock;"
        f"DirectoryLock(pathlib.Path({str(path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        refused = train(write_config(tmp_path, model))
        holder.kill()
    assert_refused(refused, "run.dir", f"in use by process {holder.pid} on host {socket.gethostname()}")
    assert train(write_config(tmp_path, model)).returncode == 0  # the dead hold nothing


def test_missing_arguments_and_unknown_commands():
    assert_refused(call("train"), "--config")
    assert_refused(call("shardes", "tarin"), "tarin")
    assert call("shardes", "--help").returncode == 0


def test_the_scripts_end_with_the_same_status():
    for script in (["launch/train.py"], ["-m", "shardes", "train"]):
        assert_refused(run_command([sys.executable, *script, "--config", "no.yaml"]), "--config no.yaml")


def test_a_mistake_is_answered_before_anything_heavy_is_imported(tmp_path, model):
    config = write_config(tmp_path, model)
    code = (
        "import sys; from shardes.cli import train\n"
        f"try: train.main(['--config', {str(config)!r}, 'es.sigma=0'], standalone_mode=False)\n"
        "except Exception as error: print(type(error).__name__, 'torch' in sys.modules)"
    )
    assert run_command([sys.executable, "-c", code]).stdout.strip() == "UserError False"


@pytest.mark.parametrize("command", ["export", "plot"])
def test_commands_on_a_directory_that_is_no_run(tmp_path, command):
    arguments = [tmp_path / "nothing", *([tmp_path / "out"] if command == "export" else [])]
    if command == "plot":
        pytest.importorskip("matplotlib")
    assert_refused(call("shardes", command, *arguments), "nothing")


@pytest.mark.parametrize(("text", "fragment"), [("a: [", "not valid YAML"), ("- 1", "must be a mapping")])
def test_a_damaged_run_configuration_is_refused(tmp_path, text, fragment):
    (tmp_path / "config.yaml").write_text(text)
    assert_refused(call("shardes", "export", tmp_path, tmp_path / "out"), "RUN_DIR", fragment)


def test_an_empty_journal_has_nothing_to_export(tmp_path, model):
    (tmp_path / "run").mkdir()
    write_config(tmp_path, model).rename(tmp_path / "run" / "config.yaml")
    commands = [("export", tmp_path / "run", tmp_path / "out"), ("verify", tmp_path / "run")]
    for command in [*commands, ("journal", tmp_path / "run")]:
        assert_refused(call("shardes", *command), "RUN_DIR", "journal.jsonl does not exist")
    (tmp_path / "run" / "journal.jsonl").touch()
    for command in [*commands, ("journal", tmp_path / "run")]:
        assert_refused(call("shardes", *command), "RUN_DIR", "its journal is empty")


def launchers():
    scripts = SCRIPTS
    port = str(free_port())
    return {
        "deepspeed": [f"{scripts}/deepspeed", "--num_gpus", "2", "--master_port", port],
        "torchrun": [f"{scripts}/torchrun", "--nproc-per-node", "2", "--master-port", port],
        "accelerate": [
            *(f"{scripts}/accelerate", "launch", "--multi_gpu", "--num_processes", "2"),
            *("--main_process_port", port),
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["deepspeed", "torchrun", pytest.param("accelerate", marks=pytest.mark.exhaustive)]
)
def test_launchers_train_and_show_a_mistake_once(tmp_path, model, launcher):
    pytest.importorskip("deepspeed")
    config = write_config(tmp_path, model, parallel__backend="zero3")
    # deepspeed looks for its own commands on the path
    path = {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    command = [*launchers()[launcher], "launch/train.py", "--config", str(config)]
    wrong = run_command([*command, "es.sgima=1"], **path)
    output = wrong.stdout + wrong.stderr
    # torchrun's and accelerate's own exit status is 1 whatever their workers'.
    assert wrong.returncode == (2 if launcher == "deepspeed" else 1), output
    assert output.count("es.sgima: unknown key") == 1, output
    good = run_command([*command, "--es.iterations=1"], **path)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "zero3 on 2 rank(s)" in good.stdout + good.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
