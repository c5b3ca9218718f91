"""Snapshots of a run: passed over when damaged, and never a bit that the journal does not give."""

import json
import logging
import shutil
import threading

import pytest
import torch

from shardes.distributed.group import Group, Mesh
from shardes.errors import UserError
from shardes.es.update import Perturbation, Update
from shardes.models.checkpoint import Checkpoint
from shardes.runs import snapshot_writer as snapshotting
from shardes.runs.journal import read_journal
from shardes.runs.resume import restore_weights
from shardes.runs.snapshot import Snapshot, SnapshotError, find_snapshots, snapshot_path, write_part
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from shardes.weights.snapshot_view import load_snapshot
from tests.helpers.models import make_config, tiny_model
from tests.helpers.snapshot_files import damage, manifest_of

ITERATIONS, EVERY = 5, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


def configured(root, model, run_dir, **changes):
    keys = {"es__iterations": ITERATIONS, "run__snapshot_every": EVERY, "eval__every": 0} | changes
    return make_config(root, model=model, run_dir=run_dir, **keys)


def train(config):
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
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
    taken = snapshotting.SnapshotWriter(session.config.run.dir, **(arguments | changes))
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


def test_snapshots_of_another_run_are_not_written_to(session, tmp_path):
    other = tmp_path / "other"
    (other / "snapshots").mkdir(parents=True)
    run_dir = tmp_path / "linked"
    run_dir.mkdir()
    (run_dir / "snapshots").symlink_to(other / "snapshots")
    writer = snapshotting.SnapshotWriter(
        run_dir, every=1, keep=2, mesh=session.mesh, weights=session.weights, is_sharded=False
    )
    writer.open()  # a directory elsewhere, such as on a larger disk
    (other / "journal.jsonl").touch()
    (other / "snapshots" / "iteration-00000001.incomplete").mkdir()
    with pytest.raises(UserError, match="is a link to the snapshots of another run"):
        writer.open()
    assert (other / "snapshots" / "iteration-00000001.incomplete").is_dir()


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
    load_snapshot(session.weights, Snapshot(path), last_update=Update(0, []))
    assert session.digest() == digest


def test_members_may_be_perturbed_while_a_snapshot_is_written(session, monkeypatch):
    taken, digest = snapshots_of(session), session.digest()
    may_write = threading.Event()
    monkeypatch.setattr(
        snapshotting, "write_part", lambda *a, **k: (may_write.wait(10), write_part(*a, **k))[1]
    )
    taken.begin(1, digest=digest, states_digest="0")
    session.weights.perturb(Perturbation(0, 1, 1.0))
    may_write.set()
    taken.finish()
    path = snapshot_path(session.config.run.dir, 1)
    load_snapshot(session.weights, Snapshot(path), last_update=Update(0, []))
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
        return snapshotting.SnapshotWriter(
            session.config.run.dir, is_sharded=is_sharded, **arguments
        )._is_writer

    assert [is_writer(rank, 2, is_sharded=True) for rank in range(4)] == [True, True, False, False]
    assert [is_writer(rank, 4, is_sharded=False) for rank in range(4)] == [True, False, False, False]
    assert [is_writer(rank, 1, is_sharded=False) for rank in range(4)] == [True, False, False, False]


def test_a_session_without_snapshots_makes_no_directory(model, tmp_path):
    train(configured(tmp_path, model, tmp_path / "run", run__snapshot_every=0))
    assert not (tmp_path / "run" / "snapshots").exists()
