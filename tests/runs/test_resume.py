"""The same command goes on with a run, and refuses one that is not its own. Kills: test_soak.py."""

import json

import yaml

from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree


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


def steady_lines(path):
    """The lines of a file without what depends on the clock, or is not restored after a crash."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for volatile in ("seconds", "gather", "peak_memory_bytes", "weights_digest"):
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
    assert train(config, "rollout.gather=layer", "eval.every=1").returncode == 0


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tmp_path):
    config = write_config(tmp_path)
    assert train(config, "es.iterations=2").returncode == 0
    assert train(config, "es.iterations=4").returncode == 0
    assert train(config, "es.iterations=4", f"run.dir={tmp_path / 'whole'}").returncode == 0
    assert export(tmp_path / "run", tmp_path / "a") == export(tmp_path / "whole", tmp_path / "b")
    assert "es.iterations: got 3" in train(config, "es.iterations=3").stderr
    # A linear schedule depends on the number of iterations, so there it may not change.
    linear = ["es.alpha_schedule=linear", f"run.dir={tmp_path / 'linear'}"]
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
