"""Worker processes of environments: which plays which episode, and what happens when one is lost.

An episode stays in the process that it began in. When that process is lost, its episodes are begun again in
other processes, each when it is next asked something: the pool sends all calls so far, and compares the
answers with those it had. An episode that answers otherwise has failed; so no reward ever depends on whether
a process was lost.

- A call that runs longer than the limit fails its episode, and its process is killed. If several calls ran,
  which only coroutines do, nobody knows which of them kept the others waiting: each is tried again alone.
- A process may end during a call because of the environment, or because somebody killed it. The episodes
  whose calls ran then are tried again, each alone in a process of its own. An episode has failed when its
  calls have seen such an end three times without an answer in between, or twenty times if all ends may have
  been somebody else's doing (SIGKILL, which the kernel sends when the machine's memory is full).
- An episode for which the memory of a shared process did not suffice is tried again alone, too.

Once the call is answered, a process that played one episode alone takes in others.
"""

import asyncio
import collections
import logging
import signal
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any

from shardes.environments.answers import read_answer
from shardes.environments.base import EnvironmentSpec, StepResult
from shardes.environments.host import Flight, Host
from shardes.environments.hosted import Call
from shardes.environments.losses import Attempts
from shardes.environments.record import Record
from shardes.environments.starting import NoProcessError, SetUp, Starter
from shardes.rewards.processes import ForkServer, ending

logger = logging.getLogger(__name__)

# How long calls wait before there are more processes.
PATIENCE_SECONDS = 0.1
# Calls of new episodes that wait in a process while there may be further ones.
_MAX_QUEUED = 8
# How late the pool may learn that a call has been answered in time.
_GRACE_SECONDS = 0.25


