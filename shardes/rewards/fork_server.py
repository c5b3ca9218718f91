"""Fork server of the reward processes, and the loop of a worker.

It is started as a fresh interpreter before the training process has threads, an accelerator or a process
group, so nothing of these reaches a worker, and a new worker takes milliseconds. It runs nothing but this
module. Over its socket it takes single-letter commands: ``f`` with a socket: fork a worker that serves it,
and answer with its process id; ``k`` and a process id: kill that worker and all that it started, and answer
with how it ended. When the socket closes, or its parent dies, it kills all workers and ends.
"""

import contextlib
import ctypes
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from types import FrameType
from typing import Any, NoReturn

from shardes.rewards.worker import RewardCaller

_PR_SET_PDEATHSIG = 1
HEADER = struct.Struct("!Q")
"""The length of a message, before each message between a worker and its pool."""


def main(descriptor: int, memory_bytes: int, parent: int) -> None:
    """Serve the pool until it goes away.

    Args:
        descriptor: File descriptor of the socket to the pool.
        memory_bytes: Address space of a worker; 0: no limit.
        parent: The process that has the pool.
    """
    signal.signal(signal.SIGTERM, _leave)
    _end_with_parent(signal.SIGTERM)
    workers: set[int] = set()
    try:
        try:
            with contextlib.suppress(ConnectionError):  # a pool that died may have left a reply unread
                _obey(socket.socket(fileno=descriptor), workers, memory_bytes, parent)
        finally:
            # A parent that dies closes the socket a moment before it has the signal sent.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        for pid in workers:
            _end(pid)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """End the fork server on a signal, the first time."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit()


def _obey(control: socket.socket, workers: set[int], memory_bytes: int, parent: int) -> None:
    """Obey commands until the pool goes away; ``workers`` holds the process ids of those alive."""
    while os.getppid() == parent:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        if message[:1] == b"f":
            pid = os.fork()
            if pid == 0:
                control.close()
                _work(socket.socket(fileno=descriptors[0]), memory_bytes)
            os.close(descriptors[0])
            workers.add(pid)
            control.send(str(pid).encode())
        else:
            pid = int(message[1:])
            code = _end(pid) if pid in workers else 0
            workers.discard(pid)
            control.send(str(code).encode())


def _end(pid: int) -> int:
    """Kill a worker's process group; return the exit code, or minus the signal, that it had ended with."""
    # Not waited for yet, a dead worker keeps its id: no other process can have it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it may not have made its group yet
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _end_with_parent(number: signal.Signals) -> None:
    """Have this process sent a signal when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _work(connection: socket.socket, memory_bytes: int) -> NoReturn:
    """Run a worker from its fork to its exit."""
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        _end_with_parent(signal.SIGKILL)
        os.dup2(2, 1)  # what a reward prints must not mix with what the program prints
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        _serve(connection)
        status = 0
    except (EOFError, ConnectionError):  # an error, if the pool died and left a reply unread
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(connection: socket.socket) -> None:
    """Import the rewards, report an error or none, and judge batches until the pool goes away."""
    try:
        caller = RewardCaller(_receive(connection))
    except ValueError as error:
        _send(connection, {"error": str(error)})
        return
    _send(connection, {"error": None})
    while True:
        _send(connection, vars(caller.judge(*_receive(connection))))


def _receive(connection: socket.socket) -> Any:
    """Receive the pool's next message. The training process made it, so it may be unpickled."""
    (length,) = HEADER.unpack(_read(connection, HEADER.size))
    return pickle.loads(_read(connection, length))


def _read(connection: socket.socket, length: int) -> bytes:
    parts, left = [], length
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _send(connection: socket.socket, message: Any) -> None:
    payload = json.dumps(message).encode()
    connection.sendall(HEADER.pack(len(payload)) + payload)
