"""A run of Adam that began before version 2 of the updates goes on by the rule that it began with."""

import hashlib
import json

import pytest
import torch

from shardes.runs.journal import History
from tests.helpers.inprocess import call
from tests.helpers.old_runs import digests_of, install, records_of, reseal
from tests.helpers.ranks import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "3fa0333" / "adam"
WARNING = "begun with version 1 of the updates"


def has_the_same_roots():
    numbers = torch.arange(0x3F800000, 0x3F810000, dtype=torch.int32).view(torch.float32)
    found = hashlib.sha256(numbers.sqrt().numpy().tobytes()).hexdigest()
    return found == json.loads((FIXTURE / "expected.json").read_text())["square_roots"]


needs_its_roots = pytest.mark.skipif(
    not has_the_same_roots(), reason="torch computes other square roots on this processor"
)


@pytest.fixture
def run_dir(tmp_path):
    return install(FIXTURE.name, tmp_path, root=FIXTURE.parent)


def train(run_dir, *overrides):
    return call("train", "--config", FIXTURE / "user.yaml", f"run.dir={run_dir}", *overrides)


@needs_its_roots
def test_it_is_verified_and_goes_on(run_dir):
    result = call("shardes", "verify", run_dir)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 digests compared" in result.stdout
    assert WARNING in result.stderr
    before = (run_dir / "journal.jsonl").read_bytes()
    result = train(run_dir, "es.iterations=4")
    assert result.returncode == 0, result.stderr
    assert WARNING in result.stderr
    assert (run_dir / "journal.jsonl").read_bytes().startswith(before)
    result = call("shardes", "verify", run_dir)
    assert (result.returncode, "5 digests compared" in result.stdout) == (0, True), result.stdout


def test_the_rule_of_today_gives_other_weights(run_dir, monkeypatch):
    monkeypatch.setattr(History, "update_version", 2)
    header = json.loads((FIXTURE / "run" / "journal.jsonl").read_text().splitlines()[0])
    assert "update_version" not in header
    result = train(run_dir, "es.iterations=4")
    assert result.returncode == 2, result.stderr
    assert "the journal says" in result.stderr


def test_a_run_that_begins_now_has_the_rule_of_today(tmp_path):
    result = train(tmp_path / "new")
    assert result.returncode == 0, result.stderr
    assert WARNING not in result.stderr
    journal = tmp_path / "new" / "journal.jsonl"
    assert [header["update_version"] for header in records_of(journal, "header")] == [2]
    result = call("shardes", "verify", tmp_path / "new")
    assert (result.returncode, WARNING in result.stderr) == (0, False), result.stdout + result.stderr
    if has_the_same_roots():  # and so the same rewards
        assert digests_of(journal) != digests_of(FIXTURE / "run" / "journal.jsonl")


@pytest.mark.parametrize("version", [0, 4, "2", None, [1]])
def test_a_version_that_is_not_known_is_refused(run_dir, version):
    def change(record):
        if record["type"] == "header":
            record["update_version"] = version

    reseal(run_dir / "journal.jsonl", change)
    for result in (train(run_dir), call("shardes", "verify", run_dir)):
        assert result.returncode == 2, result.stdout + result.stderr
        assert f"version {version} of the updates" in result.stderr
        assert "Traceback" not in result.stderr
