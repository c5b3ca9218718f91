"""The files of snapshots: read by any layout, and refused when damaged."""

import json
import shutil

import pytest
import torch

from shardes.models import checkpoint as checkpoint_module
from shardes.noise import Region
from shardes.runs import snapshot as snapshots
from shardes.runs.snapshot import Snapshot, SnapshotError, find_snapshots, write_manifest
from tests.helpers.snapshot_files import (
    LAYOUTS,
    damage,
    manifest_of,
    ranks_of,
    whole_values,
    write_snapshot,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("wrote", "size"), [("flat", 1), ("flat", 2), ("flat", 4), ("rows", 3), ("columns", 2)]
)
def test_any_layout_reads_what_any_other_wrote(tmp_path, wrote, size, dtype):
    whole = whole_values(dtype)
    snapshot = Snapshot(write_snapshot(tmp_path / "s", ranks_of(wrote, size), whole))
    for kind in LAYOUTS:
        for shards in ranks_of(kind, 1) + ranks_of(kind, 3):
            for shard in shards:
                for span in shard.spans:
                    out = torch.empty(span.num_elements, dtype=dtype)
                    snapshot.read(shard.name, region=shard.region(span), out=out)
                    assert torch.equal(out, span.inside(whole[shard.name]).reshape(-1)), (kind, shard, span)
    assert snapshot.damaged_files() == []


@pytest.mark.parametrize("wrote", ["stacked", "copies", "grid"])
def test_every_way_to_spread_a_parameter_is_written_whole(tmp_path, wrote):
    whole = whole_values(torch.float32)
    snapshot = Snapshot(write_snapshot(tmp_path / "s", ranks_of(wrote, 2), whole))
    for shard in ranks_of("flat", 1)[0]:
        if shard.num_elements:
            out = torch.empty(shard.num_elements)
            snapshot.read(shard.name, region=shard.region(shard.spans[0]), out=out)
            assert torch.equal(out, whole[shard.name])
    # Copies are written once.
    stored = sum(entry["num_bytes"] for entry in snapshot._files)
    assert 4 * sum(map(len, whole.values())) <= stored < 4 * sum(map(len, whole.values())) + 2000 * 4


def test_only_the_bytes_of_a_ranks_own_elements_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_GAP_BYTES", 0)  # otherwise what is between short rows as well
    snapshot = Snapshot(write_snapshot(tmp_path / "s", ranks_of("flat", 2), whole_values(torch.float32)))
    for shard in ranks_of("columns", 3)[1]:
        for span in shard.spans:
            before = snapshot.bytes_read
            snapshot.read(shard.name, region=shard.region(span), out=torch.empty(span.num_elements))
            assert snapshot.bytes_read - before == 4 * span.num_elements


def test_elements_that_no_file_holds_are_missed(tmp_path):
    ranks = ranks_of("flat", 3)
    snapshot = Snapshot(write_snapshot(tmp_path / "s", [ranks[0], ranks[2]], whole_values(torch.float32)))
    with pytest.raises(SnapshotError, match="no file holds element 24"):
        snapshot.read("a.weight", region=Region(0, 70, 0, 70), out=torch.empty(70))


def test_a_master_passes_through_the_file_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "CHUNK_ELEMENTS", 3)
    whole = whole_values(torch.float32)
    pieces = write_snapshot(tmp_path / "pieces", ranks_of("columns", 2), whole)
    monkeypatch.undo()
    one = write_snapshot(tmp_path / "one", ranks_of("columns", 2), whole)
    for path in one.iterdir():
        assert (pieces / path.name).read_bytes() == path.read_bytes()


DAMAGES = ["missing", "a directory", "empty", "truncated", "halved", "longer", "zeroed", "header"]


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_found_without_reading_all(tmp_path, name, kind):
    directory = write_snapshot(tmp_path / "s", ranks_of("flat", 2), whole_values(torch.float32))
    damage(directory / name, kind)
    with pytest.raises(SnapshotError):
        Snapshot(directory)


def test_a_flipped_bit_is_found_where_all_is_read(tmp_path):
    directory = write_snapshot(tmp_path / "s", ranks_of("flat", 2), whole_values(torch.float32))
    damage(directory / "rank-00001.safetensors", "flipped")
    assert Snapshot(directory).damaged_files() == ["rank-00001.safetensors"]
    assert Snapshot(directory).damaged_files(part=0, num_parts=2) == []
    assert Snapshot(directory).damaged_files(part=1, num_parts=2) == ["rank-00001.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m | {"iteration": 4},
        lambda m: m | {"files": m["files"][:1]},
        lambda m: {key: value for key, value in m.items() if key != "checksum"},
        lambda m: [m],
    ],
)
def test_a_changed_manifest_is_found(tmp_path, change):
    directory = write_snapshot(tmp_path / "s", ranks_of("flat", 2), whole_values(torch.float32))
    (directory / "manifest.json").write_text(json.dumps(change(manifest_of(directory))))
    with pytest.raises(SnapshotError):
        Snapshot(directory)


def test_a_manifest_cannot_lead_outside_of_its_directory(tmp_path):
    directory = write_snapshot(tmp_path / "s", ranks_of("flat", 1), whole_values(torch.float32))
    shutil.copy(directory / "rank-00000.safetensors", tmp_path / "outside")
    files = manifest_of(directory)["files"]
    for name in ("../outside", str(tmp_path / "outside")):
        moved = [files[0] | {"name": name}]
        write_manifest(directory, iteration=3, digest="0f", states_digest="0", files=moved)
        with pytest.raises(SnapshotError, match="outside"):
            Snapshot(directory)


def test_what_is_not_complete_is_no_snapshot(tmp_path):
    for name in ("iteration-00000004", "iteration-00000012", "iteration-100000000"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
    for name in ("iteration-00000005.incomplete", "iteration-00000006.damaged", "x", "iteration-7"):
        (tmp_path / "snapshots" / name).mkdir()
    assert find_snapshots(tmp_path) == [100_000_000, 12, 4]
    assert find_snapshots(tmp_path / "nothing") == []
