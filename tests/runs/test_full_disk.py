"""A disk that is full, or that may not be written: one clear message, and nothing that was recorded is lost.

The disk is a small tmpfs, which takes root to mount.
"""

import contextlib
import subprocess

import pytest
import yaml

from shardes.runs.journal import read_journal
from shardes.runs.snapshot import find_snapshots
from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree

ITERATIONS = 12
PAGE = 4096


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A configuration, and what an undisturbed run exports."""
    root = tmp_path_factory.mktemp("original")
    model = tiny_model(root / "model", tied=True)
    path = root / "config.yaml"
    keys = {"es__iterations": ITERATIONS, "eval__every": 4}
    path.write_text(yaml.safe_dump(tree(root, model=model, run_dir=root / "run", **keys)))
    assert call("train", "--config", path).returncode == 0
    return path, export(root / "run", root / "export")


def export(run_dir, out):
    result = call("shardes", "export", run_dir, out)
    assert result.returncode == 0, result.stderr
    return fingerprint(out)


class Disk:
    """A file system of its own."""

    def __init__(self, path, *, num_bytes):
        self.path = path
        path.mkdir()
        self._run("mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", path)

    def remount(self, options):
        self._run("mount", "-o", f"remount,{options}", self.path)

    def unmount(self):
        self._run("umount", self.path)

    def _run(self, *command):
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=20)


@pytest.fixture
def disk(tmp_path):
    """Makes disks of a size."""
    with contextlib.ExitStack() as stack:

        def make(num_bytes):
            try:
                made = Disk(tmp_path / "disk", num_bytes=num_bytes)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no file system can be mounted here: {error}")
            stack.callback(made.unmount)
            return made

        yield make


def assert_clear(result, status, *fragments):
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr


def assert_whole(journal):
    """Every byte of it is of a whole line; returns its history."""
    history, _, good_bytes, num_bytes = read_journal(journal)
    assert good_bytes == num_bytes
    return history


def test_a_disk_that_fills_up_ends_the_run_which_goes_on_when_there_is_room(original, disk, tmp_path):
    config, wanted = original
    small = disk(8 * PAGE)
    run_dir = small.path / "run"
    command = ["train", "--config", config, f"run.dir={run_dir}"]
    assert_clear(call(*command), 1, "No space left on device", str(run_dir), "start the same command again")
    done = len(assert_whole(run_dir / "journal.jsonl").updates)
    assert 0 < done < ITERATIONS
    # There still is no room to speak of.
    again = call(*command)
    assert again.returncode in (1, 2)
    assert "No space left on device" in again.stderr
    assert "Traceback" not in again.stderr
    assert len(assert_whole(run_dir / "journal.jsonl").updates) >= done
    small.remount("size=1m")
    assert call(*command).returncode == 0
    assert export(run_dir, tmp_path / "export") == wanted


def test_a_disk_that_is_full_from_the_start_is_a_mistake_of_the_users(original, disk):
    config, _ = original
    small = disk(3 * PAGE)
    (small.path / "filler").write_bytes(bytes(2 * PAGE))
    result = call("train", "--config", config, f"run.dir={small.path / 'run'}")
    assert_clear(result, 2, "run.dir", "No space left on device")


def test_a_disk_too_small_for_snapshots_is_told_and_the_run_goes_on(original, disk, tmp_path, caplog):
    config, wanted = original
    small = disk(50 * PAGE)  # a snapshot of this model takes more
    run_dir = small.path / "run"
    result = call("train", "--config", config, f"run.dir={run_dir}", "run.snapshot_every=4")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("could not be written") == 3
    assert "No space left on device" in result.stderr
    assert find_snapshots(run_dir) == []
    assert list((run_dir / "snapshots").iterdir()) == []
    assert export(run_dir, tmp_path / "export") == wanted


def test_a_directory_that_may_not_be_written_is_refused_and_can_still_be_read(original, disk, tmp_path):
    config, wanted = original
    small = disk(100 * PAGE)
    run_dir = small.path / "run"
    assert call("train", "--config", config, f"run.dir={run_dir}").returncode == 0
    small.remount("ro")
    result = call("train", "--config", config, f"run.dir={run_dir}")
    assert_clear(result, 2, "run.dir", "cannot be written (Read-only file system)")
    new = call("train", "--config", config, f"run.dir={small.path / 'new'}")
    assert_clear(new, 2, "run.dir", "cannot be made (Read-only file system)")
    assert export(run_dir, tmp_path / "export") == wanted
    assert call("shardes", "verify", run_dir).returncode == 0


def test_an_export_that_does_not_fit_is_told_and_leaves_nothing_under_its_name(original, disk):
    config, _ = original
    small = disk(20 * PAGE)
    result = call("shardes", "export", config.parent / "run", small.path / "out")
    assert_clear(result, 1, "No space left on device", str(small.path / "out"))
    assert not (small.path / "out").exists()
