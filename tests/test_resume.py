"""A job may die at any moment: the same command goes on, and ends with the same bytes."""

import json
import random
import signal
import sys
import time

import pytest
import yaml

from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import Ranks, run_command

NUM_KILLS = 10


def write_config(tmp_path, **changes):
    path = tmp_path / "config.yaml"
    model = tmp_path / "model"
    if not model.exists():
        tiny_model(model, tied=True)
    path.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / "run", **changes)))
    return path


def train(config, *overrides):
    return call("train", "--config", config, *overrides)


def export(run_dir, out):
    result = call("shardes", "export", run_dir, out)
    assert result.returncode == 0, result.stderr
    return fingerprint(out)


def wait_for_lines(path, count, ranks):
    """Waits until the journal has ``count`` lines, or the job has ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(process.poll() is None for process in ranks.processes):
        if count == 0 or (path.exists() and path.read_bytes().count(b"\n") >= count):
            return
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_kills_of_any_rank_at_random_moments_change_no_byte(tmp_path):
    pytest.importorskip("deepspeed")
    # No launcher is here to end the survivor of a kill: it is the time limit of collectives that does.
    config = write_config(
        tmp_path, es__iterations=30, parallel__backend="zero3", parallel__timeout_seconds=12, eval__every=7
    )
    undisturbed = train(config, f"run.dir={tmp_path / 'undisturbed'}", "parallel.backend=single")
    assert undisturbed.returncode == 0, undisturbed.stderr
    wanted = export(tmp_path / "undisturbed", tmp_path / "wanted")

    journal = tmp_path / "run" / "journal.jsonl"
    chance = random.Random(1)
    landed = []
    for kill in range(NUM_KILLS):
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        # Some attempts have another number of ranks: replaying does not care.
        with Ranks(
            ["launch/train.py", "--config", config],
            world_size=3 if kill % 4 == 3 else 2,
            log_dir=tmp_path / f"logs{kill}",
        ) as ranks:
            # The third kill comes while the processes start, the others while members are evaluated.
            wait_for_lines(journal, 0 if kill == 2 else lines + chance.randint(1, 16), ranks)
            time.sleep(chance.random() * (3 if kill == 2 else 0.05))
            victim = chance.choice(ranks.processes)
            assert victim.poll() is None, ranks.output()
            victim.kill()
            statuses = ranks.wait(60)
            assert 0 not in statuses, "the survivor must not go on, nor end as if all were well"
            assert -signal.SIGKILL in statuses
        landed.append(journal.read_bytes().count(b"\n"))
    assert len(set(landed)) > NUM_KILLS / 2, "the kills were meant to land at different moments"

    with Ranks(["launch/train.py", "--config", config], world_size=2, log_dir=tmp_path / "logs") as ranks:
        assert ranks.wait(120) == [0, 0], ranks.output()
    assert export(tmp_path / "run", tmp_path / "export") == wanted
    sharded = [sys.executable, "-m", "shardes", "export", tmp_path / "run", tmp_path / "sharded"]
    assert run_command([*sharded, "--backend", "zero3"]).returncode == 0
    assert fingerprint(tmp_path / "sharded") == wanted
    for name in ("metrics.jsonl", "samples.jsonl"):
        one, other = (steady_lines(tmp_path / run / name) for run in ("run", "undisturbed"))
        assert one == other, name


def steady_lines(path):
    """The lines of a file without what depends on the clock, or is not restored after a crash."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for volatile in ("seconds", "rollout_mode", "peak_memory_bytes", "weights_digest"):
            line.pop(volatile, None)
    return lines


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = write_config(tmp_path)
    assert train(config).returncode == 0
    journal = (tmp_path / "run" / "journal.jsonl").read_bytes()
    metrics = steady_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["iteration"] for line in metrics] == [0, 1, 2, 3]
    again = train(config)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == journal
    assert steady_lines(tmp_path / "run" / "metrics.jsonl") == metrics


def test_another_configuration_in_the_same_directory_is_refused_and_loses_nothing(tmp_path):
    config = write_config(tmp_path)
    assert train(config).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    result = train(config, "es.sigma=0.07", "es.seed=4")
    assert result.returncode == 2
    assert "es.sigma: the run has 0.05, this configuration 0.07" in result.stderr
    assert "es.seed: the run has 0, this configuration 4" in result.stderr
    assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in before} == before
    never = train(config, "run.resume=never")
    assert never.returncode == 2
    assert "run.resume" in never.stderr
    # What does not change the result may change.
    assert train(config, "rollout.mode=stream", "eval.every=1").returncode == 0


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tmp_path):
    config = write_config(tmp_path)
    assert train(config, "es.iterations=2").returncode == 0
    assert train(config, "es.iterations=4").returncode == 0
    assert train(config, "es.iterations=4", f"run.dir={tmp_path / 'whole'}").returncode == 0
    assert export(tmp_path / "run", tmp_path / "a") == export(tmp_path / "whole", tmp_path / "b")
    assert "es.iterations: got 3" in train(config, "es.iterations=3").stderr
    # A linear schedule depends on the number of iterations, so there it may not change.
    linear = ["es.schedule=linear", f"run.dir={tmp_path / 'linear'}"]
    assert train(config, *linear, "es.iterations=2").returncode == 0
    refused = train(config, *linear, "es.iterations=4")
    assert refused.returncode == 2
    assert "es.iterations: the run has 2" in refused.stderr


def test_another_base_model_is_refused(tmp_path):
    config = write_config(tmp_path)
    assert train(config).returncode == 0
    tiny_model(tmp_path / "model", tied=True, seed=1)
    for result in (train(config), call("shardes", "export", tmp_path / "run", tmp_path / "x")):
        assert result.returncode == 2
        assert "base_weights_digest" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


def test_an_export_needs_neither_the_data_nor_the_old_place_of_the_model(tmp_path, monkeypatch):
    config = write_config(tmp_path)
    assert train(config).returncode == 0
    wanted = export(tmp_path / "run", tmp_path / "wanted")
    (tmp_path / "problems.jsonl").unlink()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert call("shardes", "export", "run", "here").returncode == 2
    result = call("shardes", "export", "run", "here", "--base", "elsewhere")
    assert result.returncode == 0, result.stderr
    assert fingerprint(tmp_path / "here") == wanted
