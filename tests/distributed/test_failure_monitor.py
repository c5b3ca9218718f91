"""The watch: a job ends as a whole, says why once, and stops when it is asked to. Ranks are threads here."""

import contextlib
import json
import os
import signal
import socket
import threading
import time

import pytest

from shardes.distributed.connection import call
from shardes.distributed.failure_monitor import FailureMonitor
from shardes.distributed.silence import Silence
from shardes.distributed.stop import Stop, stop_signals
from shardes.errors import JobError, UserError

FAREWELL = "stopped by SIGTERM; nothing is lost: resume with the same command"


class Job:
    """Watches of several ranks in one process, which record how they would have ended it."""

    def __init__(self, world_size, *, meets=True, **options):
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
        self.frozen = threading.Event()
        first, *others = self.watches
        for watch in self.watches:
            watch.start()
        self.port, self.token = first.open()
        for watch in others if meets else ():
            self.join(watch)
        assert not meets or first.wait_for_all(20) == []

    def join(self, watch):
        """What a rank does once it knows where rank 0 listens."""
        settings = {"world_size": len(self.watches), "token": self.token}
        limits = {"seconds": 20, "silence_seconds": 20}
        watch.join(*call(("127.0.0.1", self.port), rank=watch._rank, **settings, **limits))

    def ask_to_stop(self, rank, reason):
        """What a rank does when a signal asks it to stop."""
        watch = self.watches[rank]
        watch._ask(lambda: watch._tell({"is": "asked", "reason": reason}))

    def freeze(self, rank):
        """As SIGSTOP does: the thread neither reads nor writes, and its connections stay as they are."""
        self.watches[rank]._ask(self.frozen.wait)

    def thaw(self):
        self.frozen.set()

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
        (JobError("rank(s) 2 did not come"), 1, "Error: rank(s) 2 did not come"),
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
        b'{"is": "here", "rank": 1, "token": "guessed", "world_size": 2}\n',
        b"[" * 5000 + b"\n",
        json.dumps({"is": "here", "rank": 1, "token": job.token, "world_size": 2}).encode() + b"\n",
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


@pytest.fixture
def quick(monkeypatch):
    """A silence is noticed after half a second."""
    monkeypatch.setattr("shardes.distributed.silence._LEAST_SECONDS", 0.5)
    monkeypatch.setattr("shardes.distributed.silence._MOST_AWAY_SECONDS", 0.2)
    monkeypatch.setattr("shardes.distributed.failure_monitor._TICK_SECONDS", 0.05)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_frozen_rank_is_named_by_the_others_and_ends_when_it_wakes(rank, quick):
    job = Job(3, timeout_seconds=0.5)
    job.freeze(rank)
    job.wait(lambda: len(job.ended) == 2)
    job.wait(lambda: job.told)
    job.thaw()
    job.wait_for_the_end()
    assert job.ended == {0: 1, 1: 1, 2: 1}
    job.wait(
        lambda: len(job.told) == (2 if rank == 0 else 1)
    )  # rank 0 learns from the others why it is alone
    for text, _ in job.told:
        assert text.startswith(f"rank(s) {rank} gave no sign of life for ")
        assert "(parallel.timeout_seconds: 0.5)" in text


def test_who_waits_in_vain_for_a_frozen_rank_is_not_taken_for_the_cause(quick):
    job = Job(3, timeout_seconds=2)
    job.freeze(2)
    job.wait(lambda: job.watches[0]._silence.suspects([2]))
    job.watches[1].report(error_of(TimeoutError, "a consequence"))
    job.wait(lambda: job.told)
    job.thaw()
    job.wait_for_the_end()
    assert job.ended == {0: 1, 1: 1, 2: 1}
    assert [text.partition(" gave")[0] for text, _ in job.told] == ["rank(s) 2"]


