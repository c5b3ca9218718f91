"""Help and mistakes are answered at once: nothing heavy is imported before a configuration is checked."""

import json
import sys

import yaml

from shardes.cli import cli
from shardes.monitor import env as environment
from tests.helpers.inprocess import call
from tests.helpers.models import tree
from tests.helpers.ranks import run_command

HEAVY = ("torch", "transformers", "deepspeed", "accelerate", "numba", "numpy", "matplotlib", "datasets")
# Runs commands one after the other and prints their statuses, and what heavy modules were imported by then.
SCRIPT = f"""
import contextlib, io, json, sys
from shardes.cli import cli, run
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["shardes", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = run(cli)
    found.append([arguments, status, [name for name in {HEAVY!r} if name in sys.modules]])
print(json.dumps(found))
"""


def test_help_and_mistakes_import_nothing_heavy(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree(tmp_path, model=bare, run_dir=tmp_path / "run")))
    helps = [["--help"], ["--version"], *([name, "--help"] for name in cli.commands)]
    mistakes = [
        ["tarin"],
        ["train"],
        ["train", "--config", "no.yaml"],
        ["train", "--config", config, "es.sgima=1"],
        ["train", "--config", config, "--dry-run", "es.sigma=0"],
        ["train", "--config", config, "model.path=no/such/model"],
        ["train", "--config", config, "task.data=no.jsonl"],
        ["train", "--config", config, "task.reward=no.py:f"],
        ["plan", "--config", config, "es.sgima=1"],
        ["plan", "--config", config, "--device-memory", "lots"],
        ["evaluate", "--model", "no/such/model"],
        ["export", "no/run", tmp_path / "out"],
        ["verify", "no/run"],
        ["journal", "no/run"],
    ]
    asked = json.dumps([list(map(str, arguments)) for arguments in helps + mistakes])
    result = run_command([sys.executable, "-c", SCRIPT, asked])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [(status, heavy) for _, status, heavy in found] == [
        *[(0, [])] * len(helps),
        *[(2, [])] * len(mistakes),
    ], found


def test_the_environment_is_described():
    result = call("shardes", "env")
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert {"shardes", "python", "platform", "torch", "transformers", "devices", "gloo"} <= set(lines)
    assert lines["backend single"] == "available"
    assert lines["backend fsdp"] == "available"
    assert lines["extra data"].count("datasets") == 1


def test_a_backend_that_is_missing_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "transformers.distributed.tensor_parallel", None)
    found = environment.describe()
    assert found["backend zero3"].startswith("not available: ")
    assert "pip install 'shardes[zero3]'" in found["backend zero3"]
    assert found["backend tensor_parallel"].startswith("not available: ")
    assert "transformers 5.23" in found["backend tensor_parallel"]


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(environment, "_EXTRAS", {"plot": ("no_such_package",)})
    wanted = "no_such_package is not installed: pip install 'shardes[plot]'"
    assert environment.describe()["extra plot"] == wanted
