"""Handles of the fork server and of its workers, in the process that has the pool."""

import asyncio
import itertools
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardes.rewards.batch import RewardOutput
from shardes.rewards.fork_server import HEADER, is_worker
from shardes.rewards.worker import MAX_REWARD

# How long the fork server may take to fork or to kill.
_FORK_SERVER_SECONDS = 60.0
# No reply is larger; a longer one is not read.
MAX_REPLY_BYTES = 1 << 26

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from shardes.rewards.fork_server import main; main(*map(int, sys.argv[3:]), serve=sys.argv[2])"
)


class ForkServer:
    """Handle of the fork server, for the pool; see ``fork_server.main``.

    Raises:
        RuntimeError: This is a worker, which would have workers that have workers, and so on.
    """

    def __init__(self, memory_bytes: int | None, *, may_isolate: bool = False, serve: str = "") -> None:
        if is_worker():
            raise RuntimeError(
                "it begins to train when it is imported; put that below: if __name__ == '__main__':"
            )
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_FORK_SERVER_SECONDS)
        numbers = [theirs.fileno(), memory_bytes or 0, os.getpid(), int(may_isolate)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), serve, *map(str, numbers)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # Sets of strings have one order in all workers: what is drawn from one is the same in each.
                env={"PYTHONHASHSEED": "0", **os.environ},
            )

    def fork(self) -> tuple[int, socket.socket]:
        """Fork a worker; return its process id, and the socket to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            return self._reply(), ours

    def kill(self, pid: int) -> int:
        """End a worker; return the exit code, or minus the signal, that it ended with."""
        self._control.send(f"k{pid}".encode())
        return self._reply()

    def obstacle(self) -> str | None:
        """Return why workers can see other processes than their own; None if they cannot."""
        self._control.send(b"i")
        reply = self._reply_text()
        return None if reply == "-" else reply

    def _reply(self) -> int:
        return int(self._reply_text())

    def _reply_text(self) -> str:
        reply = self._control.recv(256)
        if not reply:
            raise ConnectionError("the process that starts reward processes is gone")
        return reply.decode().strip()

    def close(self) -> None:
        """End the fork server, and every worker with it."""
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class WorkerProcess:
    """A worker, and the connection to it.

    Attributes:
        pid: Its process id.
        reader: The end of the socket at which its replies arrive.
        writer: The end at which it is sent messages.
        num_asked: Number of requests so far; the id of the last one.
    """

    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    num_asked: int = 0

    async def ask(self, message: Any) -> dict[str, Any]:
        """Send a message and read the reply to it.

        Raises:
            EOFError, OSError: The worker has ended.
            ValueError: The message cannot be sent, or the reply is none.
        """
        self.num_asked += 1
        try:
            payload = pickle.dumps((self.num_asked, message))
        except Exception as error:  # an object's own methods may raise anything
            raise ValueError(f"a column cannot be sent to it ({type(error).__name__}: {error})") from None
        self.writer.write(HEADER.pack(len(payload)))
        self.writer.write(payload)
        await self.writer.drain()
        while True:
            reply = await self._receive()
            number = reply.get("id") if isinstance(reply, dict) else None
            if number == self.num_asked:
                return reply
            # Replies to earlier requests are late: somebody else than the worker has sent them.
            if not isinstance(number, int) or not 0 < number < self.num_asked:
                raise ValueError("a reply to nothing that was asked")

    async def _receive(self) -> Any:
        (length,) = HEADER.unpack(await self.reader.readexactly(HEADER.size))
        if length > MAX_REPLY_BYTES:
            raise ValueError(f"a reply of {length} bytes")
        return json.loads(await self.reader.readexactly(length))


def ending(code: int) -> str:
    """Describe how a process ended, from its exit code or minus its signal."""
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def read_reply(reply: Any, names: Sequence[str], num_completions: int) -> RewardOutput:
    """Check a worker's reply, which a reward may have forged, and return what it says.

    Raises:
        ValueError, TypeError, KeyError: It is not what a worker sends.
    """
    components = {name: list(reply["components"][name]) for name in names}
    output = RewardOutput(components, list(map(bool, reply["has_failed"])), reply["first_failure"])
    if {len(column) for column in (*components.values(), output.has_failed)} != {num_completions}:
        raise ValueError("a reply of the wrong size")
    values = itertools.chain.from_iterable(components.values())
    if not all(value is None or (isinstance(value, float) and abs(value) < MAX_REWARD) for value in values):
        raise ValueError("a reply that is not made of numbers")
    if not isinstance(output.first_failure, str | None):
        raise TypeError("a reply whose message is no text")
    return output
