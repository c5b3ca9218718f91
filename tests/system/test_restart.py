"""Going on somewhere else: other numbers of ranks and other backends take up a run where it was left."""

import json

import pytest

from shardes.runs.snapshot import find_snapshots, snapshot_path
from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree
from tests.helpers.runs import run_cases

EVEN = {"num_heads": 4, "num_kv_heads": 2}  # so that two ranks of tensor parallelism share the heads


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("restart")
    tiny_model(root / "model", tied=True, **EVEN)
    return root


def stage(root, run_dir, backend, iterations, **changes):
    keys = {"parallel__backend": backend, "es__iterations": iterations, "run__snapshot_every": 1}
    return tree(root, model=root / "model", run_dir=run_dir, **(keys | {"eval__every": 3} | changes))


def export(run_dir, out):
    result = call("shardes", "export", run_dir, out)
    assert result.returncode == 0, result.stderr
    return fingerprint(out)


def parts_of(run_dir, iteration):
    manifest = json.loads((snapshot_path(run_dir, iteration) / "manifest.json").read_text())
    return [entry["name"] for entry in manifest["files"]]


def assert_as_it_should_be(run_dir, export_dir, iterations):
    result = call("shardes", "verify", run_dir, "--export", export_dir)
    assert result.returncode == 0, result.stdout
    assert f"{iterations} iterations replayed, {iterations + 1} digests compared" in result.stdout
    assert f"the weights after {iterations} iterations" in result.stdout


@pytest.mark.slow
def test_every_backend_goes_on_with_what_another_began(root, tmp_path):
    pytest.importorskip("deepspeed")
    run_dir = tmp_path / "run"
    # Each takes up the snapshot of the one before.
    one, two = stage(root, run_dir, "single", 1), stage(root, tmp_path / "undisturbed", "single", 4)
    run_cases(tmp_path, "one", [one, two], 1)
    backends = ["zero3", "fsdp", "single", "tensor_parallel"]
    trees = [stage(root, run_dir, backend, 2 + i) for i, backend in enumerate(backends)]
    trees[2] |= {"run": trees[2]["run"] | {"snapshot_every": 0}}
    prints = run_cases(tmp_path, "two", trees, 2)
    assert find_snapshots(run_dir) == [5, 3]
    assert parts_of(run_dir, 5) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    # Weights are those of one undisturbed process, as far as sums were in its order.
    whole = [export(tmp_path / "undisturbed", tmp_path / "whole")]
    for iteration in (2, 3):
        out = tmp_path / f"whole{iteration}"
        result = call("shardes", "export", tmp_path / "undisturbed", out, "--iteration", iteration)
        assert result.returncode == 0, result.stderr
        whole.append(fingerprint(out))
    assert prints[:3] == [whole[1], whole[2], whole[0]]
    # And under tensor parallelism they are what the journal gives, on one process.
    assert export(run_dir, tmp_path / "replayed") == prints[3]
    assert_as_it_should_be(run_dir, tmp_path / "two-export3", 5)
    # One that could not be read would have been renamed.
    assert len(list((run_dir / "snapshots").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_numbers_of_ranks_come_and_go(root, tmp_path):
    pytest.importorskip("deepspeed")
    run_dir, done = tmp_path / "run", 0
    for world_size, backend in [
        (1, "single"),
        (2, "zero3"),
        (4, "fsdp"),
        (3, "zero3"),
        (2, "tensor_parallel"),
    ]:
        done += 2
        (last,) = run_cases(tmp_path, f"stage{done}", [stage(root, run_dir, backend, done)], world_size)
        assert parts_of(run_dir, done) == [f"rank-{rank:05d}.safetensors" for rank in range(world_size)]
        assert export(run_dir, tmp_path / f"replayed{done}") == last
    run_cases(tmp_path, "whole", [stage(root, tmp_path / "undisturbed", "single", 8)], 1)
    assert fingerprint(tmp_path / "stage8-export0") == fingerprint(tmp_path / "whole-export0")
    assert_as_it_should_be(run_dir, tmp_path / "stage10-export0", 10)
    # Without snapshots it is the same, only that more is replayed.
    for path in (run_dir / "snapshots").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert export(run_dir, tmp_path / "journal-alone") == fingerprint(tmp_path / "stage10-export0")
