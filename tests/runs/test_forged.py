"""Journals whose lines are whole but mean nothing, and files that are no files: one message, no waiting."""

import itertools
import json
import os
import signal

import pytest

from shardes.config.loading import load_run_config
from shardes.errors import UserError
from shardes.runs.directory import RunDirectory
from shardes.runs.journal import read_journal
from shardes.runs.records import check_form
from shardes.runs.snapshot import Snapshot, SnapshotError, _checksum, find_snapshots, snapshot_path
from shardes.utils.reading import parse_json, read_regular
from tests.helpers.inprocess import call
from tests.helpers.old_runs import install, reseal


@pytest.fixture(autouse=True)
def nobody_waits():
    """A command that waits for a pipe is ended."""

    def end(number, frame):
        raise TimeoutError("it waits")

    old = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture
def run_dir(tmp_path):
    return install("plain", tmp_path)


def forge(path, kind, change):
    """Changes the first record of a kind, and seals the journal anew; returns its line."""
    place = [record["type"] for record in map(json.loads, path.read_bytes().splitlines())].index(kind)
    lines = itertools.count()
    reseal(path, lambda record: change(record) if next(lines) == place else None)
    return place + 1


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


SCREENED = {"num_problems": 3, "num_left_out": 0, "informative": [1], "agreed": [[1.0, [0, 2]]]}

FORGED = {
    "text for a coefficient": ("update", {"coefficients": ["0.1"]}, "coefficients.0: "),
    "nothing for a coefficient": ("update", {"coefficients": [None]}, "coefficients.0: "),
    "truth for a coefficient": ("update", {"coefficients": [True]}, "coefficients.0: "),
    "a list for a coefficient": ("update", {"coefficients": [[0.1]]}, "coefficients.0: "),
    "a coefficient beyond float32": ("update", {"coefficients": [1e39]}, "coefficients.0: "),
    "a number for the coefficients": ("update", {"coefficients": 3}, "coefficients: "),
    "a great many coefficients": (
        "update",
        {"coefficients": [0.5] * 400_000},
        "it has 400000 coefficients",
    ),
    "one coefficient too many": ("update", {"coefficients": [0.5] * 5}, "it has 5 coefficients, but its ite"),
    "reused members of no iteration": (
        "update",
        {"reused": [0.5]},
        "it has 1 reused, but the last iteration 0 me",
    ),
    "text for a reused coefficient": ("update", {"reused": ["0.5"]}, "reused.0: "),
    "rewards of other members": ("update", {"shaped": [0.5]}, "it has 1 shaped rewards, but coefficients of"),
    "a ratio of text": ("update", {"instruments": {"reward_snr": "1"}}, "instruments.reward_snr: "),
    "no step": ("update", {"alpha": None}, "alpha: "),
    "no sigma": ("update", {"sigma": "x"}, "sigma: "),
    "a noise of no iteration": ("update", {"noise_iteration": -1}, "noise_iteration: "),
    "an iteration that is a fraction": ("update", {"iteration": 0.0}, "iteration: "),
    "an iteration that is true": ("update", {"iteration": False}, "iteration: "),
    "a huge iteration": ("update", {"iteration": 2**70}, "iteration: "),
    "a member without a number": ("member", {"member": "first"}, "member: "),
    "a reward of text": ("member", {"reward": "1"}, "reward: "),
    "tokens of text": ("member", {"num_tokens": "1"}, "num_tokens: "),
    "components that are none": ("member", {"components": [1]}, "components: "),
    "rows of text": ("update", {"screening": SCREENED | {"informative": ["1"]}}, "screening.informative.0: "),
    "what all earned of text": (
        "update",
        {"screening": SCREENED | {"agreed": [["1", [2]]]}},
        "screening.agreed.0.0: ",
    ),
    "half a line": ("member", {"by_least": [1.0]}, "by_least: "),
    "problems of text": ("member", {"by_problem": "1"}, "by_problem: "),
    "a version of text": ("member", {"version": "2"}, "version: "),
    "a digest that is none": ("weights", {"digest": "no"}, "digest: "),
    "a divergence of text": ("kl", {"kl": "0"}, "kl: "),
    "a probe of text": ("probe", {"pairs": "0"}, "pairs: "),
    "a held-out reward of text": ("evaluation", {"reward": "0"}, "reward: "),
    "settings that are none": ("header", {"settings": []}, "settings: "),
    "a configuration that is none": ("header", {"config": None}, "config: "),
    "a model that is none": ("header", {"config": {"model": 1}}, "config.model: "),
    "parameters that are none": ("header", {"parameters": [[0, "w"]]}, "parameters.0"),
    "a table of text": ("header", {"parameters": "w"}, "parameters: "),
    "a digest of the base that is none": ("header", {"base_weights_digest": 7}, "base_weights_digest: "),
    "deep settings": ("header", {"settings": {"es.alpha": deep(300)}}, "nested more than 100 deep"),
    "deep instruments": ("update", {"instruments": {"a": deep(600)}}, "nested more than 100 deep"),
    "an unknown type": ("kl", {"type": "os.system"}, "a record of the type 'os.system' is not known"),
    "a type that is none": ("kl", {"type": ["kl"]}, "a record of the type ['kl'] is not known"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_journal_is_refused_by_line_and_key(run_dir, name):
    kind, change, words = FORGED[name]
    line = forge(run_dir / "journal.jsonl", kind, lambda record: record.update(change))
    for command in (("journal", run_dir), ("verify", run_dir), ("export", run_dir, run_dir / "out")):
        result = call("shardes", *command)
        assert result.returncode == 2, result.stderr
        assert f"journal.jsonl line {line} is damaged ({words}" in result.stderr.replace(
            "its lists and objects are ", ""
        )
        assert len(result.stderr) < 1000


PART = {
    **{"indices": [0, 1], "values": [0.5, None], "has_failed": [False, True], "lengths": [3, 4]},
    **{"components": {"a": [1.0, None]}, "num_tokens": 7, "turn_tokens": []},
    **{"is_finite": True, "is_short": False},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"has_failed": [], "lengths": [], "components": {}}, None),  # of likelihoods
        ({"values": ["1", None]}, "part.values.0: "),
        ({"values": [0.5]}, "values has 1 items, but there are 2 indices"),
        ({"has_failed": [False]}, "has_failed has 1 items"),
        ({"components": {"a": []}}, "a has 0 items"),
        ({"indices": [-1, 0]}, "part.indices.0: "),
        ({"num_tokens": None}, "part.num_tokens: "),
    ],
)
def test_a_forged_portion_is_refused_by_key(change, words):
    record = {"type": "portion", "iteration": 0, "round": 0, "member": 1, "part": PART | change}
    if words is None:
        check_form(record)
    else:
        with pytest.raises(ValueError, match=words):
            check_form(record)


