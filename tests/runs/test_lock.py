"""The lock of a run directory: who holds it, whose death is believed, and what a sleeper does."""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time

import pytest

from shardes.errors import StorageError, UserError
from shardes.runs import lock
from shardes.runs.lock import DirectoryLock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Everything in a hundredth of the time."""
    for name in ("SIGNATURE_SECONDS", "SILENCE_SECONDS", "PATIENCE_SECONDS"):
        monkeypatch.setattr(lock, name, getattr(lock, name) / 100)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.01)


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


def owner(path):
    return json.loads(path.read_text())


def other_machine(path, **changes):
    """The record of a job elsewhere."""
    record = {"host": "far", "pid": 7, "machine": "m", "since": "s", "seen": "s", "signatures": 1} | changes
    path.write_text(json.dumps(record))


def test_the_file_names_the_owner_and_is_empty_afterwards(path):
    held = DirectoryLock(path)
    assert (owner(path)["host"], owner(path)["pid"]) == (socket.gethostname(), os.getpid())
    held.release()
    assert path.read_bytes() == b""


def test_the_owner_signs_again_and_again_in_place(path):
    held = DirectoryLock(path)
    first, size = owner(path)["signatures"], path.stat().st_size
    deadline = time.monotonic() + 10
    while owner(path)["signatures"] < first + 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert owner(path)["signatures"] >= first + 3
    assert path.stat().st_size == size, "a signature needs no room on a full disk"
    held.check()
    held.release()


def test_a_second_job_is_refused_with_the_first_ones_host_and_process(path):
    held = DirectoryLock(path)
    with pytest.raises(UserError) as caught:
        DirectoryLock(path)
    assert f"in use by process {os.getpid()} on host {socket.gethostname()} (since " in str(caught.value)
    held.check()
    held.release()
    DirectoryLock(path).release()


def test_a_job_that_is_just_ending_is_waited_for(path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 10)
    held = DirectoryLock(path)
    threading.Timer(0.2, held.release).start()
    DirectoryLock(path).release()


def test_a_dead_owner_on_this_machine_is_succeeded_at_once(path, caplog):
    other_machine(path, machine=lock._machine(), pid=4_000_000)
    start = time.monotonic()
    with caplog.at_level(logging.INFO):
        held = DirectoryLock(path)
    assert time.monotonic() - start < lock.SILENCE_SECONDS
    assert "process 4000000 on host far" in caplog.text
    assert owner(path)["pid"] == os.getpid()
    held.release()


def test_a_silent_owner_on_another_machine_is_succeeded_after_the_silence(path, caplog):
    other_machine(path)
    start = time.monotonic()
    held = DirectoryLock(path)
    assert time.monotonic() - start >= lock.SILENCE_SECONDS
    assert "the directory is taken over" in caplog.text
    held.check()
    held.release()


def test_an_owner_on_another_machine_that_signs_is_alive(path):
    other_machine(path)
    threading.Timer(lock.SILENCE_SECONDS / 2, other_machine, [path], {"signatures": 2}).start()
    with pytest.raises(UserError, match="in use by process 7 on host far"):
        DirectoryLock(path)
    assert owner(path)["host"] == "far"


def test_an_owner_on_another_machine_that_leaves_need_not_be_outlived(path):
    other_machine(path)
    threading.Timer(0.1, path.write_bytes, [b""]).start()
    start = time.monotonic()
    DirectoryLock(path).release()
    assert time.monotonic() - start < lock.SILENCE_SECONDS


def test_where_the_kernel_has_no_such_locks_signatures_decide(path, monkeypatch):
    def without(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    held = DirectoryLock(path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        DirectoryLock(path)
    held.check()
    held.release()
    DirectoryLock(path).release()


def test_of_two_jobs_that_both_believe_in_a_death_one_goes_on(path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
    other_machine(path)
    outcomes = []

    def claim(host):
        try:
            outcomes.append(DirectoryLock(path))
        except UserError:
            outcomes.append(None)

    # They differ in their host only if asked at different moments, so give them a clock each.
    clock = iter(["a", "b"])
    monkeypatch.setattr(lock, "_now", lambda: next(clock, "later"))
    threads = [threading.Thread(target=claim, args=(host,)) for host in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    held = [each for each in outcomes if each is not None]
    assert len(held) == 1
    held[0].check()
    held[0].release()


def test_who_was_succeeded_notices_and_stops_signing(path):
    held = DirectoryLock(path)
    other_machine(path)
    with pytest.raises(StorageError, match="taken over by process 7 on host far"):
        held.check()
    before = path.read_text()
    time.sleep(3 * lock.SIGNATURE_SECONDS)
    assert path.read_text() == before
    held.release()
    assert path.read_text() == before, "what another job wrote is not cleared"


@pytest.mark.parametrize("text", ["", "\0" * 512, "\n"])
def test_a_file_that_says_nothing_is_nobodys(path, text):
    path.write_text(text)
    start = time.monotonic()
    DirectoryLock(path).release()
    assert time.monotonic() - start < lock.SILENCE_SECONDS


@pytest.mark.parametrize("text", ["{", "[]", '{"pid": 3}'])
def test_a_record_that_cannot_be_read_is_outlived(path, text):
    path.write_text(text)
    start = time.monotonic()
    DirectoryLock(path).release()
    assert time.monotonic() - start >= lock.SILENCE_SECONDS
