"""Loop of a worker process in which several episodes are played.

Methods that are no coroutines run one after the other, outside the event loop, so that they may run loops of
their own; coroutines run concurrently. Before a call begins, the worker says so, as its limit counts from
then; calls of one episode follow each other.
"""

import asyncio
import collections
import pickle
import socket
from dataclasses import dataclass, field
from typing import Any

from shardes.environments.answers import Answer
from shardes.environments.hosted import Call, HostedEpisode
from shardes.environments.loading import EnvironmentFactory, make_factory
from shardes.rewards.fork_server import receive, send
from shardes.rewards.leftovers import ProcessState
from shardes.rewards.worker import described


def serve(connection: socket.socket) -> None:
    """Import the environment, report an error or none, and play episodes until the pool goes away."""
    number, spec = receive(connection)
    try:
        factory = make_factory(spec)
        tools = factory.tools
    except ValueError as error:
        send(connection, {"id": number, "error": str(error)})
        return
    state = ProcessState(may_keep_running=True)
    state.restore()
    setup = {
        "tools": tools,
        "columns": factory.columns,
        "required": list(factory.required),
    }
    send(connection, {"id": number, "error": None, "setup": setup})
    _Worker(connection, factory, state).run()


@dataclass
class _Place:
    """An episode, and its calls that are not answered, the first of which may be running."""

    episode: HostedEpisode
    calls: collections.deque[tuple[int, Call]] = field(default_factory=collections.deque)
    is_running: bool = False


class _Worker:
    """State of a worker.

    Args:
        connection: Socket to the pool.
        factory: Maker of environments.
        state: What the process is put back to after every call.
    """

    def __init__(self, connection: socket.socket, factory: EnvironmentFactory, state: ProcessState) -> None:
        self._connection = connection
        self._factory = factory
        self._state = state
        self._places: dict[int, _Place] = {}
        # Episodes that have a call which may begin.
        self._ready: collections.deque[int] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._is_readable = False

    def run(self) -> None:
        """Play until the pool closes the connection (``EOFError``)."""
        asyncio.set_event_loop(self._loop)
        self._loop.add_reader(self._connection, self._note_readable)
        while True:
            self._loop.run_until_complete(self._wait())
            if self._is_readable:
                self._is_readable = False
                self._take(receive(self._connection))
            if self._ready:
                self._begin(self._ready.popleft())

    def _note_readable(self) -> None:
        self._is_readable = True
        self._wake.set()

    async def _wait(self) -> None:
        """Let coroutines run until there is something else to do."""
        await asyncio.sleep(0)
        if not self._ready and not self._is_readable:
            await self._wake.wait()
        self._wake.clear()

    def _take(self, message: tuple[int, tuple[int, list[Call]]]) -> None:
        """Take in calls of an episode, numbered from the message's number on."""
        first, (key, calls) = message
        if key not in self._places:
            self._places[key] = _Place(HostedEpisode(self._factory))
        place = self._places[key]
        if calls[0][0] == "close":  # what has not begun is no longer wanted
            while len(place.calls) > place.is_running:
                place.calls.pop()
        place.calls.extend(enumerate(calls, first))
        self._make_ready(key)

    def _make_ready(self, key: int) -> None:
        place = self._places[key]
        if place.calls and not place.is_running and key not in self._ready:
            self._ready.append(key)

    def _begin(self, key: int) -> None:
        """Begin an episode's next call."""
        place = self._places[key]
        number, call = place.calls[0]
        send(self._connection, {"id": number, "has_begun": True})
        place.is_running = True
        found: Any
        try:
            found = place.episode.call(_unpacked(call))
        except BaseException as error:  # nobody else would interrupt this process
            found = {"failure": described(error, f"in {call[0]}"), "seconds": 0.0}
        if isinstance(found, dict):
            self._end(key, found)
            return
        task = self._loop.create_task(self._await(key, found))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _await(self, key: int, found: Any) -> None:
        self._end(key, await found)

    def _end(self, key: int, answer: Answer) -> None:
        """Answer an episode's call, and let its next one begin."""
        place = self._places[key]
        number, call = place.calls.popleft()
        place.is_running = False
        if call[0] == "close":
            del self._places[key]
        else:
            if answer.get("failure") is not None:  # what follows has lost its ground
                while place.calls and place.calls[0][1][0] != "close":
                    place.calls.popleft()
            self._make_ready(key)
        self._state.restore()
        send(self._connection, answer | {"id": number, "left": self._state.left})
        self._wake.set()


def _unpacked(call: Call) -> Call:
    """Return a call with the columns of its row."""
    return ("reset", pickle.loads(call[1])) if call[0] == "reset" else call
