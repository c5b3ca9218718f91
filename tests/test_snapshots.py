"""Snapshots: read by any layout, passed over when damaged, and never a bit that the journal does not give."""

import json
import logging
import shutil
import threading

import pytest
import torch

from shardes.backends.layout import Layout, Split, flat_layout
from shardes.checkpoint import Checkpoint
from shardes.distributed import Group, Mesh
from shardes.errors import UserError
from shardes.es.update import Update
from shardes.noise import Region
from shardes.runs import snapshotting
from shardes.runs.journal import read_journal
from shardes.runs.restore import restore_weights
from shardes.runs.snapshots import (
    Snapshot,
    SnapshotError,
    find_snapshots,
    snapshot_path,
    write_manifest,
    write_part,
)
from shardes.session import open_session
from shardes.shards import Shard
from shardes.tasks.loading import load_task
from shardes.trainer import Trainer
from tests.helpers.models import make_config, tiny_model

SHAPES = {"a.weight": (7, 10), "b.bias": (13,), "c.weight": (4, 6), "d.empty": (0,), "e.scalar": ()}
# How a parameter is spread, by its shape and the number of ranks.
LAYOUTS = {
    "flat": lambda shape, size: flat_layout(_size(shape), world_size=size),
    "rows": lambda shape, size: Layout(shape, (size,), (Split(0),)),
    "columns": lambda shape, size: Layout(shape, (size,), (Split(len(shape) - 1 if shape else 0),)),
    "stacked": lambda shape, size: Layout(shape, (size,), (Split(0, num_pieces=2),)),
    "copies": lambda shape, size: Layout(shape, (size,), (None,)),
    "grid": lambda shape, size: Layout(shape, (size, 2), (Split(len(shape) - 1 if shape else 0), Split(0))),
}


def _size(shape):
    return torch.Size(shape).numel()


def ranks_of(kind, size):
    """Each rank's shards of every parameter."""
    places = (
        [(i, j) for i in range(size) for j in range(2)] if kind == "grid" else [(i,) for i in range(size)]
    )
    return [
        [
            Shard(
                name,
                param_id,
                shape,
                torch.empty(0),
                LAYOUTS[kind](shape, size).runs(place) if _size(shape) else (),
                is_copy=kind == "copies" and place != (0,),
            )
            for param_id, (name, shape) in enumerate(SHAPES.items())
        ]
        for place in places
    ]


def whole_values(dtype):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(_size(shape), generator=generator).to(dtype) for name, shape in SHAPES.items()}


def local_values(shard, whole):
    """What a rank holds of a parameter, run after run."""
    return torch.cat([run.inside(whole[shard.name]).reshape(-1) for run in shard.runs])


def write_snapshot(directory, ranks, whole, *, iteration=3, digest="0f"):
    directory.mkdir(parents=True)
    files = []
    for rank, shards in enumerate(ranks):
        masters = [(s.name, s, local_values(s, whole)) for s in shards if s.runs and not s.is_copy]
        files.append(write_part(directory / f"rank-{rank:05d}.safetensors", masters))
    write_manifest(directory, iteration=iteration, digest=digest, states_digest="0", files=files)
    return directory


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
                for run in shard.runs:
                    out = torch.empty(run.num_elements, dtype=dtype)
                    snapshot.read(shard.name, region=shard.region(run), out=out)
                    assert torch.equal(out, run.inside(whole[shard.name]).reshape(-1)), (kind, shard, run)
    assert snapshot.damaged_files() == []


@pytest.mark.parametrize("wrote", ["stacked", "copies", "grid"])
def test_every_way_to_spread_a_parameter_is_written_whole(tmp_path, wrote):
    whole = whole_values(torch.float32)
    snapshot = Snapshot(write_snapshot(tmp_path / "s", ranks_of(wrote, 2), whole))
    for shard in ranks_of("flat", 1)[0]:
        if shard.num_elements:
            out = torch.empty(shard.num_elements)
            snapshot.read(shard.name, region=shard.region(shard.runs[0]), out=out)
            assert torch.equal(out, whole[shard.name])
    # Copies are written once.
    stored = sum(entry["num_bytes"] for entry in snapshot._files)
    assert 4 * sum(map(len, whole.values())) <= stored < 4 * sum(map(len, whole.values())) + 2000 * 4


def test_only_the_bytes_of_a_ranks_own_elements_are_read(tmp_path):
    snapshot = Snapshot(write_snapshot(tmp_path / "s", ranks_of("flat", 2), whole_values(torch.float32)))
    for shard in ranks_of("columns", 3)[1]:
        for run in shard.runs:
            before = snapshot.bytes_read
            snapshot.read(shard.name, region=shard.region(run), out=torch.empty(run.num_elements))
            assert snapshot.bytes_read - before == 4 * run.num_elements


