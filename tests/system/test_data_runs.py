"""Runs on data of other forms: mistakes end them before a model is loaded, a resume looks at the rows."""

import csv
import json

import pytest
import yaml

from tests.helpers.inprocess import call
from tests.helpers.models import QUICKSTART, tiny_model, tree
from tests.helpers.runs import steady_metrics

ROWS = [{"question": f"{i}" + "+7" * (i % 4) + "=", "hint": f"h{i}", "n": i} for i in range(12)]
SETTINGS = {
    "task__columns": {"q": "question"},
    "task__template": "{{ q }}",
    "task__heldout_fraction": 0.25,
    "task__heldout_data": None,
    "task__sampling": "epochs",
    "task__batch_size": 4,
    "task__reward_workers": 0,
    "es__iterations": 5,
    "eval__every": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(tmp_path, model, run, data, **changes):
    config = tmp_path / f"{run}.yaml"
    settings = tree(tmp_path, model=model, run_dir=tmp_path / run, task__data=data, **{**SETTINGS, **changes})
    config.write_text(yaml.safe_dump(settings))
    return call("train", "--config", config)


def test_a_run_goes_on_with_the_same_rows_from_another_file_and_with_no_others(tmp_path, model):
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert train(tmp_path, model, "whole", data).returncode == 0
    assert train(tmp_path, model, "parts", data, es__iterations=2).returncode == 0
    with (tmp_path / "moved.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)

    others = jsonl(tmp_path / "others.jsonl", [row | {"hint": "x"} for row in ROWS])
    for data, changes, key in [
        (others, {}, "task.data sha256"),
        (tmp_path / "moved.csv", {"task__heldout_fraction": 0.5}, "task.data sha256"),
        (tmp_path / "moved.csv", {"task__sampling": "random"}, "task.sampling"),
    ]:
        before = (tmp_path / "parts" / "journal.jsonl").read_bytes()
        result = train(tmp_path, model, "parts", data, **changes)
        assert result.returncode == 2
        assert f"  {key}: the run has " in result.stderr
        assert (tmp_path / "parts" / "journal.jsonl").read_bytes() == before

    result = train(tmp_path, model, "parts", tmp_path / "moved.csv")
    assert result.returncode == 0, result.stderr
    whole, parts = steady_metrics(tmp_path / "whole"), steady_metrics(tmp_path / "parts")
    assert [line["weights_digest"] for line in parts[-4:]] == [line["weights_digest"] for line in whole[-4:]]
    assert parts[-1]["heldout_reward"] == whole[-1]["heldout_reward"]
    assert len({line["weights_digest"] for line in whole}) == 5


MISTAKES = {
    "empty": ("", {}, "has no rows; give at least one problem"),
    "missing column": ('{"question": "a"}\n{"text": "b"}', {}, "line 2: column 'question' is missing"),
    "no text": (
        '{"question": 3}',
        {"task__template": None, "task__columns": {"prompt": "question"}},
        "line 1: prompt is 3",
    ),
    "template": ('{"question": "a"}', {"task__template": "{{ text }}"}, "line 1: task.template fails (Undef"),
    "ids": ('{"question": "a", "id": 7}\n{"question": "b", "id": 7}', {}, "line 2: column 'id' is 7, as in"),
    "no object": ('{"question": "a"}\n"b"', {}, "line 2: got 'b'; every line must be one JSON object"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_data_is_one_message_with_its_file_and_place(tmp_path, monkeypatch, mistake):
    content, changes, words = MISTAKES[mistake]
    data = tmp_path / "rows.jsonl"
    data.write_text(content)
    # The model is not looked at before the data are known to be good.
    monkeypatch.setattr("shardes.session.open_session", lambda *_: pytest.fail("a session was opened"))
    result = train(tmp_path, QUICKSTART / "model", "run", data, **changes)
    assert result.returncode == 2
    (message,) = result.stderr.splitlines()
    assert message.startswith(f"Error: task.data: {data}")
    assert words in message
    assert not (tmp_path / "run").exists()