@pytest.mark.parametrize(
    "line", [b"[" * 500_000, b'{"a":' * 5000, b"[" * 5000 + b"]" * 5000, b"1e999999", b"9" * 9999]
)
def test_lines_that_json_gives_up_on_are_damaged(run_dir, line):
    path = run_dir / "journal.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    result = call("shardes", "verify", run_dir)
    assert (result.returncode, "journal.jsonl line 1 is damaged" in result.stderr) == (2, True)


def test_a_file_of_holes_does_not_fill_the_memory(run_dir):
    for name, words in (
        ("journal.jsonl", "a line of more than 268435456 bytes"),
        ("config.yaml", "more than"),
    ):
        os.truncate(run_dir / name, 2**42)
        result = call("shardes", "verify", run_dir)
        assert (result.returncode, words in result.stderr) == (2, True), result.stderr[:300]


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_directory(path):
    path.mkdir()


INSTEAD = {"named pipe": make_pipe, "device": make_device, "directory": make_directory}


def replace(path, kind):
    path.unlink(missing_ok=True)
    INSTEAD[kind](path)


@pytest.mark.parametrize("kind", INSTEAD)
def test_files_of_a_run_must_be_files(run_dir, kind, tmp_path):
    refused = {
        "config.yaml": [
            ("verify", run_dir),
            ("export", run_dir, tmp_path / "o"),
            ("evaluate", "--model", run_dir),
        ],
        "journal.jsonl": [("journal", run_dir), ("verify", run_dir), ("watch", run_dir, "--once")],
        "metrics.jsonl": [("plot", run_dir), ("watch", run_dir, "--once")],
        ".lock": [("train", "--config", run_dir / "config.yaml")],
    }
    for name, commands in refused.items():
        whole = (run_dir / name).read_bytes() if (run_dir / name).exists() else b""
        replace(run_dir / name, kind)
        for command in commands if name != ".lock" else ():
            result = call("shardes", *command)
            assert result.returncode == 2, (command, result.stderr)
            assert f"it is a {kind}; wanted: a regular file" in result.stderr, (command, result.stderr)
        (run_dir / name).rmdir() if kind == "directory" else (run_dir / name).unlink()
        (run_dir / name).write_bytes(whole)