def test_elements_that_no_file_holds_are_missed(tmp_path):
    ranks = ranks_of("flat", 3)
    snapshot = Snapshot(write_snapshot(tmp_path / "s", [ranks[0], ranks[2]], whole_values(torch.float32)))
    with pytest.raises(SnapshotError, match="no file holds element 24"):
        snapshot.read("a.weight", region=Region(0, 70, 0, 70), out=torch.empty(70))


def manifest_of(directory):
    return json.loads((directory / "manifest.json").read_text())


def damage(path, kind):
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "a directory":
        path.unlink()
        path.mkdir()
    else:
        changed = {
            "empty": b"",
            "truncated": data[:-2],
            "halved": data[: len(data) // 2],
            "longer": data + b"{",
            "zeroed": bytes(len(data)),
            "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            "header": data[:20] + b"#" + data[21:],
        }[kind]
        assert changed != data
        path.write_bytes(changed)


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


# A run in one process.

ITERATIONS, EVERY = 5, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


def configured(root, model, run_dir, **changes):
    keys = {"es__iterations": ITERATIONS, "run__snapshot_every": EVERY, "eval__every": 0} | changes
    return make_config(root, model=model, run_dir=run_dir, **keys)


def train(config):
    with open_session(config) as session:
        Trainer(session, load_task(config.task)).train()
        return session.digest()


@pytest.fixture(scope="module", params=["float32", "bfloat16 master, frozen embedding"])
def original(request, model, tmp_path_factory):
    """A finished run: its root, and the changes to its configuration."""
    root = tmp_path_factory.mktemp("run")
    changes = {}
    if request.param != "float32":
        changes = {
            "model__dtype": "bfloat16",
            "weights__master": "model",
            "es__trainable": [".*", "!.*embed.*"],
        }
    train(configured(root, model, root / "run", **changes))
    return root, changes


@pytest.fixture
def run(original, model, tmp_path):
    """A copy of the run directory, a session with the base weights, and the journal."""
    root, changes = original
    shutil.copytree(root / "run", tmp_path / "run")
    with open_session(configured(root, model, tmp_path / "run", **changes)) as session:
        yield tmp_path / "run", session, read_journal(tmp_path / "run" / "journal.jsonl")[0]


def restore(run, iteration=ITERATIONS, **arguments):
    run_dir, session, history = run
    restore_weights(
        session, history.updates[:iteration], digests=history.digests, run_dir=run_dir, **arguments
    )
    return session.digest()


def test_a_run_keeps_the_newest_snapshots_in_the_masters_dtype(run):
    run_dir, session, _ = run
    assert find_snapshots(run_dir) == [4, 2]
    assert sorted(path.name for path in (run_dir / "snapshots").iterdir()) == [
        "iteration-00000002",
        "iteration-00000004",
    ]
    manifest = manifest_of(snapshot_path(run_dir, 4))
    assert set(manifest["files"][0]["regions"]) == {shard.name for shard in session.weights.trained}
    itemsize = 4 if session.config.weights.master == "float32" else 2
    num_elements = sum(shard.num_elements for shard in session.weights.trained)
    assert 0 < manifest["files"][0]["num_bytes"] - itemsize * num_elements < 8000


@pytest.mark.parametrize("iteration", range(ITERATIONS + 1))
def test_a_snapshot_and_the_rest_of_the_journal_are_the_journal(run, caplog, iteration):
    run_dir, session, history = run
    with caplog.at_level(logging.INFO):
        digest = restore(run, iteration)
    assert digest == ([session.identity["base_weights_digest"], *history.digests.values()])[iteration]
    if iteration >= 2:
        nearest = iteration // 2 * 2
        assert (
            f"replaying {iteration - nearest} iterations over the snapshot of iteration {nearest}"
            in caplog.text
        )
    # The model computes with the restored weights, not with the base's.
    centre = {name: p.detach().clone() for name, p in session.backend.gathered().named_parameters()}
    shutil.rmtree(run_dir / "snapshots")
    session.weights.load(Checkpoint(session.config.model.path))
    assert restore(run, iteration) == digest
    for name, parameter in session.backend.gathered().named_parameters():
        assert torch.equal(parameter, centre[name]), name


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "truncated", "zeroed", "flipped"])
def test_a_damaged_snapshot_is_passed_over_with_a_warning(run, caplog, name, kind):
    run_dir, _, history = run
    damage(snapshot_path(run_dir, 4) / name, kind)
    with caplog.at_level(logging.INFO):
        assert restore(run, sets_damaged_aside=True) == history.digests[ITERATIONS]
    assert "the snapshot of iteration 4 is damaged" in caplog.text
    assert "replaying 3 iterations over the snapshot of iteration 2" in caplog.text
    assert find_snapshots(run_dir) == [2]
    assert (run_dir / "snapshots" / "iteration-00000004.damaged").is_dir()


