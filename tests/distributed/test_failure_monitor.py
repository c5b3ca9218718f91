"""The watch: a job ends as a whole, says why once, and stops when it is asked to. Ranks are threads here."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest
import torch.distributed as dist

from shardes.distributed.failure_monitor import FailureMonitor
from shardes.distributed.stop import Stop, stop_signals
from shardes.errors import UserError


class Job:
    """Watches of several ranks in one process, which record how they would have ended it."""

    def __init__(self, world_size, **options):
        self.ended = {}
        self.told = []
        self.stops = [Stop() for _ in range(world_size)]
        settings = {"stop_seconds": 20, "timeout_seconds": 20} | options
        self.watches = [
            FailureMonitor(
                rank=rank,
                world_size=world_size,
                stop=self.stops[rank],
                end=lambda status, rank=rank: self.end(rank, status),
                tell=lambda text: self.told.append((text, dict(self.ended))),
                **settings,
            )
            for rank in range(world_size)
        ]
        store = dist.HashStore()
        for watch in self.watches:
            watch.start()
            watch.connect(store, host="127.0.0.1")
        self.wait(lambda: len(self.watches[0]._peers) == world_size - 1)

    def end(self, rank, status):
        self.ended.setdefault(rank, status)
        self.cut(rank)

    def cut(self, rank):
        """What the kernel does to the connections of a process that has ended."""
        watch = self.watches[rank]
        for connection in [*watch._peers.values()]:
            with contextlib.suppress(OSError):
                connection.line.shutdown(socket.SHUT_RDWR)

    def wait(self, condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, (self.ended, self.told)
            time.sleep(0.01)

    def wait_for_the_end(self):
        self.wait(lambda: len(self.ended) == len(self.watches) and self.told)

    def die(self, rank):
        self.ended[rank] = -signal.SIGKILL
        watch = self.watches[rank]
        watch._end_process = lambda status: None
        watch._tell_user = lambda text: None
        self.cut(rank)


def error_of(kind, text):
    try:
        raise kind(text)
    except kind as error:
        return error


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_first_failure_ends_all_ranks_and_is_told_once_at_the_end(rank):
    job = Job(3)
    job.watches[rank].report(error_of(ArithmeticError, "the first"))
    job.wait_for_the_end()
    assert job.ended == {0: 1, 1: 1, 2: 1}
    [(text, ended_before)] = job.told
    assert f"rank {rank} failed" in text
    assert "ArithmeticError: the first" in text
    assert "Traceback" in text
    assert set(ended_before) == {1, 2}, "rank 0 speaks when the others have ended"


def test_of_several_failures_the_first_counts():
    job = Job(3)
    threads = []
    for rank, words in ((2, "the cause"), (0, "a consequence"), (1, "a consequence")):
        error = error_of(ValueError, words)
        threads.append(threading.Thread(target=job.watches[rank].report, args=[error]))
        threads[-1].start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(20)
    job.wait_for_the_end()
    assert ["the cause" in text and "consequence" not in text for text, _ in job.told] == [True]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("es.sigma: too large"), 2, "Error: es.sigma: too large"),
        (KeyboardInterrupt(), 130, "interrupted; go on with the same command"),
    ],
)
def test_the_users_mistakes_and_wishes_have_no_traceback(error, status, words):
    job = Job(2)
    job.watches[1].report(error)
    job.wait_for_the_end()
    assert job.ended == {0: status, 1: status}
    assert [text for text, _ in job.told] == [words]


def test_a_death_is_told_rather_than_what_it_did_to_other_ranks():
    job = Job(3)
    thread = threading.Thread(
        target=job.watches[1].report, args=[error_of(RuntimeError, "connection closed by peer")]
    )
    thread.start()
    time.sleep(0.1)
    job.die(2)
    thread.join(20)
    job.wait_for_the_end()
    assert job.ended == {0: 1, 1: 1, 2: -9}
    [(text, _)] = job.told
    assert text.startswith("rank(s) 2 ended without a word")


def test_the_death_of_rank_0_ends_the_others(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    job = Job(3)
    job.die(0)
    job.wait_for_the_end()
    assert job.ended == {0: -9, 1: 1, 2: 1}
    assert [text.startswith("rank(s) 0 ended without a word") for text, _ in job.told] == [True]


def test_who_has_left_is_nobodys_concern():
    job = Job(3)
    job.watches[1].close()
    job.wait(lambda: set(job.watches[0]._peers) == {2})
    job.watches[0].close()
    job.watches[2].close()
    assert (job.ended, job.told) == ({}, [])


def test_leaving_and_hearing_of_another_who_leaves_at_the_same_time():
    job = Job(2)
    connection = job.watches[1]._peers[0]
    job.watches[0].close()
    job.watches[1].close()
    job.watches[1]._on_messages(connection)  # as when both were in one batch of events
    assert (job.ended, job.told) == ({}, [])


def test_a_stranger_is_sent_away_and_disturbs_nobody():
    job = Job(2)
    port = job.watches[0]._listener.getsockname()[1]
    for words in (
        b'{"is": "here", "rank": 1, "token": "guessed"}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b"1\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b""
    for watch in reversed(job.watches):
        watch.close()
    assert (job.ended, job.told) == ({}, [])


@pytest.mark.parametrize("rank", [0, 2])
def test_every_rank_learns_of_a_request_to_stop(rank):
    job = Job(3)
    watch = job.watches[rank]
    watch._ask(lambda: watch._tell({"is": "asked", "reason": "SIGUSR1"}))
    job.wait(lambda: all(stop.is_requested for stop in job.stops))
    assert {stop.reason for stop in job.stops} == {"SIGUSR1"}
    assert not job.ended, "there is time to finish"
    for watch in job.watches:
        watch.close()


def test_what_takes_too_long_is_abandoned_with_status_0():
    job = Job(3, stop_seconds=0.3)
    watch = job.watches[1]
    watch._ask(lambda: watch._tell({"is": "asked", "reason": "SIGTERM"}))
    job.wait_for_the_end()
    assert job.ended == {0: 0, 1: 0, 2: 0}
    assert [text for text, _ in job.told] == [
        "stopped by SIGTERM; nothing is lost: resume with the same command"
    ]


def test_signals_become_requests_and_a_second_one_ends_at_once(monkeypatch):
    monkeypatch.setattr("shardes.distributed.stop._SAME_REQUEST_SECONDS", 0.2)
    ended, told = [], []
    old = signal.getsignal(signal.SIGUSR1)
    with stop_signals() as stop:
        watch = FailureMonitor(
            rank=0,
            world_size=1,
            stop=stop,
            stop_seconds=30,
            timeout_seconds=30,
            end=ended.append,
            tell=told.append,
        )
        watch.start()
        for _ in range(2):  # within a moment: from a service manager, and from a launcher that it stops
            os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not stop.is_requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.reason == "SIGUSR1"
        assert not ended
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGTERM)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ended == [130]
        watch.close()
    assert told == []
    assert signal.getsignal(signal.SIGUSR1) is old


def test_forked_children_are_ended_by_signals_as_usual():
    with stop_signals() as stop:
        stop.is_watched = True
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert stop.take_signals() == (None, False), "and the parent is not asked to stop"


def test_a_launcher_that_has_ended_is_noticed():
    """A child of a child: the grandparent ends, then the parent, as with deepspeed and torchrun."""
    reader, writer = os.pipe()
    release, hold = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            os.environ["TORCHELASTIC_RUN_ID"] = "test"
            a, _b = socket.socketpair()
            a.setblocking(False)
            stop = Stop(a)
            before = stop.take_signals()
            os.write(writer, b"!")
            os.read(release, 1)
            deadline = time.monotonic() + 10
            while (asked := stop.take_signals())[0] is None and time.monotonic() < deadline:
                time.sleep(0.01)
            os.write(writer, repr((before, asked)).encode())
            os._exit(0)
        os.read(reader, 1)
        os._exit(0)
    os.waitpid(launcher, 0)
    os.write(hold, b"!")
    found = os.read(reader, 1000).decode()
    assert found == repr(((None, False), ("the end of the launcher", False)))
