"""Training from broken model directories: one message and status 2 within seconds, whatever is broken."""

import shutil
import subprocess
import sys

import pytest
import yaml

from tests.helpers.broken_models import BROKEN
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base") / "model", tied=False, architecture="llama")


@pytest.fixture
def config(base, tmp_path, request):
    shutil.copytree(base, tmp_path / "model")
    BROKEN[request.param][0](tmp_path / "model")
    settings = tree(tmp_path, model=tmp_path / "model", run_dir=tmp_path / "run")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "c.yaml"


def check(found, case, config):
    lines = found.stderr.splitlines()
    (message,) = [line for line in lines if line.startswith("Error: ")]
    assert message.startswith("Error: model.path: ") and BROKEN[case][1] in message
    assert "Traceback" not in found.stderr + found.stdout
    assert found.returncode == 2
    assert not (config.parent / "run" / "journal.jsonl").exists()


def test_there_are_at_least_thirty_ways():
    assert len(BROKEN) >= 30


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("config", "case"), [(case, case) for case in BROKEN], indirect=["config"])
def test_a_broken_model_directory_is_answered_with_one_message(config, case):
    check(call("train", "--config", config), case, config)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("config", "case"), [(case, case) for case in BROKEN], indirect=["config"])
def test_the_same_on_the_command_line(config, case):
    command = [sys.executable, "-m", "shardes", "train", "--config", str(config)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    check(found, case, config)