@pytest.mark.parametrize("kind", INSTEAD)
def test_files_of_a_run_that_is_written_to_must_be_files(run_dir, kind):
    config = load_run_config(run_dir, {"run.dir": str(run_dir)})
    header = read_journal(run_dir / "journal.jsonl")[0].header
    for name in (".lock", "journal.jsonl", "metrics.jsonl", "samples.jsonl"):
        whole = (run_dir / name).read_bytes() if (run_dir / name).exists() else None
        replace(run_dir / name, kind)
        with pytest.raises(UserError, match=rf"{name}.* cannot be (read|written).*(it is|[Ii]s) a"):
            RunDirectory(config, header=header)
        (run_dir / name).rmdir() if kind == "directory" else (run_dir / name).unlink()
        if whole is not None:
            (run_dir / name).write_bytes(whole)
    RunDirectory(config, header=header).close()


@pytest.mark.parametrize("kind", INSTEAD)
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_files_of_a_snapshot_must_be_files(run_dir, kind, name):
    path = snapshot_path(run_dir, find_snapshots(run_dir)[0])
    Snapshot(path)
    replace(path / name, kind)
    with pytest.raises(SnapshotError, match=f"it is a {kind}"):
        Snapshot(path)


@pytest.mark.parametrize(
    "regions", [[[0, 1, 2**50, 1]], [[0, 0, 2**40, 0]], [[0, 2**80, 1, 1]], [[0, 1, -1, 1]], [[0, 1, 1]], []]
)
def test_a_snapshot_of_endless_regions_is_refused(run_dir, regions):
    path = snapshot_path(run_dir, find_snapshots(run_dir)[0])
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    entry = manifest["files"][0]["regions"]
    entry[next(iter(entry))] = regions
    (path / "manifest.json").write_text(json.dumps(manifest | {"checksum": _checksum(manifest)}))
    with pytest.raises(SnapshotError, match=r"does not hold the elements|not enough values"):
        Snapshot(path)


@pytest.mark.parametrize("kind", ["named pipe", "device"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_data_must_be_files(run_dir, kind, ending, tmp_path):
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    replace(tmp_path / f"data{ending}", kind)
    result = call(
        *("shardes", "evaluate", "--model", run_dir, f"task.data={tmp_path / 'data'}{ending}"),
        "parallel.backend=single",
    )
    assert result.returncode == 2
    found = kind.removeprefix("named ")
    assert f"data{ending} cannot be read (it is a {found}, and not a file)" in result.stderr


def test_a_data_set_on_disk_must_be_of_files(run_dir, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(tmp_path / "set"))
    replace(tmp_path / "set" / "state.json", "named pipe")
    result = call("shardes", "evaluate", "--model", run_dir, f"task.data={tmp_path / 'set'}")
    assert result.returncode == 2
    assert "it is a named pipe" in result.stderr


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, max_bytes=5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(path, max_bytes=4)
    assert parse_json("[" * 100 + "]" * 100)
    assert parse_json(b'{"a": [' * 50 + b"]}" * 50)
    for text in ("[" * 101 + "]" * 101, b'{"a": [' * 51 + b"]}" * 51, "[" * 10**6):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            parse_json(text)
    assert len(parse_json("[" + "[0]," * 10**5 + "0]")) == 10**5 + 1
