"""A thread of every rank that ends it when the job cannot go on, or was asked to stop and takes too long.

A rank that waits in a collective for a rank that has failed would wait until the collective's time limit. So
every rank keeps a connection to rank 0 besides. Over it go what a rank fails with, and requests to stop. It
breaks when a process dies, at once, and when its machine is lost, as soon as the kernel's keep-alive notices.
Rank 0 then tells all ranks to end, waits until they have, and prints what happened: once, and last.

Messages are JSON, a line each. Nothing that a rank sends is run or kept.
"""

import json
import logging
import os
import queue
import selectors
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from shardes.distributed.stop import Stop
from shardes.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, StorageError, UserError
from shardes.utils.logs import tell_user

# How often signals and the launcher are looked after when nothing else happens.
_TICK_SECONDS = 0.5
# After the first failure, how long rank 0 waits for news that would explain it: a death is heard of as a
# broken collective on other ranks at the same moment.
_SETTLE_SECONDS = 0.5
# How long rank 0 waits for the others to end before it does.
_LAST_SECONDS = 5.0
# A machine that has been out of reach for so long is given up.
_SILENCE_SECONDS = 60
_MOST_CHARACTERS = 20_000

_KEY = "watch"

logger = logging.getLogger(__name__)

Message = dict[str, Any]


