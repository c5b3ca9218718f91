"""Requests to stop a job: by a signal to any rank, or by the end of the launcher.

A run's work is in its journal, so stopping never loses more than the members being evaluated. A job that is
asked to stop finishes these if that does not take too long, and ends with status 0 (``failure_monitor.py``).
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardes.errors import EXIT_INTERRUPTED

# Slurm warns with either, as the user wishes; launchers and service managers end processes with SIGTERM.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# One request to stop may reach a process twice: from a service manager, and from the launcher that it stops.
_SAME_REQUEST_SECONDS = 3.0
# Seconds that a rank waits for its launcher's signal if another rank had one (see ``wait_for_launcher``).
_LAUNCHER_SECONDS = 2.0
# Seconds that a rank which is asked to stop before it is watched takes to meet the others and pass it on.
_MEETING_SECONDS = 20

_is_reset_at_fork = False


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """The run stopped because it was asked to; the same command goes on with it. The exit status is 0."""


class Stop:
    """State of the requests to stop the job.

    Args:
        signals: Socket on which numbers of signals arrive, one byte each; None to ignore signals.

    Attributes:
        signals: Argument ``signals``.
        reason: Source of the request in words; None before one. It is set on rank 0 first, so a rank where it
            is set may count on rank 0 to know of it.
        is_watched: Whether a thread reads the signals; while none does, a signal ends the process at once.
    """

    def __init__(self, signals: socket.socket | None = None) -> None:
        self.signals = signals
        self.reason: str | None = None
        self.is_watched = False
        self._launcher = _Launcher() if signals is not None else None
        self._signalled_at: float | None = None
        self._was_watched = False
        self._put_off_at = 0.0
        self._last_resort: threading.Timer | None = None

    def watch(self) -> None:
        """Leave signals to a thread, also one that has come already."""
        self.is_watched = self._was_watched = True
        self.forget_last_resort()

    def wait_to_be_watched(self) -> bool:
        """Put off the answer to a signal until a thread reads it, for a while; return whether that may be."""
        if self._last_resort is None:
            self._last_resort = threading.Timer(_MEETING_SECONDS, os._exit, [EXIT_INTERRUPTED])
            self._last_resort.daemon = True
            self._last_resort.start()
            self._put_off_at = time.monotonic()
        return not self._was_watched and time.monotonic() - self._put_off_at < _SAME_REQUEST_SECONDS

    def forget_last_resort(self) -> None:
        """Let the process live on after a signal whose answer was put off."""
        if self._last_resort is not None:
            self._last_resort.cancel()

    @property
    def is_requested(self) -> bool:
        """Return whether the job was asked to stop."""
        return self.reason is not None

    def take_signals(self) -> tuple[str | None, bool]:
        """Read the signals that have arrived since the last call.

        Returns:
            Source of a first request to stop, or None; and whether there was a second request, after which
            the process must end at once.
        """
        asked, is_second = None, False
        for name in self._arrived():
            now = time.monotonic()
            if self._signalled_at is None:
                asked, self._signalled_at = name, now
            elif now - self._signalled_at > _SAME_REQUEST_SECONDS:
                is_second = True
        if asked is None and self._signalled_at is None and self._launcher and self._launcher.is_gone():
            asked, self._signalled_at = "the end of the launcher", time.monotonic()
        return asked, is_second

    def wait_for_launcher(self) -> None:
        """Wait for torchrun to stop this rank itself, if another rank was told to stop.

        When nodes join or leave, each node's torchrun stops its ranks to start them anew. One that finds them
        finished with status 0 before it has noticed would take the whole job for done, and leave it.
        """
        deadline = time.monotonic() + _LAUNCHER_SECONDS
        while (
            "TORCHELASTIC_RUN_ID" in os.environ and self._signalled_at is None and time.monotonic() < deadline
        ):
            self.take_signals()
            time.sleep(0.05)

    @property
    def farewell(self) -> str:
        """Message for the user, which is printed once."""
        return f"stopped by {self.reason}; nothing is lost: resume with the same command"

    def _arrived(self) -> list[str]:
        if self.signals is None:
            return []
        try:
            numbers = self.signals.recv(1024)
        except BlockingIOError:
            return []
        return [signal.Signals(number).name for number in numbers if number in _SIGNALS]


def hold_signals() -> None:
    """Keep requests to stop until ``stop_signals``, on a rank for which others would wait in vain."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


@contextmanager
def stop_signals(*, num_ranks: int = 1) -> Iterator[Stop]:
    """Turn SIGTERM and SIGUSR1 into requests to stop; outside the main thread, do nothing.

    While no thread reads signals, one ends the process at once. But where other ranks would wait for this one
    to join them, it joins them first, so that they hear of the request, too.

    The interpreter runs handlers only between two bytecodes of the main thread, which may be blocked in a
    collective for long. The numbers of signals are therefore also written to a socket, which another thread
    reads (see ``FailureMonitor``).

    Args:
        num_ranks: Number of ranks of the job.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    _let_children_be_ended()
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    old_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    stop = Stop(reader)

    put_off: set[int] = set()

    def handle(number: int, frame: object) -> None:
        if stop.is_watched:
            return
        if num_ranks == 1 or not stop.wait_to_be_watched():
            os._exit(128 + number)
        put_off.add(number)

    old_handlers = {number: signal.signal(number, handle) for number in _SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(old_wakeup)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
        stop.forget_last_resort()
        if not stop._was_watched:
            # This rank will join no other, and who wants it to end, such as its launcher, waits for that.
            for held in put_off:
                signal.raise_signal(held)


def _let_children_be_ended() -> None:
    """Let signals end forked children, such as a reward's own processes, as if there were no handlers."""
    global _is_reset_at_fork
    if not _is_reset_at_fork:
        _is_reset_at_fork = True
        # A signal to a child that has not been reset yet would ask its parent to stop, so it must wait.
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS),
            after_in_child=_reset,
        )


def _reset() -> None:
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class _Launcher:
    """The processes of the launcher that started this one, if it is known.

    ``deepspeed`` is two processes, of which the first neither hands a signal on nor is missed by the second.
    """

    def __init__(self) -> None:
        by_deepspeed = "CROSS_RANK" in os.environ
        self._is_known = by_deepspeed or "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = os.getppid()
        self._grandparent = _parent_of(self._parent) if by_deepspeed else None

    def is_gone(self) -> bool:
        """Return whether one of the processes has ended."""
        if not self._is_known:
            return False
        if os.getppid() != self._parent:
            return True
        return self._grandparent is not None and _parent_of(self._parent) != self._grandparent


def _parent_of(process: int) -> int | None:
    """Return the parent of a process; None if there is no /proc."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name, in brackets, may hold anything; the state and the parent come after it.
    return int(status.rpartition(")")[2].split()[1])