def test_without_a_good_snapshot_the_journal_is_replayed_from_the_base(run, caplog):
    run_dir, _, history = run
    for iteration in (2, 4):
        damage(snapshot_path(run_dir, iteration) / "rank-00000.safetensors", "flipped")
    with caplog.at_level(logging.INFO):
        assert restore(run) == history.digests[ITERATIONS]
    assert caplog.text.count("is damaged") == 2
    assert "replaying 5 iterations over the base model" in caplog.text
    assert find_snapshots(run_dir) == [4, 2], "nobody but the run itself renames anything"


def test_a_snapshot_of_another_run_is_not_believed(run, caplog):
    run_dir, _, history = run
    shutil.rmtree(snapshot_path(run_dir, 4))
    shutil.copytree(snapshot_path(run_dir, 2), snapshot_path(run_dir, 4))
    assert restore(run) == history.digests[ITERATIONS]
    assert "the snapshot of iteration 4 is damaged (its weights have the digest" in caplog.text


def test_weights_that_the_journal_does_not_have_end_the_job(run):
    history = run[-1]
    history.digests[ITERATIONS] = "0" * 16
    with pytest.raises(UserError, match=r"the journal says 0000000000000000\. This machine computes other"):
        restore(run)


@pytest.mark.parametrize("kind", ["missing", "truncated", "zeroed", "flipped", "all"])
def test_a_resumed_run_ends_with_the_same_bytes_whatever_became_of_its_snapshots(
    original, model, tmp_path, kind
):
    root, changes = original
    run_dir = tmp_path / "run"
    shutil.copytree(root / "run", run_dir)
    journal = run_dir / "journal.jsonl"
    wanted = journal.read_bytes()
    # As it was when iteration 4 had just begun.
    records = [json.loads(line) for line in wanted.splitlines()]
    kept = next(i for i, r in enumerate(records) if (r.get("iteration"), r.get("member")) == (4, 1))
    journal.write_bytes(b"".join(wanted.splitlines(keepends=True)[: kept + 1]))
    if kind == "all":
        shutil.rmtree(run_dir / "snapshots")
    else:
        damage(snapshot_path(run_dir, 4) / "rank-00000.safetensors", kind)
    train(configured(root, model, run_dir, **changes))
    assert journal.read_bytes() == wanted


def cut_and_resume(original, model, tmp_path, data, cut):
    """Goes on with what ``cut`` bytes of a journal say; returns the journal of the run then."""
    root, changes = original
    shutil.copytree(root / "run", tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").write_bytes(data[:cut])
    train(configured(root, model, tmp_path / "run", **changes))
    found = (tmp_path / "run" / "journal.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run")
    return found


# Where the journal ends when it is cut: in an update and the member before it, or as it ends of itself.
@pytest.mark.parametrize("last", ['"iteration":3,"sigma"', f'"iteration":{ITERATIONS},"type":"weights"'])
@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.timeout(900)
def test_a_journal_cut_at_any_byte_of_its_last_two_lines_gives_the_same_run(
    original, model, tmp_path, last, step
):
    root, _ = original
    data = (root / "run" / "journal.jsonl").read_bytes()
    lines = data.splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if last.encode() in line) + 1
    lengths = [len(b"".join(lines[:number])) for number in (end - 2, end)]
    for cut in range(lengths[0], lengths[1] + 1, step):
        assert cut_and_resume(original, model, tmp_path, data, cut) == data, cut


# How snapshots are taken.


@pytest.fixture
def session(model, tmp_path):
    with open_session(configured(tmp_path, model, tmp_path / "run")) as session:
        (tmp_path / "run").mkdir()
        yield session


def snapshots_of(session, **changes):
    arguments = {"every": 1, "keep": 2, "mesh": session.mesh, "weights": session.weights, "is_sharded": False}
    taken = snapshotting.Snapshots(session.config.run.dir, **(arguments | changes))
    taken.open()
    return taken


def take(taken, session, iteration):
    taken.begin(iteration, digest=session.digest(), states_digest="0")
    taken.finish()


def test_old_snapshots_go_when_new_ones_are_complete(session):
    taken, run_dir = snapshots_of(session, keep=3), session.config.run.dir
    for iteration in range(1, 7):
        taken.begin(iteration, digest=session.digest(), states_digest="0")
        assert find_snapshots(run_dir) == list(range(iteration - 1, 0, -1))[:3]
        taken.finish()
        assert find_snapshots(run_dir) == list(range(iteration, 0, -1))[:3]
    assert len(list((run_dir / "snapshots").iterdir())) == 3


