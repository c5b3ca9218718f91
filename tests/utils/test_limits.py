"""Work under limits: values arrive, and what takes too much ends with the item that did it."""

import os
import signal
import time

import pytest

from shardes.utils.limits import LimitError, limited_map


def test_values_come_in_order_from_another_process():
    seen = []

    def double(number):
        seen.append(number)
        return [2 * number, os.getpid(), "x" * 100_000]

    found = list(limited_map(double, [1, 2, 3]))
    assert [value for value, *_ in found] == [2, 4, 6]
    assert {len(text) for *_, text in found} == {100_000}
    assert found[0][1] != os.getpid()
    assert seen == []
    assert list(limited_map(double, [])) == []


def work(kind):
    if kind == "loop":
        while True:
            pass
    if kind == "one operation":
        return len(str(9**9**7))
    if kind == "memory":
        return len("x" * 2**34)
    if kind == "exit":
        os._exit(3)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return kind


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("loop", "takes more than 0.2 s of processor time"),
        ("one operation", "takes more than 0.2 s of processor time"),
        ("memory", "needs more than 256.0 MiB of memory"),
        ("exit", "ended its process (status 3)"),
        ("killed", "ended its process (SIGKILL)"),
    ],
)
def test_what_takes_too_much_is_named(kind, words, monkeypatch):
    pids, fork = [], os.fork

    def noted_fork():
        pids.append(fork())
        return pids[-1]

    monkeypatch.setattr(os, "fork", noted_fork)
    found = limited_map(work, ["a", kind, "b"], seconds=0.2, memory_bytes=2**28)
    assert next(found) == "a"
    with pytest.raises(LimitError) as error:
        next(found)
    assert error.value.index == 1
    assert str(error.value) == words
    (pid,) = pids
    with pytest.raises(ChildProcessError):  # no process is left behind
        os.waitpid(pid, os.WNOHANG)


def test_a_process_that_waits_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("shardes.utils.limits._WAIT_SECONDS", 0.2)
    with pytest.raises(LimitError, match="gave no answer"):
        list(limited_map(time.sleep, [60]))


def test_other_exceptions_are_told():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: "):
        list(limited_map(lambda number: 1 // number, [0]))
