"""A worker process that plays episodes, as the pool sees it."""

import asyncio
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardes.environments.hosted import Call
from shardes.environments.record import Record
from shardes.rewards.fork_server import HEADER
from shardes.rewards.processes import MAX_REPLY_BYTES, ForkServer

# How long a process whose connection has ended may take to end as well.
_END_SECONDS = 0.1


@dataclass(eq=False)
class Flight:
    """A call that a worker has been sent and not answered.

    Attributes:
        record: The episode.
        index: The call's place among the episode's; None: a ``close``, whose answer matters to nobody.
        timer: Ends the worker when the call has taken too long; None until it begins.
    """

    record: Record
    index: int | None
    timer: asyncio.TimerHandle | None = None


class Host(asyncio.Protocol):
    """A worker, and the connection to it.

    Args:
        pid: Its process id.
        fork_server: The process that it is a child of.

    Attributes:
        records: The episodes that it plays.
        flights: Calls that it has not answered, by number.
        solo: The only episode that it may play for now; None: any.
        is_connected: False once the worker has ended.
        is_ended: True once the fork server has been told to end it.
        is_draining: True if it is sent no further calls, since it will be replaced when all are answered.
        on_message: Called with each of its messages.
        on_end: Called with a reason when the connection has ended (None), or cannot be understood.
    """

    def __init__(self, pid: int, fork_server: ForkServer) -> None:
        self.pid = pid
        self.fork_server = fork_server
        self.records: set[Record] = set()
        self.flights: dict[int, Flight] = {}
        self.solo: Record | None = None
        self.is_draining = False
        self.on_message: Callable[[Any], None] = lambda message: None
        self.on_end: Callable[[str | None], None] = lambda reason: None
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self.is_connected = True
        self.is_ended = False
        self._num_sent = 0

    @property
    def num_queued(self) -> int:
        """Return the number of calls that have not begun."""
        return sum(flight.timer is None for flight in self.flights.values())

    def running(self) -> list[Flight]:
        """Return the calls that have begun."""
        return [flight for flight in self.flights.values() if flight.timer is not None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Report that the worker has ended."""
        self.is_connected = False
        self.on_end(None)

    def data_received(self, data: bytes) -> None:
        """Take in messages of the worker, which an environment may have forged."""
        self._buffer += data
        try:
            while (message := self._next()) is not None:
                self.on_message(message)
        except Exception as error:
            self.on_end(f"the environment broke its process ({type(error).__name__}: {error})")

    def _next(self) -> Any:
        if len(self._buffer) < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(self._buffer)
        if length > MAX_REPLY_BYTES:
            raise ValueError(f"a reply of {length} bytes")
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        message = json.loads(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        if not isinstance(message, dict):
            raise TypeError("a reply to nothing that was asked")
        return message

    def send(self, message: Any) -> int:
        """Send a message, and return its number."""
        number = self._num_sent + 1
        self._num_sent = number
        payload = pickle.dumps((number, message))
        if self._transport is not None and self.is_connected:
            self._transport.write(HEADER.pack(len(payload)) + payload)
        return number

    def send_calls(self, record: Record) -> None:
        """Send the calls of an episode that this worker has not been sent."""
        self.records.add(record)
        self._send_calls(record, record.calls[record.num_sent :], record.num_sent)
        record.num_sent = len(record.calls)

    def send_close(self, record: Record) -> None:
        """Have an episode closed; calls that have not begun by then are not answered."""
        self._send_calls(record, [("close",)], None)

    def forget(self, record: Record) -> None:
        """Let go of an episode that is closed."""
        self.records.discard(record)
        self.flights = {n: flight for n, flight in self.flights.items() if flight.record is not record}

    def _send_calls(self, record: Record, calls: Sequence[Call], first: int | None) -> None:
        number = self.send((record.key, list(calls)))
        self._num_sent += len(calls) - 1
        for i in range(len(calls)):
            self.flights[number + i] = Flight(record, None if first is None else first + i)

    def disconnect(self) -> None:
        """Listen to the worker no more."""
        self.on_message, self.on_end = lambda message: None, lambda reason: None
        self.is_connected = False
        for flight in self.flights.values():
            if flight.timer is not None:
                flight.timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    async def has_ended(self) -> bool:
        """Return True if the process ends of itself, now that its connection has."""
        deadline = asyncio.get_running_loop().time() + _END_SECONDS
        while _is_alive(self.pid):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.001)
        return True


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