def test_a_failure_is_told_by_itself_if_rank_0_does_not_answer(quick, monkeypatch):
    monkeypatch.setattr("shardes.distributed.failure_monitor._ANSWER_SECONDS", 0.3)
    job = Job(2, timeout_seconds=600)
    job.freeze(0)
    job.watches[1].report(error_of(ArithmeticError, "by itself"))
    assert job.ended == {1: 1}
    assert ["ArithmeticError: by itself" in text for text, _ in job.told] == [True]
    job.thaw()
    job.wait_for_the_end()
    assert [text.count("by itself") > 0 for text, _ in job.told] == [True, True]


def test_a_process_that_was_frozen_itself_blames_nobody():
    now = [0.0]
    silence = Silence(25, clock=lambda: now[0])
    silence.heard(1)
    for now[0] in (1.0, 1000.0, 1001.0):
        silence.look()
    assert silence.seconds(1) == 1.0 + 2.0 + 1.0
    assert silence.seconds(2) == 0, "of whom nothing was ever heard"
    for now[0] in range(1002, 1024):
        silence.look()
    assert (silence.frozen([1]), silence.suspects([1])) == ([1], [1])


def test_a_rank_that_takes_the_job_for_another_ends_it():
    job = Job(3, meets=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE: it is 2 on rank 1, but 3 on rank 0"):
        call(("127.0.0.1", job.port), rank=1, world_size=2, token=job.token, seconds=20, silence_seconds=9)
    job.wait(lambda: job.told)
    assert job.ended == {0: 2}
    assert "WORLD_SIZE: it is 2 on rank 1" in job.told[0][0]
    for watch in job.watches[1:]:
        watch.close()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_request_to_stop_before_the_ranks_have_met_ends_those_that_come_later(rank):
    job = Job(3, meets=False)
    job.ask_to_stop(rank, "SIGTERM")
    job.join(job.watches[1])
    time.sleep(0.2)
    assert not job.ended, "rank 2 would look for the others in vain"
    job.join(job.watches[2])
    job.wait_for_the_end()
    assert job.ended == {0: 0, 1: 0, 2: 0}
    assert [text for text, _ in job.told] == [FAREWELL]


def test_a_rank_that_meets_nobody_ends_when_asked_to(monkeypatch):
    monkeypatch.setattr("shardes.distributed.failure_monitor._ANSWER_SECONDS", 0.1)
    job = Job(2, meets=False)
    job.ask_to_stop(1, "SIGTERM")
    job.wait(lambda: job.ended == {1: 130})
    job.watches[0].close()


def test_a_rank_that_does_not_notice_that_the_time_is_over_is_ended():
    job = Job(2, meets=False)
    job.watches[1].meet_within(0.1, "has waited")
    job.wait(lambda: job.ended == {1: 1})
    assert [text for text, _ in job.told] == ["has waited"]
    job.watches[0].close()


@pytest.mark.parametrize("rank", [0, 2])
def test_every_rank_learns_of_a_request_to_stop(rank):
    job = Job(3)
    job.ask_to_stop(rank, "SIGUSR1")
    job.wait(lambda: all(stop.is_requested for stop in job.stops))
    assert {stop.reason for stop in job.stops} == {"SIGUSR1"}
    assert not job.ended, "there is time to finish"
    for watch in job.watches:
        watch.close()


def test_what_takes_too_long_is_abandoned_with_status_0():
    job = Job(3, stop_seconds=0.3)
    job.ask_to_stop(1, "SIGTERM")
    job.wait_for_the_end()
    assert job.ended == {0: 0, 1: 0, 2: 0}
    assert [text for text, _ in job.told] == [FAREWELL]


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


def test_a_request_that_was_put_off_ends_a_rank_whose_mistake_keeps_it_from_the_others():
    """A launcher ends this rank since another has told the same mistake, and waits for it."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(ValueError), stop_signals(num_ranks=2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            raise ValueError("a mistake in the configuration")
        os._exit(7)  # it would wait and tell the mistake again
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


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
