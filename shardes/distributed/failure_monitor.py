"""A thread of every rank that ends it when the job cannot go on, or was asked to stop and takes too long.

A rank that waits in a collective for a rank that has failed would wait until the collective's time limit. So
every rank also keeps a connection to rank 0, over which it sends its failure and requests to stop. The
connection breaks at once when a process dies, and when keep-alive packets find that a machine is lost.
Rank 0 then tells all ranks to end, waits until they have, and prints what happened: once, and last.

Nothing that a rank sends is executed or kept.
"""

import json
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

import torch.distributed as dist

from shardes.distributed.connection import Connection, Message, listen
from shardes.distributed.stop import Stop
from shardes.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, StorageError, UserError
from shardes.utils.logs import tell_user

# Interval at which signals and the launcher are checked when nothing else happens.
_TICK_SECONDS = 0.5
# Seconds that rank 0 waits after the first failure for news that would explain it: when a rank dies, others
# report a broken collective at the same moment.
_SETTLE_SECONDS = 0.5
# Seconds that rank 0 waits for the others to end before it does.
_LAST_SECONDS = 5.0
# A machine that has been out of reach for so long is given up.
_SILENCE_SECONDS = 60
_MOST_CHARACTERS = 20_000

_KEY = "watch"


def end_process(status: int) -> None:
    """Flush the output and end this process at once, from any thread."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


class FailureMonitor:
    """The thread of one rank.

    Args:
        rank: Index of this process.
        world_size: Number of ranks.
        stop: Requests to stop, which the trainer reads too.
        stop_seconds: Seconds that members in flight may go on after such a request.
        timeout_seconds: Most seconds that a rank waits for another.
        end: Function that ends the process with an exit status.
        tell: Function that prints a message.
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
        self._peers: dict[int, Connection] = {}
        self._abandon_at: float | None = None
        # Rank 0's: what failed first, who died, and when to make an end.
        self._failure: tuple[int, str] | None = None
        self._dead: list[int] = []
        self._failed: set[int] = set()
        self._decide_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start the thread, which then reads signals."""
        self._stop.is_watched = True
        self._thread.start()

    def connect(self, store: dist.Store, *, host: str) -> None:
        """Connect this rank with rank 0; a collective of all ranks.

        Args:
            store: Store of this attempt alone.
            host: Host of rank 0.

        Raises:
            OSError: Rank 0 cannot be reached.
        """
        if self._rank == 0:
            self._token = uuid.uuid4().hex
            self._listener = listen(self._world_size)
            port = self._listener.getsockname()[1]
            self._ask(lambda: self._register(self._listener, self._on_connection))
            store.set(_KEY, json.dumps([port, self._token]))
            return
        port, token = json.loads(store.get(_KEY))
        line = socket.create_connection((host, port), timeout=self._timeout_seconds)
        connection = Connection(line, silence_seconds=min(_SILENCE_SECONDS, self._timeout_seconds))
        connection.send({"is": "here", "rank": self._rank, "token": token})
        self._peers[0] = connection
        self._ask(lambda: self._register(line, lambda: self._on_messages(connection)))

    def report(self, error: BaseException) -> None:
        """Report this rank's failure to the job, after which all ranks end, this one too.

        Returns only if this rank is not, or no longer, connected with others.
        """
        if not self._is_over and (self._listener or self._peers):
            status, text = _explain(error, self._rank)
            self._ask(lambda: self._tell({"is": "failed", "status": status, "text": text}))
            self._thread.join()

    def close(self) -> None:
        """Leave the job: failures of this rank or others from now on are not reported."""
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
        """Return the seconds until something else than a message must be handled."""
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
        """Send a message to rank 0, which may be this rank."""
        if self._rank == 0:
            self._hear(0, message)
        elif 0 in self._peers:
            self._peers[0].send(message)
        else:
            # There is nobody to agree with yet, and nothing that could be lost.
            self._is_over = True
            self._end_process(EXIT_INTERRUPTED)

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
        connection = Connection(line, silence_seconds=min(_SILENCE_SECONDS, self._timeout_seconds))
        self._register(line, lambda: self._on_messages(connection))

    def _hear(self, rank: int, message: Message) -> None:
        """Handle a message from a rank on rank 0, or from rank 0 itself."""
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
        """Record a request to stop; rank 0 records it first, and tells the others."""
        self._stop.reason = reason
        self._abandon_at = time.monotonic() + self._stop_seconds
        if self._rank == 0:
            for connection in self._peers.values():
                connection.send({"is": "asked", "reason": reason})

    def _settle(self) -> None:
        if self._decide_at is None:
            self._decide_at = time.monotonic() + _SETTLE_SECONDS

    def _verdict(self) -> tuple[int, str]:
        """Return the exit status of all ranks, and the message for the user."""
        if self._dead or self._failure is None:
            ranks = ", ".join(map(str, sorted(self._dead)))
            return EXIT_FAILURE, (
                f"rank(s) {ranks} ended without a word, or cannot be reached: killed, out of memory (see the "
                "kernel's log), or the network or the machine is down. What the run has done is in its "
                "journal: go on with the same command"
            )
        return self._failure

    def _end_job(self, status: int, text: str) -> None:
        """End all ranks that can be reached; rank 0 ends last, and prints the message."""
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

    def _on_messages(self, connection: Connection) -> None:
        """Handle the messages that have arrived on a connection, and its end."""
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

    def _admit(self, connection: Connection, message: Message) -> None:
        """Learn from a connection's first message which rank it belongs to.

        Raises:
            ValueError: The message is not from a rank of this job.
        """
        if message.get("token") != self._token:
            raise ValueError("a stranger")
        connection.rank = int(message["rank"])
        self._peers[connection.rank] = connection
        if self._stop.reason is not None:
            connection.send({"is": "asked", "reason": self._stop.reason})

    def _obey(self, message: Message) -> None:
        """Handle a message from rank 0."""
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

    def _forget(self, connection: Connection) -> None:
        self._selector.unregister(connection.line)
        connection.close()
        for rank in [rank for rank, other in self._peers.items() if other is connection]:
            del self._peers[rank]

    def _lost_rank_0(self) -> None:
        """End this rank after the loss of rank 0; one rank of each machine prints a message."""
        if self._rank == 1 or os.environ.get("LOCAL_RANK") == "0":
            self._dead.append(0)
            self._tell_user(self._verdict()[1])
        self._is_over = True
        self._end_process(EXIT_FAILURE)


def _explain(error: BaseException, rank: int) -> tuple[int, str]:
    """Return the exit status of an error, and the message for the user."""
    if isinstance(error, UserError):
        return EXIT_USER_ERROR, f"Error: {error}"
    if isinstance(error, StorageError):
        return EXIT_FAILURE, f"Error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted; go on with the same command"
    trace = "".join(traceback.format_exception(error))[-_MOST_CHARACTERS:]
    return EXIT_FAILURE, f"rank {rank} failed:\n{trace}"