def test_what_a_longer_journal_left_does_not_count_and_is_replaced(session):
    taken, run_dir = snapshots_of(session), session.config.run.dir
    for iteration in (2, 8, 9):
        snapshot_path(run_dir, iteration).mkdir()
    take(taken, session, 3)
    assert find_snapshots(run_dir) == [9, 8, 3, 2]
    take(taken, session, 8)
    assert find_snapshots(run_dir) == [9, 8, 3]
    assert Snapshot(snapshot_path(run_dir, 8)).weights_digest == session.digest()


def test_the_next_update_waits_for_what_is_not_written_yet(session, monkeypatch):
    taken, digest = snapshots_of(session), session.digest()
    may_write = threading.Event()

    def slow(*arguments, **keywords):
        may_write.wait(10)
        return write_part(*arguments, **keywords)

    monkeypatch.setattr(snapshotting, "write_part", slow)
    taken.begin(1, digest=digest, states_digest="0")
    threading.Timer(0.2, may_write.set).start()
    taken.finish()
    session.weights.update(Update(0, [1.0]))
    assert session.digest() != digest
    path = snapshot_path(session.config.run.dir, 1)
    session.weights.load_snapshot(Snapshot(path), last_update=Update(0, []))
    assert session.digest() == digest


def test_members_may_be_perturbed_while_a_snapshot_is_written(session, monkeypatch):
    taken, digest = snapshots_of(session), session.digest()
    may_write = threading.Event()
    monkeypatch.setattr(
        snapshotting, "write_part", lambda *a, **k: (may_write.wait(10), write_part(*a, **k))[1]
    )
    taken.begin(1, digest=digest, states_digest="0")
    session.weights.perturb(iteration=0, direction=1, sigma=1.0)
    may_write.set()
    taken.finish()
    path = snapshot_path(session.config.run.dir, 1)
    session.weights.load_snapshot(Snapshot(path), last_update=Update(0, []))
    assert session.digest() == digest


@pytest.mark.parametrize("where", ["write_part", "write_manifest"])
def test_a_snapshot_that_cannot_be_written_is_a_warning(session, monkeypatch, caplog, where):
    taken, run_dir = snapshots_of(session), session.config.run.dir
    take(taken, session, 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            snapshotting, where, lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        take(taken, session, 2)
    assert "the snapshot of iteration 2 could not be written" in caplog.text
    assert "No space left" in caplog.text
    assert [path.name for path in (run_dir / "snapshots").iterdir()] == ["iteration-00000001"]
    take(taken, session, 3)
    assert find_snapshots(run_dir) == [3, 1]


def test_closing_gives_up_what_is_being_written_and_the_next_job_clears_it_away(session, monkeypatch):
    taken, run_dir = snapshots_of(session), session.config.run.dir
    started = threading.Event()

    def endless(path, masters, *, is_cancelled):
        started.set()
        while not is_cancelled():
            started.wait(0.01)
        raise SnapshotError("given up")

    monkeypatch.setattr(snapshotting, "write_part", endless)
    taken.begin(1, digest=session.digest(), states_digest="0")
    assert started.wait(10)
    taken.close()
    taken.close()
    taken.finish()
    assert find_snapshots(run_dir) == []
    assert list((run_dir / "snapshots").iterdir())
    snapshots_of(session)
    assert not list((run_dir / "snapshots").iterdir())


def test_only_the_first_replica_writes_and_only_once_where_all_hold_everything(session):
    def is_writer(rank, shard_size, *, is_sharded):
        cpu = torch.device("cpu")
        mesh = Mesh(Group(rank, 4, cpu), Group(rank % shard_size, shard_size, cpu))
        arguments = {"every": 1, "keep": 2, "mesh": mesh, "weights": session.weights}
        return snapshotting.Snapshots(session.config.run.dir, is_sharded=is_sharded, **arguments)._is_writer

    assert [is_writer(rank, 2, is_sharded=True) for rank in range(4)] == [True, True, False, False]
    assert [is_writer(rank, 4, is_sharded=False) for rank in range(4)] == [True, False, False, False]
    assert [is_writer(rank, 1, is_sharded=False) for rank in range(4)] == [True, False, False, False]


def test_a_master_passes_through_the_file_in_pieces(tmp_path, monkeypatch):
    from shardes.runs import snapshots

    monkeypatch.setattr(snapshots, "CHUNK_ELEMENTS", 3)
    whole = whole_values(torch.float32)
    pieces = write_snapshot(tmp_path / "pieces", ranks_of("columns", 2), whole)
    monkeypatch.undo()
    one = write_snapshot(tmp_path / "one", ranks_of("columns", 2), whole)
    for path in one.iterdir():
        assert (pieces / path.name).read_bytes() == path.read_bytes()


def test_a_session_without_snapshots_makes_no_directory(model, tmp_path):
    train(configured(tmp_path, model, tmp_path / "run", run__snapshot_every=0))
    assert not (tmp_path / "run" / "snapshots").exists()
