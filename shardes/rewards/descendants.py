"""Descendants of a process: finding them, and ending them so that they leave nothing behind."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# How long Python's resource trackers have to remove semaphores and shared memory; and then, how long it may
# take until killed processes are gone.
_TRACKER_SECONDS = 2.0


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parents end, however they detached themselves."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent(number: signal.Signals) -> None:
    """Have this process sent a signal when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def reap(codes: dict[int, int]) -> bool:
    """Reap children that have ended.

    Args:
        codes: Is added the exit code of each, or minus its signal.

    Returns:
        True if other children live.
    """
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            codes[found[0]] = os.waitstatus_to_exitcode(found[1])
    except ChildProcessError:
        return False
    return True


def descendants(*, without: Collection[int] = ()) -> list[int]:
    """Return the living descendants of this process, children before grandchildren.

    Args:
        without: Processes that are left out with all their descendants.
    """
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        if child not in without:
            children.setdefault(parent, []).append(child)
    found = list(children.get(os.getpid(), ()))
    for each in found:  # it grows
        found += children.get(each, ())
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """Yield the processes that live, each with its parent."""
    for name in os.listdir("/proc"):  # noqa: PTH208 - a Path for each process takes too long
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    yield int(name), int(parent)


def is_tracker(pid: int) -> bool:
    """Return True for the process in which Python's multiprocessing removes what others forget."""
    try:
        return b"resource_tracker import main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def end_all(find: Callable[[], Iterable[int]], codes: dict[int, int]) -> None:
    """Kill processes, and with them those that they start meanwhile.

    Python's resource trackers, which end when nobody is left who might tell them of something, first remove
    the semaphores and shared memory that the others have left.

    Args:
        find: Returns those that live.
        codes: Is added the exit codes of this process's children among them; see ``reap``.
    """
    deadline = time.monotonic() + _TRACKER_SECONDS
    while pids := list(find()):
        now = time.monotonic()
        for pid in pids:
            if now > deadline or not is_tracker(pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        if now > deadline + _TRACKER_SECONDS:
            return  # such as one that waits for a dead disk
        time.sleep(0.001)
        reap(codes)
    reap(codes)
