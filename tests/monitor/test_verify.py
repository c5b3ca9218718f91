"""shardes verify and shardes journal: what is told of a run that is as it should be, and of another."""

import hashlib
import json
import shutil

import pytest
import yaml

from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree

ITERATIONS = 4


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished run with snapshots, its model, and exports after 2 and after all iterations."""
    root = tmp_path_factory.mktemp("original")
    model = tiny_model(root / "model", tied=False)
    keys = {"es__iterations": ITERATIONS, "run__snapshot_every": 2, "model__dtype": "bfloat16"}
    (root / "config.yaml").write_text(yaml.safe_dump(tree(root, model=model, run_dir=root / "run", **keys)))
    assert call("train", "--config", root / "config.yaml").returncode == 0
    for iteration in (2, ITERATIONS):
        result = call(
            "shardes", "export", root / "run", root / f"export{iteration}", "--iteration", iteration
        )
        assert result.returncode == 0, result.stderr
    return root


@pytest.fixture
def run(original, tmp_path):
    for name in ("run", "export2", f"export{ITERATIONS}"):
        shutil.copytree(original / name, tmp_path / name)
    return tmp_path / "run"


def verify(run, *arguments):
    return call("shardes", "verify", run, *arguments)


def records_of(run):
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


def forge(run, change):
    """Rewrites the journal with changed records and checksums that match, as a forger would."""
    link, lines = "", []
    for record in records_of(run):
        del record["checksum"]
        change(record)
        body = json.dumps(record, separators=(",", ":"), sort_keys=True)
        link = hashlib.blake2b(f"{link}{body}".encode(), digest_size=8).hexdigest()
        lines.append(json.dumps(record | {"checksum": link}, separators=(",", ":"), sort_keys=True))
    (run / "journal.jsonl").write_text("".join(line + "\n" for line in lines))


def test_a_run_is_as_it_says(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = verify(run)
    assert result.returncode == 0, result.stdout
    assert (
        f"{ITERATIONS} iterations replayed, {ITERATIONS + 1} digests compared, 2 snapshots read"
        in result.stdout
    )
    assert "all is as it should be" in result.stdout
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("iteration", [2, ITERATIONS])
def test_an_export_is_recognised_by_its_iteration(run, iteration):
    result = verify(run, "--export", run.parent / f"export{iteration}")
    assert result.returncode == 0, result.stdout
    assert f"export{iteration}: the weights after {iteration} iterations" in result.stdout


def test_a_changed_bit_of_an_export_is_found(run):
    path = next((run.parent / "export2").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    result = verify(run, "--export", run.parent / "export2")
    assert result.returncode == 1
    assert "export2 holds the weights of none of the iterations" in result.stdout


def test_an_export_that_is_cut_short_or_missing_is_told(run):
    path = next((run.parent / "export2").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    result = verify(run, "--export", run.parent / "export2")
    assert result.returncode == 1
    assert "cut short" in result.stdout
    missing = verify(run, "--export", run.parent / "nothing")
    assert missing.returncode == 2
    assert "--export" in missing.stderr


def test_an_export_of_another_dtype_is_told(run, original):
    result = verify(run, "--export", original / "model")
    assert result.returncode == 1
    assert "is stored as torch.float32; wanted torch.bfloat16" in result.stdout


def test_the_first_iteration_that_differs_is_named(run):
    def change(record):
        if record["type"] == "update" and record["iteration"] >= 1:
            record["coefficients"][0] = -record["coefficients"][0]

    forge(run, change)
    result = verify(run)
    assert result.returncode == 1
    journal, *_ = [line for line in result.stdout.splitlines() if line.startswith("DIFFERENT")]
    assert "the weights after 2 updates are the first that differ" in journal
    assert "the journal says" in journal
    # Nor is such a run exported, which would give weights that nobody trained.
    shutil.rmtree(run / "snapshots")
    refused = call("shardes", "export", run, run.parent / "x")
    assert refused.returncode == 2
    assert "shardes verify" in refused.stderr
    assert not (run.parent / "x").exists()


def test_metrics_of_other_weights_are_found(run):
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["weights_digest"] = "0" * 16
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = verify(run)
    assert result.returncode == 1
    assert "the weights after 3 updates are the first that differ" in result.stdout
    assert "metrics.jsonl says 0000000000000000" in result.stdout


def test_a_damaged_snapshot_is_named(run):
    path = run / "snapshots" / "iteration-00000002" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    (run / "snapshots" / "iteration-00000004" / "manifest.json").unlink()
    result = verify(run)
    assert result.returncode == 1
    assert "snapshot iteration-00000002: rank-00000.safetensors is damaged" in result.stdout
    assert "snapshot iteration-00000004: FileNotFoundError" in result.stdout


def test_a_damaged_journal_line_is_named(run):
    path = run / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"reward":0.', b'"reward":1.', 1))
    result = verify(run)
    assert result.returncode == 2
    assert "line 2 is damaged" in result.stderr or "line 3 is damaged" in result.stderr


def test_the_header_says_what_the_run_is(run, original):
    header = records_of(run)[0]
    assert header["config"]["es"]["iterations"] == ITERATIONS
    assert header["config"]["model"]["path"] == str(original / "model")
    table = header["parameters"]
    assert [param_id for param_id, *_ in table] == list(range(len(table)))
    assert ["lm_head.weight", [37, 66]] in [each[1:] for each in table]
    assert hashlib.sha256(json.dumps(table).encode()).hexdigest() == header["parameters_sha256"]
    assert len(header["base_headers_sha256"]) == 64
    assert header["base_weights_digest"] != records_of(run)[-2]["digest"]


def test_the_journal_is_printed_for_people(run):
    result = call("shardes", "journal", run)
    assert result.returncode == 0, result.stderr
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [
        line.split()
        for line in result.stdout.splitlines()
        if line.strip().endswith(metrics[1]["weights_digest"])
    ]
    (row,) = rows
    assert row[:2] == ["1", "4/4"]
    assert float(row[2]) == pytest.approx(metrics[1]["reward_mean"], rel=1e-4)
    assert f"{ITERATIONS} iterations are done" in result.stdout
    assert "gaussian" in result.stdout


def test_the_journal_is_printed_as_it_is(run):
    result = call("shardes", "journal", run, "--json")
    assert result.stdout == (run / "journal.jsonl").read_text()


def test_a_run_that_goes_on_may_be_looked_at(run):
    path = run / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    begun = next(i for i, r in enumerate(records) if (r.get("iteration"), r.get("member")) == (3, 1))
    path.write_bytes(b"".join(lines[: begun + 1]) + b'{"type":"mem')
    before = path.read_bytes()
    result = call("shardes", "journal", run)
    assert result.returncode == 0
    assert "3 iterations are done" in result.stdout
    assert "iteration 3 has begun: 2 of its members are known" in result.stdout
    assert "its last line is incomplete (12 bytes) and does not count" in result.stderr
    torn = call("shardes", "journal", run, "--json")
    assert torn.stdout.encode() == b"".join(lines[: begun + 1])
    assert path.read_bytes() == before
