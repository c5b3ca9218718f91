"""Connections between ranks besides the process group: messages in JSON, a line each, over a socket."""

import json
import logging
import select
import socket
import time
from typing import Any

from shardes.errors import UserError
from shardes.utils.reading import parse_json

logger = logging.getLogger(__name__)

Message = dict[str, Any]

_MOST_BYTES = 1 << 20
# A machine that has been out of reach for so long is given up.
_SILENCE_SECONDS = 60.0


class Connection:
    """One end of a connection between two ranks. Nothing waits for the other end, which may be frozen.

    Args:
        line: A connected socket.
        silence_seconds: Seconds that the other machine may be out of reach.

    Attributes:
        line: Argument ``line``.
        rank: On rank 0, the rank at the other end; None before its first message, and on other ranks.
        is_closed: Whether this end is closed.
    """

    def __init__(self, line: socket.socket, *, silence_seconds: float) -> None:
        self.line = line
        self.rank: int | None = None
        self.is_closed = False
        self._pending = b""
        self._outgoing = b""
        line.setblocking(False)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        options = {
            "TCP_KEEPCNT": 4,
            "TCP_KEEPIDLE": max(1, int(silence_seconds / 2)),
            "TCP_KEEPINTVL": max(1, int(silence_seconds / 8)),
        }
        for name, value in options.items():
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Message) -> None:
        """Send a message; an error is only logged, since ``receive`` notices that the other end is gone."""
        self._outgoing += json.dumps(message).encode() + b"\n"
        self.flush()

    def beat(self) -> None:
        """Send a sign of life, unless the other end has not even taken what was sent before."""
        if not self._outgoing:
            self.send({"is": "alive"})

    def flush(self) -> None:
        """Send as much as the other end takes of what is still to be sent."""
        try:
            while self._outgoing and not self.is_closed:
                self._outgoing = self._outgoing[self.line.send(self._outgoing) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._outgoing = b""
            logger.debug("a message could not be sent: %s", error)

    def receive(self) -> list[Message]:
        """Return the messages that have arrived, none if none has.

        Raises:
            EOFError: The other end has closed.
            ValueError: It sent something else than messages.
            OSError: It cannot be reached.
        """
        try:
            data = self.line.recv(65536)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > _MOST_BYTES:
            raise ValueError("too long for a message")
        messages = [parse_json(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages

    def close(self) -> None:
        """Close this end."""
        self.is_closed = True
        self.line.close()


def silence_of(timeout_seconds: float) -> float:
    """Return the seconds that a machine may be out of reach where ranks wait so long for each other."""
    return min(_SILENCE_SECONDS, timeout_seconds)


def listen(backlog: int) -> socket.socket:
    """Open a socket that accepts connections to any of this machine's addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def call(
    address: tuple[str, int],
    *,
    rank: int,
    world_size: int,
    token: str,
    seconds: float,
    silence_seconds: float,
) -> tuple[Connection, list[Message]]:
    """Connect a rank with rank 0.

    Args:
        address: Host and port of rank 0.
        rank: Index of this process.
        world_size: Number of ranks.
        token: Text that rank 0 must be shown.
        seconds: Most seconds that this may take.
        silence_seconds: Seconds that the other machine may be out of reach.

    Returns:
        The connection, and messages that came with the answer.

    Raises:
        OSError: Nobody answers there.
        ValueError: Who answers is not the rank 0 that this rank looks for.
        UserError: It is, but this rank does not fit into its job.
    """
    deadline = time.monotonic() + seconds
    line = socket.create_connection(address, timeout=seconds)
    connection = Connection(line, silence_seconds=silence_seconds)
    try:
        connection.send({"is": "here", "rank": rank, "token": token, "world_size": world_size})
        messages: list[Message] = []
        while not messages:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([line], [], [], left)[0]:
                raise TimeoutError("no answer")
            messages = connection.receive()
        answer, *more = messages
        if answer.get("is") == "refused":
            raise UserError(str(answer.get("text")))
        if answer.get("is") != "welcome":
            raise ValueError("not rank 0")
    except EOFError:
        connection.close()
        raise ValueError("not the rank 0 of this attempt") from None
    except BaseException:
        connection.close()
        raise
    return connection, more


def rank_of(message: Message, *, token: str, world_size: int) -> int:
    """Return the rank that has sent rank 0 its first message, by ``call``.

    Raises:
        ValueError: It is not from a rank of this job.
        UserError: It is, but the sender takes the job for one of another size.
    """
    rank, size = message.get("rank"), message.get("world_size")
    if message.get("is") != "here" or message.get("token") != token or type(rank) is not int:
        raise ValueError("a stranger")
    if size != world_size:
        raise UserError(
            f"WORLD_SIZE: it is {size!r} on rank {rank}, but {world_size} on rank 0; start all ranks of "
            "a job with the same"
        )
    if not 0 < rank < world_size:
        raise ValueError("no rank of this job")
    return rank
