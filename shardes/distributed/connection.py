"""Connections between ranks besides the process group: messages in JSON, a line each, over a socket."""

import json
import logging
import socket
from typing import Any

logger = logging.getLogger(__name__)

Message = dict[str, Any]


class Connection:
    """One end of a connection between two ranks.

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
        line.settimeout(10)
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
        try:
            self.line.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            logger.debug("a message could not be sent: %s", error)

    def receive(self) -> list[Message]:
        """Return the messages that have arrived; blocks until something has.

        Raises:
            EOFError: The other end has closed.
            ValueError: It sent something else than messages.
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
        """Close this end."""
        self.is_closed = True
        self.line.close()


def listen(backlog: int) -> socket.socket:
    """Open a socket that accepts connections to any of this machine's addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)
