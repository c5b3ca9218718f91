"""What a run says while it goes on: its line, and TensorBoard and W&B, which get what metrics.jsonl has."""

import importlib.machinery
import json
import logging
import re
import struct

import pytest

from shardes.errors import UserError
from shardes.runs.reporting import Callbacks
from shardes.runs.trackers import TRACKERS, check_trackers, scalars
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from tests.helpers.inprocess import call
from tests.helpers.models import make_config, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


def train(tmp_path, model, *, callbacks=None, **changes):
    config = make_config(tmp_path, model=model, run_dir=tmp_path / "run", **changes)
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task), callbacks=callbacks).train()
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]


def cut_journal(run_dir, *, before):
    """The job died before a record of this type and iteration was written."""
    path = run_dir / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    keep = next(i for i, r in enumerate(records) if (r["type"], r.get("iteration")) == before)
    path.write_bytes(b"".join(lines[:keep]))


def test_a_line_an_iteration_tells_rewards_speed_and_the_time_left(tmp_path, model, caplog):
    with caplog.at_level(logging.INFO, logger="shardes.runs.reporting"):
        lines = train(tmp_path, model)
    told = [r.getMessage() for r in caplog.records if r.name == "shardes.runs.reporting"]
    assert len(told) == 4
    for i, text in enumerate(told[:3]):
        heldout = f"held-out {lines[i]['heldout_reward']:.4f}, " if i % 2 == 0 else ""
        wanted = rf"iteration {i}/3: reward {lines[i]['reward_mean']:.4f}, std {lines[i]['reward_std']:.4f}, "
        assert re.fullmatch(wanted + heldout + r"[\d.]+ \w+, \d+ tokens/s, [\d.]+ \w+ left", text), text
    assert told[2].endswith("0.0 s left")
    assert told[3] == (
        f"finished after 3 iterations: held-out {lines[3]['heldout_reward']:.4f}, {tmp_path / 'run'}"
    )


def test_callbacks_get_the_lines_and_the_evaluations(tmp_path, model):
    iterations, evaluations = [], []
    callbacks = Callbacks(on_iteration=[iterations.append], on_evaluation=[evaluations.append])
    lines = train(tmp_path, model, callbacks=callbacks)
    assert iterations == lines
    keys = ("iteration", "heldout_reward", "heldout_num_failures", "heldout_components")
    assert evaluations == [{k: line[k] for k in keys} for line in lines if "heldout_reward" in line]


def test_numbers_are_named_by_their_place():
    line = {"iteration": 3, "a": 1, "b": None, "c": "x", "s": {"io": 0.5, "t": {"u": 2.0}}}
    assert scalars(line) == {"a": 1, "s/io": 0.5, "s/t/u": 2.0}


def wanted_of(lines):
    return {(line["iteration"], name): value for line in lines for name, value in scalars(line).items()}


def test_tensorboard_has_the_lines_of_the_metrics_each_once_however_the_run_went(tmp_path, model):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def shown():
        events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        events.Reload()
        tags = events.Tags()["scalars"]
        return [(event.step, tag, event.value) for tag in tags for event in events.Scalars(tag)]

    def assert_shown(lines):
        found, wanted = shown(), wanted_of(lines)
        assert len(found) == len(wanted)
        assert {(s, t): v for s, t, v in found} == pytest.approx(wanted, rel=1e-6)

    train(tmp_path, model)  # without it, and then with: it hears of what was before
    assert_shown(train(tmp_path, model, log__report_to=["tensorboard"], es__iterations=4))
    # Died in iteration 3, whose weights and those of the end were told already; and then goes further.
    cut_journal(tmp_path / "run", before=("update", 3))
    lines = train(tmp_path, model, log__report_to=["tensorboard"], es__iterations=5)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert_shown(lines)


def records_of(path):
    """The records of one of W&B's offline files, a log in blocks like LevelDB's."""
    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield parts
            parts = b""


def history_of(directory):
    """The rows of history in W&B's offline files: (step, name) and value, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(directory.glob("offline-run-*/*.wandb")):
        for data in records_of(path):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows += [((row["_step"], k), v) for k, v in row.items() if not k.startswith("_")]
    return rows


@pytest.mark.slow
def test_wandb_has_the_lines_of_the_metrics_each_once_however_the_run_went(tmp_path, model, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = train(tmp_path, model, log__report_to=["wandb"])
    cut_journal(tmp_path / "run", before=("update", 2))
    again = train(tmp_path, model, log__report_to=["wandb"], es__iterations=4)
    wandb.teardown()  # ends the process that it has started
    rows = history_of(tmp_path / "run" / "wandb")
    # Steps that it had before the job died are not told again, and the end's keeps its place.
    wanted = wanted_of(first) | {k: v for k, v in wanted_of(again).items() if k[0] > 3}
    assert len(rows) == len(dict(rows)) == len(wanted)
    assert dict(rows) == pytest.approx(wanted)
    assert len({p.name.rpartition("-")[2] for p in (tmp_path / "run" / "wandb").glob("offline-run-*")}) == 1


def test_a_tracker_that_fails_is_a_warning_and_no_end(tmp_path, model, monkeypatch, caplog):
    class Broken:
        name = "wandb"

        def write(self, line):
            raise ConnectionError("no network")

        def close(self):
            raise AssertionError("it was given up")

    monkeypatch.setattr("shardes.runs.reporting.open_trackers", lambda *_, **__: [Broken()])
    lines = train(tmp_path, model, log__report_to=["wandb"])
    assert len(lines) == 4
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sum("wandb failed (ConnectionError: no network)" in text for text in warnings) == 1


def test_a_missing_package_is_told_with_its_extra(monkeypatch):
    for spec in (None, importlib.machinery.ModuleSpec("wandb", None)):  # absent, or a mere directory
        monkeypatch.setattr("importlib.util.find_spec", lambda _, spec=spec: spec)
        with pytest.raises(
            UserError, match=r"log\.report_to: wandb is not installed; pip install 'shardes\[wandb\]'"
        ):
            check_trackers(["wandb"])
    check_trackers([])


def test_a_run_asks_for_the_package_before_anything_is_loaded(tmp_path, model, monkeypatch):
    import yaml

    from tests.helpers.models import tree

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / "run")))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = call("train", "--config", path, "log.report_to=[tensorboard]")
    assert result.returncode == 2
    assert "pip install 'shardes[tensorboard]'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_what_wandb_refuses_is_told_with_the_remedy(tmp_path, model, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        UserError, match=r"log\.report_to: wandb cannot be used \(api_key.*WANDB_MODE=offline"
    ):
        train(tmp_path, model, log__report_to=["wandb"])


def test_a_tracker_is_one_entry_of_the_registry(tmp_path, model, monkeypatch):
    told = []

    class Listing:
        name = "listing"

        def __init__(self, run):
            told.append(len(run.lines))

        def write(self, line):
            told.append(line["iteration"])

        def close(self):
            told.append("closed")

    with pytest.raises(UserError, match=r"log\.report_to: got 'listing'; Known trackers: tensorboard, wandb"):
        train(tmp_path, model, log__report_to=["listing"])
    monkeypatch.setitem(TRACKERS, "listing", Listing)
    train(tmp_path, model, log__report_to=["listing"])
    assert told == [0, 0, 1, 2, 3, "closed"]