class Hosts:
    """Workers, and the episodes that they play.

    Its coroutines and methods run in one event loop.

    Args:
        spec: What runs the episodes.
        timeout_seconds: Time limit of a call.
        max_workers: Processes at most. There is one at first; more come when calls have to wait.
        start_fork_server: Starts the process that workers are forked from.
        background: Runs a coroutine in the event loop.

    Attributes:
        num_kills: Workers that have ended, or were ended, before their time.
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        *,
        timeout_seconds: float,
        max_workers: int,
        start_fork_server: Callable[[], ForkServer],
        background: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._max_workers = max_workers
        self._background = background
        self._starter = Starter(spec, start_fork_server)
        self._hosts: list[Host] = []
        self._host_of: dict[Record, Host] = {}
        # All episodes with a call to be answered, wherever they are.
        self._records: set[Record] = set()
        # Episodes that no process plays, with a call to be answered: anywhere, or alone in a new process.
        self._waiting: collections.deque[Record] = collections.deque()
        self._solos: collections.deque[Record] = collections.deque()
        # Processes that exist, those of them that are not ready, and those that there should be.
        self._num_processes = self._num_starting = 0
        self._num_wanted = 1
        self._attempts = Attempts()
        self._is_closing = False
        self._has_told_of_left = False
        self.num_kills = 0

    async def start(self) -> SetUp:
        """Start the first worker, and return what it says of the environment.

        Raises:
            NoProcessError: The environment does not exist, or importing it fails.
        """
        host, setup = await self._starter.start()
        self._num_processes += 1
        self._admit(host)
        return setup

    def obstacle(self) -> str | None:
        """Return why workers can see other processes than their own; None if they cannot."""
        return self._starter.fork_server.obstacle()

    def ask(self, record: Record, call: Call, pending: "Future[StepResult]") -> None:
        """Have another call of an episode answered."""
        record.pending = pending
        if record.is_over or self._is_closing:
            record.fail("the episode is over")
            return
        self._records.add(record)
        pending.add_done_callback(lambda _: self._records.discard(record))
        record.calls.append(call)
        host = self._host_of.get(record)
        if host is not None and host.is_draining:
            self._leave(record)
            host = None
        if host is None:
            self._waiting.append(record)
        else:
            host.send_calls(record)
        self._watch(record, len(record.calls))
        self._schedule()

    def end(self, record: Record) -> None:
        """Close an episode, whatever it waits for."""
        if not record.is_over:
            self._fail(record, "the episode was given up")

    def close(self, reason: str = "the environments were closed") -> None:
        """Let go of everything; what waits, fails."""
        self._is_closing = True
        for record in list(self._records):
            record.fail(reason)
        for host in self._hosts:
            host.disconnect()
        self._hosts.clear()

    def close_processes(self) -> None:
        """End all processes."""
        self._starter.fork_server.close()

    async def end_all(self, seconds: float) -> None:
        """Close all episodes, for so long at most."""
        for record in list(self._host_of):
            self.end(record)
        deadline = asyncio.get_running_loop().time() + seconds
        while any(host.flights for host in self._hosts) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)

    def _watch(self, record: Record, num_calls: int) -> None:
        """Have another process started if an episode's call does not begin soon."""
        self._later(PATIENCE_SECONDS, self._grow_if_queued, record, num_calls)

    def _grow_if_queued(self, record: Record, num_calls: int) -> None:
        if record.is_over or len(record.digests) >= num_calls or self._num_wanted >= self._max_workers:
            return
        host = self._host_of.get(record)
        if host is not None and any(flight.record is record for flight in host.running()):
            return
        if self._num_starting == 0 and record not in self._solos:
            num_queued = sum(each.num_queued for each in self._hosts) + len(self._waiting)
            self._num_wanted += min(num_queued, self._num_wanted, self._max_workers - self._num_wanted)
            self._start_wanted()
        self._watch(record, num_calls)

    def _start_wanted(self) -> None:
        while self._num_processes < self._num_wanted:
            self._start_host(None)

    def _schedule(self) -> None:
        """Give waiting episodes to processes, and start those that are missing."""
        if self._is_closing:
            return
        for host in [each for each in self._hosts if each.is_draining and not each.flights]:
            self._lose(host)
        self._schedule_solos()
        if self._waiting:
            self._start_wanted()
        self._place()

    def _schedule_solos(self) -> None:
        """Start a process for each episode that must be alone; others make room if need be."""
        while self._solos:
            if self._solos[0].is_over:
                self._solos.popleft()
            elif self._num_processes < self._max_workers:
                self._start_host(self._solos.popleft())
            elif (idle := self._least([h for h in self._open() if not h.flights])) is not None:
                self._lose(idle)
            else:
                busy = self._least(self._open())
                if busy is not None and not any(host.is_draining for host in self._hosts):
                    busy.is_draining = True
                return

    def _place(self) -> None:
        """Give waiting episodes to the processes with the fewest."""
        may_be_more = self._num_starting > 0 or self._num_processes < self._max_workers
        while self._waiting:
            if self._waiting[0].is_over:
                self._waiting.popleft()
                continue
            host = self._least([h for h in self._open() if not may_be_more or h.num_queued < _MAX_QUEUED])
            if host is None:
                return
            self._enter(host, self._waiting.popleft())

    def _open(self) -> list[Host]:
        """Return the processes that take in episodes."""
        return [host for host in self._hosts if host.solo is None and not host.is_draining]

    def _least(self, hosts: list[Host]) -> Host | None:
        return min(hosts, key=lambda host: len(host.records), default=None)

    def _enter(self, host: Host, record: Record) -> None:
        self._host_of[record] = host
        record.num_sent = 0
        host.send_calls(record)

    def _leave(self, record: Record) -> None:
        host = self._host_of.pop(record, None)
        if host is not None:
            host.records.discard(record)

    def _start_host(self, solo: Record | None) -> None:
        # It counts from now, not from when the coroutine begins.
        self._num_processes += 1
        self._num_starting += 1
        self._background(self._start(solo))

    async def _start(self, solo: Record | None) -> None:
        try:
            host, _ = await self._starter.start()
        except NoProcessError as error:
            self._num_processes -= 1
            self.num_kills += 1
            self._note_failed_start(solo, error)
        else:
            self._admit(host)
            if solo is not None and not solo.is_over:
                host.solo = solo
                self._enter(host, solo)
        finally:
            self._num_starting -= 1
        self._schedule()

    def _note_failed_start(self, solo: Record | None, error: NoProcessError) -> None:
        if solo is not None:
            if solo.losses.starts.fail() or not error.may_be_chance:
                solo.fail(f"no process for environments can be started: {error}")
            self._solos.appendleft(solo)
        self._note_loss(str(error), is_final=not error.may_be_chance)

    def _admit(self, host: Host) -> None:
        """Take in a worker that has imported the environment."""
        host.on_message = lambda message: self._take(host, message)
        host.on_end = lambda reason: self._handle_end(host, reason)
        self._hosts.append(host)
        if not host.is_connected:
            self._handle_end(host, None)

    def _take(self, host: Host, message: dict[str, Any]) -> None:
        """Take in a message of a worker.

        Raises:
            ValueError, TypeError, KeyError: It is none that a worker sends.
        """
        number = message["id"]
        flight = host.flights.get(number) if isinstance(number, int) else None
        if flight is None:
            raise ValueError("a reply to nothing that was asked")
        if message.get("has_begun") is True and flight.timer is None:
            flight.timer = self._later(self._timeout_seconds, self._overrun, host, number)
            return
        result = read_answer(message)
        if flight.timer is not None:
            flight.timer.cancel()
        del host.flights[number]
        if message.get("left") is not None:
            self._note_left(host, str(message["left"]))
        if flight.index is None:
            self._leave(flight.record)
            host.forget(flight.record)
        elif not flight.record.is_over:
            self._answer(host, flight.record, flight.index, result, bool(message.get("lacks_memory")))
        self._schedule()

    def _answer(self, host: Host, record: Record, index: int, result: StepResult, lacks_memory: bool) -> None:
        self._attempts.succeed()
        host.is_draining |= lacks_memory
        if lacks_memory and host.solo is not record:
            self._lose(host, suspects=[record])
        elif record.is_replayed(index):
            if not record.agrees(index, result):
                said = "" if result.failure is None else f": {result.failure}"
                self._fail(
                    record,
                    "the environment is not deterministic: begun again after its process was lost, it "
                    f"answered call {index} otherwise than before{said}",
                )
        else:
            if host.solo is record:
                host.solo = None
            record.answer(result)
            if record.is_over:
                self._end(record)

    def _fail(self, record: Record, failure: str) -> None:
        record.fail(failure)
        self._end(record)

    def _end(self, record: Record) -> None:
        """Have an episode that is over closed by the process that plays it."""
        host = self._host_of.get(record)
        if host is not None:
            if host.solo is record:
                host.solo = None
            host.send_close(record)

    def _overrun(self, host: Host, number: int, *, is_sure: bool = False) -> None:
        """End a call that has reached the limit, unless its answer is on its way."""
        flight = host.flights[number]  # the timer of an answered call is cancelled
        if not is_sure:
            flight.timer = self._later(_GRACE_SECONDS, partial(self._overrun, host, number, is_sure=True))
            return
        running = host.running()
        if running == [flight] and flight.index is not None and not flight.record.is_over:
            limit = f"{self._timeout_seconds:g} s (task.reward_timeout_seconds)"
            flight.record.fail(f"TimeoutError: the environment did not answer within {limit}")
        self._lose(host, suspects=[each.record for each in running])
        self._schedule()

    def _note_left(self, host: Host, left: str) -> None:
        """Have a worker replaced in which an environment has changed what may disturb others."""
        host.is_draining = True
        if not self._has_told_of_left:
            self._has_told_of_left = True
            logger.warning(
                "an environment has left %.200s behind, so its process is replaced after such calls, and its "
                "episodes are begun again",
                left,
            )

    def _handle_end(self, host: Host, reason: str | None) -> None:
        """Let go of a worker that has ended, or has sent what is no message; ``reason`` says so."""
        running = [flight for flight in host.running() if not flight.record.is_over]
        self._detach(host)
        self._background(self._retry_after_end(host, running, reason))

    async def _retry_after_end(self, host: Host, running: list[Flight], reason: str | None) -> None:
        """Find out how a worker has ended, and try again the episodes whose calls ran."""
        has_ended = reason is None and await host.has_ended()
        code = self._starter.end(host)
        self._num_processes -= 1
        may_be_chance = reason is None and (code is None or (code == -signal.SIGKILL and has_ended))
        if reason is None:
            how = "with its parent" if code is None else ending(code)
            reason = f"the environment ended its process ({how})"
            if not has_ended and code == -signal.SIGKILL:
                reason = "the environment closed its process's connection"
        for record in {flight.record: None for flight in running}:
            if record.losses.lose(may_be_chance=may_be_chance) and not record.is_over:
                record.fail(f"{reason}, {record.losses.num_lost} times in all")
        self._return(host, suspects=[flight.record for flight in running])
        self._note_loss(reason)
        self._schedule()

    def _lose(self, host: Host, suspects: list[Record] | None = None) -> None:
        """Kill a worker; of its episodes, the suspects are tried again alone."""
        self._detach(host)
        self._starter.end(host)
        self._num_processes -= 1
        self._return(host, suspects or [])

    def _detach(self, host: Host) -> None:
        self.num_kills += 1
        self._hosts.remove(host)
        host.disconnect()

    def _return(self, host: Host, suspects: list[Record]) -> None:
        """Have the episodes of a lost worker that wait for answers go on elsewhere, in their order."""
        for record in sorted(host.records, key=lambda each: each.key):
            self._host_of.pop(record, None)
            if record.is_waiting:
                (self._solos if record in suspects else self._waiting).append(record)
        host.records.clear()

    def _note_loss(self, reason: str, *, is_final: bool = False) -> None:
        """Fail all that waits if workers are lost again and again, and nothing is answered any more."""
        if not (self._attempts.fail() or is_final) or self._hosts:
            return
        for record in [*self._waiting, *self._solos]:
            record.fail(f"no process for environments can be kept: {reason}")
        self._waiting.clear()
        self._solos.clear()

    def _later(self, seconds: float, callback: Callable[..., None], *arguments: Any) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, callback, *arguments)
