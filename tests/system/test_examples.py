"""The examples do what their pages say. They run in this process, which saves the imports."""

import os
import re
import runpy
import subprocess
import sys

import pytest

from tests.helpers.exports import fingerprint
from tests.helpers.ranks import ROOT, run_command, run_ranks
from tests.system.test_cli import SCRIPTS, launchers

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def run_example(tmp_path, monkeypatch, capfd):
    """Runs one as the command line would; returns what it printed."""
    monkeypatch.chdir(ROOT)

    def run(name):
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "run")])
        try:
            runpy.run_path(f"examples/{name}", run_name="__main__")
        except SystemExit as end:
            assert not end.code
        return capfd.readouterr().out

    return run


def numbers(output, word):
    return [float(text) for text in re.findall(rf"{word} ([\d.]+)", output)]


@pytest.mark.slow
def test_the_own_reward_is_learned(run_example):
    rewards = numbers(run_example("own_reward.py"), "updates:")
    assert len(rewards) == 4
    assert rewards[-1] > 1.5 * rewards[0]


@pytest.mark.slow
def test_the_own_environment_is_learned(run_example):
    rewards = numbers(run_example("own_environment.py"), "updates:")
    assert len(rewards) == 4
    assert rewards[-1] > 1.4 * rewards[0]


@pytest.mark.slow
def test_the_classes_become_likelier(run_example):
    output = run_example("classification.py")
    entropies, accuracies = numbers(output, "cross-entropy"), numbers(output, "accuracy")
    assert len(entropies) == len(accuracies) == 5
    assert entropies[-1] < 0.5 * entropies[0]
    assert accuracies[-1] > accuracies[0] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [None, pytest.param("its own", marks=pytest.mark.exhaustive)])
def test_the_resumed_run_has_the_bytes_of_the_other(run_example, launcher, monkeypatch, tmp_path):
    def start_ranks(command, *, check):
        """The ranks that torchrun would start, without the seconds of their imports."""
        text = " ".join(command)
        launch, _, rest = text.partition(" -m shardes ")
        assert launch == f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
        assert check
        run_ranks(["-m", "shardes", *rest.split()], world_size=2, log_dir=tmp_path / "logs")

    if launcher is None:
        monkeypatch.setattr(subprocess, "run", start_ranks)
    output = run_example("resume_on_other_ranks.py")
    first, second = re.findall(r": +([0-9a-f]{16})$", output, flags=re.MULTILINE)
    assert first == second


def digest_of(output):
    (digest,) = re.findall(r"weights digest: ([0-9a-f]{16})", output)
    return digest


@pytest.mark.slow
def test_the_same_script_on_several_ranks_has_the_same_bytes(run_example, tmp_path):
    alone = digest_of(run_example("several_ranks.py"))
    arguments = ["examples/several_ranks.py", str(tmp_path / "ranks")]
    assert digest_of(run_ranks(arguments, world_size=2, log_dir=tmp_path / "logs")) == alone
    first, second = (tmp_path / name / "model" for name in ("run", "ranks"))
    assert fingerprint(first) == fingerprint(second)
    # A notebook's ranks are forked by accelerate, from a process of its own here.
    notebook = run_command([sys.executable, "examples/from_a_notebook.py", tmp_path / "notebook"])
    assert digest_of(notebook.stdout) == alone, notebook.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "deepspeed"])
def test_the_same_script_under_each_launcher_has_the_same_bytes(run_example, launcher, tmp_path):
    alone = digest_of(run_example("several_ranks.py"))
    command = [*launchers()[launcher], "examples/several_ranks.py", tmp_path / "ranks"]
    result = run_command(command, timeout_seconds=280, PATH=f"{SCRIPTS}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fsdp on 2 rank(s)" in result.stdout + result.stderr
    assert digest_of(result.stdout) == alone


def test_every_example_is_run_and_listed():
    tested = set(
        re.findall(r'run_example\("(\w+\.py)"', (ROOT / "tests/system/test_examples.py").read_text())
    )
    assert tested | {"from_a_notebook.py"} == set(EXAMPLES)
    page = (ROOT / "examples" / "README.md").read_text()
    assert sorted(re.findall(r"`python examples/(\w+\.py)`", page)) == EXAMPLES
    assert len(EXAMPLES) == 6
