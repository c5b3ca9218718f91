"""A thread of every rank that ends it when the job cannot go on, or was asked to stop and takes too long.

A rank that waits in a collective for a rank that has failed would wait until the collective's time limit. So
every rank also keeps a connection to rank 0, over which it sends its failure and requests to stop. The
connection breaks at once when a process dies, and when keep-alive packets find that a machine is lost. Over
it each end gives signs of life, so that a process that is there but does not run is found as well: nothing
that this thread does waits for another rank, and so it ends its own even where that waits for a frozen one.
Rank 0 then tells all ranks to end, waits until they have, and prints what happened: once, and last.

Nothing that a rank sends is executed or kept.
"""

import os
import queue
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Callable

from shardes.distributed.connection import Connection, Message, listen, rank_of, silence_of
from shardes.distributed.ending import end_process, explain
from shardes.distributed.losses import Losses
from shardes.distributed.silence import Silence
from shardes.distributed.stop import Stop
from shardes.errors import EXIT_FAILURE, EXIT_INTERRUPTED, UserError
from shardes.utils.logs import tell_user

# Interval at which signals and the launcher are checked when nothing else happens.
_TICK_SECONDS = 0.5
# Seconds that rank 0 waits after the first failure for news that would explain it: when a rank dies, others
# report a broken collective at the same moment.
_SETTLE_SECONDS = 0.5
# Seconds that rank 0 waits for the others to end before it does.
_LAST_SECONDS = 5.0
# Seconds that a rank which has failed waits for rank 0 to make the end, and one that was asked to stop before
# it had met the others for an opportunity to say so.
_ANSWER_SECONDS = 10.0


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
        self._silence = Silence(timeout_seconds)
        self._beat_at = 0.0
        self._abandon_at: float | None = None
        # While the ranks meet: when this must be over, and what is told if it is not.
        self._meet_by: tuple[float, str] | None = None
        # A rank that has met nobody yet was asked to stop by this.
        self._untold: Message | None = None
        # This rank has failed, and rank 0 has until then to make an end.
        self._own_failure: tuple[float, int, str] | None = None
        # What has happened to ranks (on others than rank 0: to it alone), and when to make an end for it.
        self._losses = Losses(self._silence)
        self._decide_at: float | None = None
        # Rank 0's: the ranks that have come, and whether these are all.
        self._here = {0}
        self._is_complete = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start the thread, which then reads signals."""
        self._stop.watch()
        self._thread.start()

    def meet_within(self, seconds: float, words: str) -> None:
        """End this process with some words if it has not met the others in time, whatever it waits for."""
        self._ask(lambda: setattr(self, "_meet_by", (time.monotonic() + seconds, words)))

    def open(self) -> tuple[int, str]:
        """Let other ranks connect with this one, which is rank 0; return the port, and a token to show."""
        self._token = uuid.uuid4().hex
        self._listener = listen(self._world_size)
        self._ask(lambda: self._register(self._listener, self._on_connection))
        return self._listener.getsockname()[1], self._token

    def wait_for_all(self, seconds: float) -> list[int]:
        """Wait for all ranks to connect with this one; return those that have not."""
        self._is_complete.wait(seconds)
        return sorted(set(range(self._world_size)) - self._here)

    def join(self, connection: Connection, messages: list[Message]) -> None:
        """Watch over a connection with rank 0, by ``call``, and handle what came over it already."""
        is_joined = threading.Event()

        def join() -> None:
            self._join(connection, messages)
            is_joined.set()

        self._ask(join)
        # What came over the connection may have ended the job, and the thread with it.
        while self._thread.is_alive() and not is_joined.wait(_TICK_SECONDS):
            pass

    def report(self, error: BaseException) -> None:
        """Report this rank's failure to the job, after which all ranks end, this one too.

        Returns only if this rank is not, or no longer, connected with others.
        """
        if not self._is_over and (self._listener or self._peers):
            status, text = explain(error, self._rank)
            self._ask(lambda: self._tell({"is": "failed", "status": status, "text": text}))
            self._thread.join()

    def close(self) -> None:
        """Leave the job: failures of this rank or others from now on are not reported."""
        self._ask(self._leave)
        self._thread.join()
        # A job that stops hears of it again from each launcher on the way.
        self._stop.is_watched = self._stop.is_requested

    def _ask(self, what: Callable[[], None]) -> None:
        self._requests.put(what)
        self._bell_rope.send(b"!")

    # What follows happens in the thread.

    def _join(self, connection: Connection, messages: list[Message]) -> None:
        self._peers[0] = connection
        self._silence.heard(0)
        self._meet_by = None
        self._register(connection.line, lambda: self._on_messages(connection))
        if self._untold is not None:
            connection.send(self._untold | {"is_early": True})
            self._untold = self._abandon_at = None
        for message in messages:
            self._obey(message)

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
            self._look_after_peers()
            self._look_after_signals()
            self._look_at_the_clock()

    def _patience(self) -> float:
        """Return the seconds until something else than a message must be handled."""
        moments = [moment for moment in (self._decide_at, self._abandon_at) if moment is not None]
        return max(0.0, min([_TICK_SECONDS, *(moment - time.monotonic() for moment in moments)]))

    def _look_after_peers(self) -> None:
        """Give signs of life, and notice who gives none."""
        self._silence.look()
        now = time.monotonic()
        is_due = now >= self._beat_at
        if is_due:
            self._beat_at = now + self._silence.beat_seconds
        for connection in self._peers.values():
            connection.beat() if is_due else connection.flush()
        if self._is_over or not self._silence.frozen(self._peers):
            return
        if self._rank == 0:
            self._settle()
        else:
            self._lost_rank_0(self._silence.described([0]))

    def _look_after_signals(self) -> None:
        asked, is_second = self._stop.take_signals()
        if is_second:
            self._end_alone(EXIT_INTERRUPTED)
        elif asked is not None:
            self._tell({"is": "asked", "reason": asked})

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._is_over:
            return
        if self._decide_at is not None and now >= self._decide_at:
            self._end_job(*self._losses.verdict(self._peers))
        elif self._own_failure is not None and now >= self._own_failure[0]:
            # Rank 0 does not make an end, and it may be why.
            _, status, text = self._own_failure
            suspects = self._silence.suspects(self._peers)
            self._end_alone(status, self._silence.described(suspects) if suspects else text)
        elif self._meet_by is not None and now >= self._meet_by[0]:
            self._end_alone(EXIT_FAILURE, self._meet_by[1])
        elif self._untold is not None and self._abandon_at is not None and now >= self._abandon_at:
            self._end_alone(EXIT_INTERRUPTED)
        elif self._abandon_at is not None and self._decide_at is None and now >= self._abandon_at:
            self._stop.wait_for_launcher()
            self._end_job(0, self._stop.farewell)

    def _end_alone(self, status: int, text: str = "") -> None:
        """End this rank without rank 0, which cannot be reached."""
        if text:
            self._tell_user(text)
        self._end_process(status)
        self._is_over = True

    def _tell(self, message: Message) -> None:
        """Send a message to rank 0, which may be this rank."""
        if self._rank == 0:
            self._hear(0, message)
        elif 0 in self._peers:
            self._peers[0].send(message)
            if message["is"] == "failed":
                self._own_failure = (time.monotonic() + _ANSWER_SECONDS, message["status"], message["text"])
        else:
            # There is nobody to agree with yet. Were this rank simply to end, the others would wait for it.
            self._untold = message
            self._abandon_at = time.monotonic() + min(self._stop_seconds, _ANSWER_SECONDS)

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
        connection = Connection(line, silence_seconds=silence_of(self._timeout_seconds))
        self._register(line, lambda: self._on_messages(connection))

    def _hear(self, rank: int, message: Message) -> None:
        """Handle a message from a rank on rank 0, or from rank 0 itself."""
        match message.get("is"):
            case "failed":
                self._losses.fail(rank, status=int(message["status"]), text=str(message["text"]))
                self._settle()
            case "asked" if self._stop.reason is None:
                self._ask_to_stop(str(message["reason"]))
                if message.get("is_early"):
                    self._stop_early()
            case "done":
                self._forget(self._peers[rank])

    def _ask_to_stop(self, reason: str) -> None:
        """Record a request to stop; rank 0 records it first, and tells the others."""
        self._stop.reason = reason
        self._abandon_at = time.monotonic() + self._stop_seconds
        if self._rank == 0:
            for connection in self._peers.values():
                connection.send({"is": "asked", "reason": reason})

    def _stop_early(self) -> None:
        """Stop a job with nothing in flight, once all are here: who came later would find nobody."""
        if self._is_complete.is_set():
            self._abandon_at = time.monotonic()

    def _settle(self) -> None:
        if self._decide_at is None:
            self._decide_at = time.monotonic() + _SETTLE_SECONDS

    def _end_job(self, status: int, text: str) -> None:
        """End all ranks that can be reached; rank 0 ends last, and prints the message."""
        if self._rank == 0:
            for connection in self._peers.values():
                connection.send({"is": "end", "status": status})
            deadline = time.monotonic() + _LAST_SECONDS
            # Who does not run now reads it when it does.
            frozen = {*self._silence.doubtful(self._peers)}
            while self._peers.keys() - frozen and (left := deadline - time.monotonic()) > 0:
                for key, _ in self._selector.select(timeout=min(left, _TICK_SECONDS)):
                    key.data()
                for connection in self._peers.values():
                    connection.flush()
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
                self._silence.heard(0 if connection.rank is None else connection.rank)
                if message.get("is") == "alive":
                    continue
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
            elif connection.rank is not None and self._losses.die(connection.rank):
                self._settle()

    def _admit(self, connection: Connection, message: Message) -> None:
        """Learn from a connection's first message which rank it belongs to.

        Raises:
            ValueError: The message is not from a rank of this job.
        """
        try:
            rank = rank_of(message, token=self._token, world_size=self._world_size)
        except UserError as error:
            connection.send({"is": "refused", "text": str(error)})
            status, text = explain(error, self._rank)
            self._hear(0, {"is": "failed", "status": status, "text": text})
            raise ValueError("no rank of this job") from None
        if rank in self._here:
            raise ValueError("there is such a rank already")
        connection.rank = rank
        self._here.add(rank)
        self._peers[rank] = connection
        self._silence.heard(rank)
        connection.send({"is": "welcome"})
        if len(self._here) == self._world_size:
            self._meet_by = None
            self._is_complete.set()
        if self._stop.reason is not None:
            connection.send({"is": "asked", "reason": self._stop.reason})
            self._stop_early()

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
                self._end_alone(int(message["status"]))
            case "done":
                self._forget(self._peers[0])

    def _forget(self, connection: Connection) -> None:
        self._selector.unregister(connection.line)
        connection.close()
        for rank in [rank for rank, other in self._peers.items() if other is connection]:
            del self._peers[rank]

    def _lost_rank_0(self, words: str | None = None) -> None:
        """End this rank after the loss of rank 0; one rank of each machine prints a message."""
        if words is None:
            self._losses.die(0)
            words = self._losses.verdict(())[1]
        else:
            # Should rank 0 run again, it learns why it is alone.
            self._peers[0].send({"is": "failed", "status": EXIT_FAILURE, "text": words})
        is_speaker = self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"
        self._end_alone(EXIT_FAILURE, words if is_speaker else "")
