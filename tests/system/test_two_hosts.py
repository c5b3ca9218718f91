"""Two machines: the cable between them is cut, one of them is lost, one comes back; no byte changes."""

import json
import sys

import pytest
import yaml

from tests.helpers.exports import fingerprint
from tests.helpers.hosts import why_not
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import run_command

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


def play(tmp_path, *, steps, num_nodes="2:2", iterations=60, **changes):
    """Trains on two hosts while the steps happen, and compares; returns what was printed."""
    model = tiny_model(tmp_path / "model", tied=True)
    settings = {"es__iterations": iterations, "eval__every": 0, "parallel__backend": "fsdp"} | changes
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / "run", **settings)))
    case = {"config": str(config), "num_nodes": num_nodes, "max_restarts": 3, "steps": steps}
    path = tmp_path / "case.json"
    path.write_text(json.dumps(case | {"journal": str(tmp_path / "run" / "journal.jsonl")}))
    script = [sys.executable, "-m", "tests.helpers.hosts", path]
    result = run_command(script, timeout_seconds=280)
    assert result.returncode == 0, result.stderr
    found = json.loads(path.with_name("case.json.found").read_text())
    lost = {number for what, number in steps if what == "kill"} - {n for what, n in steps if what == "start"}
    assert found["statuses"] == [-9 if number in lost else 0 for number in (0, 1)], found["output"]
    single = [f"run.dir={tmp_path / 'undisturbed'}", "parallel.backend=single"]
    assert call("train", "--config", config, *single).returncode == 0
    ends = []
    for name in ("run", "undisturbed"):
        assert call("shardes", "export", tmp_path / name, tmp_path / f"{name}-export").returncode == 0
        ends.append(fingerprint(tmp_path / f"{name}-export"))
    assert ends[0] == ends[1]
    return found["output"]


@pytest.mark.exhaustive
def test_a_short_cut_is_waited_for(tmp_path):
    output = play(tmp_path, steps=[["lines", 30], ["cut", 2]])
    assert output.count("fsdp on 2 rank(s)") == 1, output


def test_a_long_cut_ends_the_ranks_and_torchrun_starts_them_again(tmp_path):
    output = play(tmp_path, steps=[["lines", 30], ["cut", 15]], parallel__timeout_seconds=5)
    assert output.count("fsdp on 2 rank(s)") >= 2, output


def test_a_lost_host_is_done_without(tmp_path):
    output = play(tmp_path, steps=[["lines", 30], ["kill", 1]], num_nodes="1:2")
    assert output.count("fsdp on 2 rank(s)") == 1, output
    assert output.count("fsdp on 1 rank(s)") == 1, output


@pytest.mark.exhaustive
def test_a_host_that_comes_back_takes_part_again(tmp_path):
    steps = [["lines", 30], ["kill", 1], ["lines", 30], ["start", 1], ["lines", 30]]
    output = play(tmp_path, steps=steps, num_nodes="1:2", iterations=150)
    assert output.count("fsdp on 2 rank(s)") == 2, output