def end_process(status: int) -> None:
    """Ends this process at once, from any thread, with what it has printed."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


class FailureMonitor:
    """The thread of one rank.

    Args:
        rank: This process's.
        world_size: Number of ranks.
        stop: What the job is asked to stop by, and where the trainer looks whether it was.
        stop_seconds: How long members in flight may go on after that.
        timeout_seconds: How long a rank waits for another at most.
        end: Ends the process.
        tell: Prints a message.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        stop: Stop,
        stop_seconds: float,
        timeout_seconds: float,
        end: Callable[[int], None] = end_process,
        tell: Callable[[str], None] = tell_user,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._stop = stop
        self._stop_seconds = stop_seconds
        self._timeout_seconds = timeout_seconds
        self._end_process = end
        self._tell_user = tell
        self._selector = selectors.DefaultSelector()
        # From the main thread, in order: what to do; a byte in the socket says that there is something.
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell, self._bell_rope = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ, self._on_bell)
        if stop.signals is not None:
            self._selector.register(stop.signals, selectors.EVENT_READ, lambda: None)
        self._is_over = False
        # Rank 0 has a connection to each of the others, these one to rank 0.
        self._listener: socket.socket | None = None
        self._token = ""
        self._peers: dict[int, _Connection] = {}
        self._abandon_at: float | None = None
        # Rank 0's: what failed first, who died, and when to make an end.
        self._failure: tuple[int, str] | None = None
        self._dead: list[int] = []
        self._failed: set[int] = set()
        self._decide_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Starts to look after signals."""
        self._stop.is_watched = True
        self._thread.start()

    def connect(self, store: dist.Store, *, host: str) -> None:
        """Connects this rank with rank 0; a collective of all ranks.

        Args:
            store: Of this attempt alone.
            host: Where rank 0 is.

        Raises:
            OSError: Rank 0 cannot be reached.
        """
        if self._rank == 0:
            self._token = uuid.uuid4().hex
            self._listener = _listen(self._world_size)
            port = self._listener.getsockname()[1]
            self._ask(lambda: self._register(self._listener, self._on_connection))
            store.set(_KEY, json.dumps([port, self._token]))
            return
        port, token = json.loads(store.get(_KEY))
        line = socket.create_connection((host, port), timeout=self._timeout_seconds)
        connection = _Connection(line, silence_seconds=min(_SILENCE_SECONDS, self._timeout_seconds))
        connection.send({"is": "here", "rank": self._rank, "token": token})
        self._peers[0] = connection
        self._ask(lambda: self._register(line, lambda: self._on_messages(connection)))

    def report(self, error: BaseException) -> None:
        """Tells the job what this rank fails with; all ranks end, this one too.

        Returns only if this rank is not, or no longer, connected with others.
        """
        if not self._is_over and (self._listener or self._peers):
            self._ask(lambda: self._fail(*_explain(error, self._rank)))
            self._thread.join()

    def close(self) -> None:
        """Leaves: what happens to this rank or others from now on is not this one's business."""
        self._ask(self._leave)
        self._thread.join()
        # A job that stops hears of it again from each launcher on the way.
        self._stop.is_watched = self._stop.is_requested

    # What follows happens in the thread.

    def _ask(self, what: Callable[[], None]) -> None:
        self._requests.put(what)
        self._bell_rope.send(b"!")

    def _on_bell(self) -> None:
        self._bell.recv(4096)
        while not self._requests.empty():
            self._requests.get()()

    def _register(self, line: socket.socket | None, callback: Callable[[], None]) -> None:
        assert line is not None
        self._selector.register(line, selectors.EVENT_READ, callback)

    def _run(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select(timeout=self._patience()):
                key.data()
            self._look_after_signals()
            self._look_at_the_clock()

    def _patience(self) -> float:
        """How long nothing but a message matters."""
        moments = [moment for moment in (self._decide_at, self._abandon_at) if moment is not None]
        return max(0.0, min([_TICK_SECONDS, *(moment - time.monotonic() for moment in moments)]))

    def _look_after_signals(self) -> None:
        asked, is_second = self._stop.take_signals()
        if is_second:
            self._end_process(EXIT_INTERRUPTED)
            self._is_over = True
        elif asked is not None:
            self._tell({"is": "asked", "reason": asked})

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._is_over:
            return
        if self._decide_at is not None and now >= self._decide_at:
            self._end_job(*self._verdict())
        elif self._abandon_at is not None and self._decide_at is None and now >= self._abandon_at:
            self._stop.wait_for_launcher()
            self._end_job(0, self._stop.farewell)

    def _tell(self, message: Message) -> None:
        """Tells rank 0, which may be this one."""
        if self._rank == 0:
            self._hear(0, message)
        elif 0 in self._peers:
            self._peers[0].send(message)
        else:
            # There is nobody to agree with yet, and nothing that could be lost.
            self._is_over = True
            self._end_process(EXIT_INTERRUPTED)

    def _fail(self, status: int, text: str) -> None:
        self._tell({"is": "failed", "status": status, "text": text})

    def _leave(self) -> None:
        for connection in self._peers.values():
            connection.send({"is": "done"})
            connection.close()
        if self._listener is not None:
            self._listener.close()
        self._is_over = True

    # Rank 0's part.

    def _on_connection(self) -> None:
        assert self._listener is not None
        line, _ = self._listener.accept()
        connection = _Connection(line, silence_seconds=min(_SILENCE_SECONDS, self._timeout_seconds))
        self._register(line, lambda: self._on_messages(connection))

    def _hear(self, rank: int, message: Message) -> None:
        """Rank 0 learns something from a rank, or from itself."""
        match message.get("is"):
            case "failed":
                self._failed.add(rank)
                if self._failure is None:
                    self._failure = (int(message["status"]), str(message["text"]))
                self._settle()
            case "asked" if self._stop.reason is None:
                self._ask_to_stop(str(message["reason"]))
            case "done":
                self._forget(self._peers[rank])

    def _ask_to_stop(self, reason: str) -> None:
        """Every rank learns it from rank 0, so that rank 0 knows first."""
        self._stop.reason = reason
        self._abandon_at = time.monotonic() + self._stop_seconds
        if self._rank == 0:
            for connection in self._peers.values():
                connection.send({"is": "asked", "reason": reason})

    def _settle(self) -> None:
        if self._decide_at is None:
            self._decide_at = time.monotonic() + _SETTLE_SECONDS

    def _verdict(self) -> tuple[int, str]:
        """The exit status of all ranks, and what the user is told."""
        if self._dead or self._failure is None:
            ranks = ", ".join(map(str, sorted(self._dead)))
            return EXIT_FAILURE, (
                f"rank(s) {ranks} ended without a word, or cannot be reached: killed, out of memory (see the "
                "kernel's log), or the network or the machine is down. What the run has done is in its "
                "journal: go on with the same command"
            )
        return self._failure

    def _end_job(self, status: int, text: str) -> None:
        """Ends all ranks that can be reached, waits for that, and is the last to speak."""
        if self._rank == 0:
            for connection in self._peers.values():
                connection.send({"is": "end", "status": status})
            deadline = time.monotonic() + _LAST_SECONDS
            while self._peers and (left := deadline - time.monotonic()) > 0:
                for key, _ in self._selector.select(timeout=left):
                    key.data()
                self._stop.take_signals()
            self._tell_user(text)
        self._is_over = True
        self._end_process(status)

    # Every rank's.

    def _on_messages(self, connection: "_Connection") -> None:
        """Takes what has arrived on a connection, its end included."""
        if connection.is_closed:
            return  # by what arrived at the same time
        try:
            for message in connection.receive():
                if connection.rank is not None:
                    self._hear(connection.rank, message)
                elif self._rank == 0:
                    self._admit(connection, message)
                else:
                    self._obey(message)
                if self._is_over or connection.is_closed:
                    return
        except (OSError, EOFError, ValueError):
            self._forget(connection)
            if self._rank != 0:
                self._lost_rank_0()
            elif connection.rank is not None and connection.rank not in self._failed:
                self._dead.append(connection.rank)
                self._settle()

    def _admit(self, connection: "_Connection", message: Message) -> None:
        """A connection's first message says whose it is; others than ranks are sent away."""
        if message.get("token") != self._token:
            raise ValueError("a stranger")
        connection.rank = int(message["rank"])
        self._peers[connection.rank] = connection
        if self._stop.reason is not None:
            connection.send({"is": "asked", "reason": self._stop.reason})

    def _obey(self, message: Message) -> None:
        """What rank 0 says."""
        match message.get("is"):
            case "asked":
                self._ask_to_stop(str(message["reason"]))
                # Rank 0 makes the end; this is for the case that it cannot.
                self._abandon_at = time.monotonic() + self._stop_seconds + _LAST_SECONDS
            case "end":
                if message["status"] == 0:
                    self._stop.wait_for_launcher()
                self._end_process(int(message["status"]))
                self._is_over = True
            case "done":
                self._forget(self._peers[0])

    def _forget(self, connection: "_Connection") -> None:
        self._selector.unregister(connection.line)
        connection.close()
        for rank in [rank for rank, other in self._peers.items() if other is connection]:
            del self._peers[rank]

    def _lost_rank_0(self) -> None:
        """Nobody is left to speak for all; one rank of each machine does."""
        if self._rank == 1 or os.environ.get("LOCAL_RANK") == "0":
            self._dead.append(0)
            self._tell_user(self._verdict()[1])
        self._is_over = True
        self._end_process(EXIT_FAILURE)


class _Connection:
    """One end of a connection between two ranks.

    Args:
        line: A connected socket.
        silence_seconds: How long the other machine may be out of reach.

    Attributes:
        line: The same.
        rank: Whose the other end is, on rank 0, once it has said so.
        is_closed: Whether this end is closed.
    """

    def __init__(self, line: socket.socket, *, silence_seconds: float) -> None:
        self.line = line
        self.rank: int | None = None
        self.is_closed = False
        self._pending = b""
        line.settimeout(10)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seconds = {
            "TCP_KEEPIDLE": max(1, int(silence_seconds / 2)),
            "TCP_KEEPINTVL": max(1, int(silence_seconds / 8)),
        }
        for name, value in seconds.items():
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(socket, "TCP_KEEPCNT"):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)

    def send(self, message: Message) -> None:
        """Sends a message; that the other end is gone shows when one receives."""
        try:
            self.line.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            logger.debug("a message could not be sent: %s", error)

    def receive(self) -> list[Message]:
        """What has arrived; blocks if that is nothing.

        Raises:
            EOFError: The other end has closed.
            ValueError: It speaks otherwise.
            OSError: It cannot be reached.
        """
        data = self.line.recv(65536)
        if not data:
            raise EOFError
        *lines, self._pending = (self._pending + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages

    def close(self) -> None:
        """Closes this end."""
        self.is_closed = True
        self.line.close()


def _listen(backlog: int) -> socket.socket:
    """A socket that takes connections to any of this machine's addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _explain(error: BaseException, rank: int) -> tuple[int, str]:
    """The exit status that an error means, and what the user is told of it."""
    if isinstance(error, UserError):
        return EXIT_USER_ERROR, f"Error: {error}"
    if isinstance(error, StorageError):
        return EXIT_FAILURE, f"Error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted; go on with the same command"
    trace = "".join(traceback.format_exception(error))[-_MOST_CHARACTERS:]
    return EXIT_FAILURE, f"rank {rank} failed:\n{trace}"
