"""Fork server of the reward processes, and the loop of a worker.

It is started as a fresh interpreter before the training process has threads, an accelerator or a process
group, so nothing of these reaches a worker, and a new worker takes milliseconds. It runs nothing but this
module, and in workers the function that serves the pool: here that of rewards, or another one's of
environments. Over its socket it takes single-letter commands: ``f`` with a socket: fork a worker that serves
it, and answer with its process id; ``k`` and a process id: kill that worker and all that it started, and
answer with how it ended; ``i``: say why workers are not isolated, or ``-``. When the socket closes, or its
parent dies, it kills all workers and ends.
"""

import contextlib
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from shardes.rewards.descendants import adopt_orphans, descendants, end_all, end_with_parent, reap
from shardes.rewards.isolation import run_isolated, why_not_isolated
from shardes.rewards.leftovers import ProcessState
from shardes.rewards.output import LimitedLog
from shardes.rewards.worker import RewardCaller
from shardes.utils.references import load_class

HEADER = struct.Struct("!Q")
"""The length of a message, before each message between a worker and its pool."""

# How long an isolated worker may take to end with all that it has started.
_END_SECONDS = 5.0


def main(descriptor: int, memory_bytes: int, parent: int, may_isolate: int = 0, *, serve: str = "") -> None:
    """Serve the pool until it goes away.

    Args:
        descriptor: File descriptor of the socket to the pool.
        memory_bytes: Address space of a worker; 0: no limit.
        parent: The process that has the pool.
        may_isolate: 1: workers are isolated where the kernel allows it.
        serve: The function that a worker calls with its socket, as ``module:function``; empty: it judges
            completions.
    """
    signal.signal(signal.SIGTERM, _leave)
    end_with_parent(signal.SIGTERM)
    adopt_orphans()
    control, serve_pool = socket.socket(fileno=descriptor), load_class(serve) if serve else serve_rewards
    server = _Server(control, memory_bytes, may_isolate=bool(may_isolate), serve=serve_pool)
    try:
        try:
            with contextlib.suppress(ConnectionError):  # a pool that died may have left a reply unread
                server.serve(parent)
        finally:
            # A parent that dies closes the socket a moment before it has the signal sent.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        server.close()


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """End the fork server on a signal, the first time."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit()


class _Server:
    """State of the fork server.

    Args:
        control: Socket to the pool.
        memory_bytes: Address space of a worker; 0: no limit.
        may_isolate: Isolates workers where the kernel allows it.
        serve: Called by a worker with its socket to the pool.
    """

    def __init__(
        self,
        control: socket.socket,
        memory_bytes: int,
        *,
        may_isolate: bool,
        serve: Callable[[socket.socket], None],
    ) -> None:
        self._control = control
        self._serve_pool = serve
        self._memory_bytes = memory_bytes
        self._obstacle = why_not_isolated() if may_isolate else "task.reward_isolation is none"
        self._workers: set[int] = set()
        # How workers ended that nobody has asked for yet.
        self._codes: dict[int, int] = {}
        # What they print.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        who = "rewards" if serve is serve_rewards else "environments"
        self._log = LimitedLog(sys.stderr.fileno(), who=who)

    def serve(self, parent: int) -> None:
        """Obey commands until the pool goes away, and copy what workers print."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._reader, select.POLLIN)
        while os.getppid() == parent:
            ready = dict(poll.poll())
            if self._reader in ready:
                self._copy()
            if self._control.fileno() not in ready:
                continue
            message, descriptors, _, _ = socket.recv_fds(self._control, 64, 1)
            if not message:
                return
            self._control.send(self._obey(message, descriptors).encode())

    def _obey(self, message: bytes, descriptors: list[int]) -> str:
        match message[:1]:
            case b"f":
                return str(self._fork(descriptors[0]))
            case b"k":
                return str(self._end(int(message[1:])))
            case _:
                return self._obstacle or "-"

    def _copy(self) -> bool:
        """Copy some of what workers have printed; return False if there is nothing."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._reader, 1 << 16)
            self._log.write(data)
            return bool(data)
        return False

    def _fork(self, descriptor: int) -> int:
        # A worker has this process's handlers until it sets its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        pid = os.fork()
        if pid == 0:
            self._become_worker(descriptor)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.close(descriptor)
        self._workers.add(pid)
        self._codes.pop(pid, None)  # of a process that had the number before
        return pid

    def _become_worker(self, descriptor: int) -> NoReturn:
        try:
            self._control.close()
            os.close(self._reader)
            # What a reward prints must not mix with what the program prints.
            os.dup2(self._writer, 1)
            os.dup2(self._writer, 2)
            os.close(self._writer)
            connection = socket.socket(fileno=descriptor)
            if self._obstacle is None:
                run_isolated(lambda: self._work(connection), close=connection.close)
            self._work(connection)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)

    def _work(self, connection: socket.socket) -> NoReturn:
        _work(connection, self._memory_bytes, self._serve_pool)

    def _end(self, pid: int) -> int:
        """Kill a worker and all that it started; return the exit code, or minus the signal, it ended with."""
        if pid not in self._workers:
            return 0
        self._workers.discard(pid)
        # Not waited for yet, a dead worker keeps its id: no other process can have it.
        self._end_isolated({pid} - set(self._codes))
        # An orphan's new parent is this process.
        end_all(lambda: descendants(without=self._workers), self._codes)
        code = self._codes.pop(pid, -signal.SIGKILL)
        self._codes = {each: code for each, code in self._codes.items() if each in self._workers}
        return code

    def _end_isolated(self, pids: set[int]) -> None:
        """Have isolated workers end with all that they have started, or fail to."""
        if self._obstacle is not None:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _END_SECONDS
        while not pids <= set(self._codes) and time.monotonic() < deadline:
            reap(self._codes)
            time.sleep(0.001)

    def close(self) -> None:
        """Kill all workers, and copy the last of what they have printed."""
        self._end_isolated(self._workers - set(self._codes))
        end_all(descendants, self._codes)
        os.close(self._writer)
        while self._copy():
            pass
        self._log.close()


# Has an item in a worker, and in what it forks.
_WORKERS: set[int] = set()


def is_worker() -> bool:
    """Return whether this process is a worker."""
    return bool(_WORKERS)


def _work(connection: socket.socket, memory_bytes: int, serve: Callable[[socket.socket], None]) -> NoReturn:
    """Run a worker from its fork to its exit."""
    status, process = 1, os.getpid()
    _WORKERS.add(process)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        end_with_parent(signal.SIGKILL)
        adopt_orphans()
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        # A child must never answer, and must not keep the pool from seeing that its parent has ended.
        os.register_at_fork(after_in_child=connection.close)
        serve(connection)
        status = 0
    except (EOFError, ConnectionError):  # an error, if the pool died and left a reply unread
        status = 0
    except BaseException:
        if os.getpid() == process:  # else a child of the import, which has come back here and cannot answer
            sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def serve_rewards(connection: socket.socket) -> None:
    """Import the rewards, report an error or none, and judge batches until the pool goes away."""
    number, setup = receive(connection)
    try:
        caller = RewardCaller(setup)
    except ValueError as error:
        send(connection, {"id": number, "error": str(error)})
        return
    state = ProcessState()
    state.restore()  # an alarm that the import has set must not end the first call
    caller.after_call = state.restore
    send(connection, {"id": number, "error": None, "columns": caller.columns})
    while True:
        number, question = receive(connection)
        output = caller.judge(*question)
        state.restore()
        left = state.left
        if (output.first_failure or "").startswith("MemoryError"):
            left = left or "too little memory"  # which an earlier call may have filled
        send(connection, vars(output) | {"id": number, "left": left})


def receive(connection: socket.socket) -> tuple[int, Any]:
    """Receive the pool's next request: its id, and what is asked.

    The training process made it, so it may be unpickled.
    """
    (length,) = HEADER.unpack(_read(connection, HEADER.size))
    request: tuple[int, Any] = pickle.loads(_read(connection, length))
    return request


def _read(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data


def send(connection: socket.socket, message: Any) -> None:
    """Send the pool a reply, as JSON."""
    payload = json.dumps(message).encode()
    connection.sendall(HEADER.pack(len(payload)) + payload)
