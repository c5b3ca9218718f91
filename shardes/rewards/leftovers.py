"""What a reward has changed in its process and left behind, undone before the next call.

Timers, handlers, the mask of signals, the working directory, the environment and the like are put back.
Threads, processes, many open files and whatever else cannot be put back make the process unfit for another
call. What a reward keeps in variables of its modules is its own, and stays.
"""

import builtins
import contextlib
import decimal
import faulthandler
import io
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import thread as futures
from pathlib import Path

from shardes.rewards.descendants import descendants, end_all, is_tracker, reap

# How long threads and processes that are about to end may take to do so.
_GRACE_SECONDS = 0.1
# Files that calls may leave open together, such as connections that are used again.
_MAX_LEFT_OPEN = 256

_GUARDED = (builtins, os, shutil, signal, subprocess, time)
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_LIMITS = tuple(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))


class ProcessState:
    """State of this process at some time, to which it can be put back.

    Threads and processes that exist now are not taken for left behind later, nor are idle threads of
    executors (``concurrent.futures``).

    Args:
        may_keep_running: Calls may leave threads, processes and open files behind, for later calls.

    Attributes:
        left: What calls have left behind so far that cannot be undone, for people to read; None: nothing.
    """

    def __init__(self, *, may_keep_running: bool = False) -> None:
        self._may_keep_running = may_keep_running
        self._handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._directory = os.open(".", os.O_PATH | os.O_DIRECTORY)
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._environment = dict(os.environ)
        self._streams = sys.stdin, sys.stdout, sys.stderr
        self._files = [_identity(descriptor) for descriptor in range(3)]
        self._num_files = _num_open_files()
        self._limits = [resource.getrlimit(limit) for limit in _LIMITS]
        self._priority = os.getpriority(os.PRIO_PROCESS, 0)
        self._affinity = os.sched_getaffinity(0)
        self._identity = _identity_of_process()
        self._recursion_limit = sys.getrecursionlimit()
        self._max_digits = sys.get_int_max_str_digits()
        self._decimal = decimal.getcontext().copy()
        self._socket_timeout = socket.getdefaulttimeout()
        # What guards against other people's programs set to None, and mocks replace.
        self._modules = [(vars(module), vars(module).copy()) for module in _GUARDED]
        self._threads = set(sys._current_frames())
        self._children = set(descendants())
        self.left: str | None = None

    def restore(self) -> None:
        """Put the process back into this state, and note in ``left`` what cannot be put back."""
        left = self._restore()
        self.left = self.left or left

    def _restore(self) -> str | None:
        for attributes, saved in self._modules:  # before any of their functions is called
            attributes.update(saved)
        for _ in range(10):
            try:
                self._stop_signals()
                break
            except BaseException:  # the reward's own handler, of a signal that came just now
                continue
        else:
            return "signals that do not stop"
        steps = [
            self._restore_python,
            self._restore_process,
            *([] if self._may_keep_running else [self._find_threads, self._end_children]),
            self._find_files,
        ]
        try:
            return next(filter(None, [step() for step in steps]), None)
        except Exception as error:
            return f"a state that cannot be put back ({type(error).__name__}: {error})"

    def _stop_signals(self) -> None:
        for timer in _TIMERS:
            signal.setitimer(timer, 0)
        # What is pending must not arrive when it is let through again: to ignore it drops it.
        for number in signal.sigpending():
            with contextlib.suppress(OSError):
                signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is not handler and handler is not None:
                signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        faulthandler.cancel_dump_traceback_later()

    def _restore_python(self) -> str | None:
        sys.settrace(None)
        sys.setprofile(None)
        sys.setrecursionlimit(self._recursion_limit)
        sys.set_int_max_str_digits(self._max_digits)
        decimal.setcontext(self._decimal.copy())
        socket.setdefaulttimeout(self._socket_timeout)
        for name, stream in zip(("stdin", "stdout", "stderr"), self._streams, strict=True):
            setattr(sys, name, stream)
            if name != "stdin":
                with contextlib.suppress(ValueError, OSError):
                    stream.flush()
        if os.environ != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
        return None

    def _restore_process(self) -> str | None:
        os.fchdir(self._directory)
        os.umask(self._umask)
        os.sched_setaffinity(0, self._affinity)
        for limit, (soft, hard) in zip(_LIMITS, self._limits, strict=True):
            if resource.getrlimit(limit) != (soft, hard):
                try:
                    resource.setrlimit(limit, (soft, hard))
                except (ValueError, OSError):
                    return "a resource limit"
        if os.getpriority(os.PRIO_PROCESS, 0) != self._priority:
            return "another priority"
        if _identity_of_process() != self._identity:
            return "another user or root directory"
        return None

    def _find_threads(self) -> str | None:
        def living() -> list[int]:
            return [
                ident
                for ident, frame in sys._current_frames().items()
                if ident not in self._threads and frame.f_code is not futures._worker.__code__
            ]

        if self._ends_soon(living):
            return None
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        left = living()
        return f"a thread ({names.get(left[0], 'unnamed')})" if left else None

    def _end_children(self) -> str | None:
        def living() -> list[int]:
            if not reap({}):
                return []
            kept = self._children
            return [pid for pid in descendants(without=kept) if not is_tracker(pid)]

        if self._ends_soon(living):
            return None
        # Libraries that started a process may still count on it, so this one has served its time.
        end_all(living, {})
        return "a process"

    def _ends_soon(self, living: Callable[[], list[int]]) -> bool:
        """Return True once there is nothing that lives, or False after a moment."""
        deadline = time.monotonic() + (_GRACE_SECONDS if self.left is None else 0)
        while living():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def _find_files(self) -> str | None:
        if [_identity(descriptor) for descriptor in range(3)] != self._files:
            return "another standard input, output or error"
        if any(isinstance(stream, io.IOBase) and stream.closed for stream in self._streams):
            return "a closed standard input, output or error"
        if self._may_keep_running:
            return None
        num_left = _num_open_files() - self._num_files
        return f"{num_left} open files" if num_left > _MAX_LEFT_OPEN else None


def _identity_of_process() -> tuple[object, ...]:
    root = Path("/").stat()
    return os.getresuid(), os.getresgid(), os.getgroups(), root.st_dev, root.st_ino


def _identity(descriptor: int) -> tuple[int, int] | None:
    """Return the file that is open at a descriptor."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
