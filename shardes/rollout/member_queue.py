"""A queue from which groups of ranks take members as they become free; rank 0 gets the results."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

import torch.distributed as dist

from shardes.distributed.group import Group
from shardes.distributed.stop import Stop, Stopped
from shardes.es.member import MemberResult
from shardes.utils.timers import PhaseTimer

# How long rank 0 sleeps between two looks for results.
_POLL_SECONDS = 0.005

Turn = Sequence[Sequence[int]]
"""Members that a group evaluates at the same time: those of each of its loads."""

TurnResults = list[MemberResult] | None
"""What the members of a turn earned; None if there was too little memory."""

OnResult = Callable[[MemberResult], None]


class MemberQueue:
    """Gives turns of members to groups as these become free, and takes results to rank 0; used once.

    Groups talk through the store of the job: a counter says which turn is next, and a queue holds results
    until rank 0 takes them, which it does between turns of its own. There is no collective of all ranks until
    the last turn is done, so no group waits for another. Which group evaluates which member depends on the
    clock; what the member earns does not.

    Args:
        world: All ranks.
        group: The ranks that evaluate a turn together, this one among them.
        store: The job's store.
        number: Tells this queue from all others of the job.
        timeout_seconds: How long rank 0, with nothing left to do, waits for the next result.
        stop: Whether the job was asked to stop: then no turn is given out any more.
    """

    def __init__(
        self,
        world: Group,
        *,
        group: Group,
        store: dist.Store,
        number: int,
        timeout_seconds: float,
        stop: Stop,
    ) -> None:
        self._world = world
        self._group = group
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._stop = stop
        self._counter, self._mailbox = f"members{number}/next", f"members{number}/results"
        # Rank 0's: what has come, and how many groups have said that they are done.
        self._results: dict[int, MemberResult] = {}
        self._num_done = 0
        self._is_short = False

    def hand_out(
        self,
        turns: Sequence[Turn],
        *,
        evaluated: Callable[[Iterable[Turn]], Iterator[TurnResults]],
        on_result: OnResult,
        timer: PhaseTimer,
    ) -> dict[int, MemberResult]:
        """Have turns evaluated until all are, or one could not be; a collective of all ranks.

        Args:
            turns: The members, parted alike on every rank.
            evaluated: Evaluates the turns that it is given, as a collective of the group.
            on_result: Called on rank 0 with each result, as soon as rank 0 knows of it.
            timer: Where the time goes.

        Returns:
            Results by member, on every rank.

        Raises:
            Stopped: On all ranks, if the job was asked to stop.
            TimeoutError: Nothing has come for too long.
        """
        for results in evaluated(self._drawn(turns)):
            if results is None:
                if not self._is_short:
                    self._shut(len(turns))
                self._is_short = True
            for result in results or ():
                self._post(asdict(result))
            self._collect(on_result)
        self._post(None)
        with timer("wait"):
            if self._world.is_main:
                self._wait_for_all(on_result)
            # Rank 0 is the first to know of a request to stop, so it does if any group left because of one.
            found, is_stopping = self._world.broadcast_json(
                [[asdict(result) for result in self._results.values()], self._stop.is_requested]
            )
        if is_stopping:
            raise Stopped
        return {record["member"]: MemberResult(**record) for record in found}

    def _drawn(self, turns: Sequence[Turn]) -> Iterator[Turn]:
        """Draw this group's turns, each when it is asked for."""
        while not self._is_short and (position := self._draw(len(turns))) < len(turns):
            yield turns[position]

    def _draw(self, num_turns: int) -> int:
        """Return the position of the next turn that nobody has; beyond the last if there is none."""
        if self._stop.is_requested:
            self._shut(num_turns)
        return self._group.broadcast_json(
            self._store.add(self._counter, 1) - 1 if self._group.is_main else None
        )

    def _shut(self, num_turns: int) -> None:
        """Have all groups finish the turns that they have, and draw no more."""
        if self._group.is_main:
            self._store.add(self._counter, num_turns)

    def _post(self, record: dict[str, object] | None) -> None:
        """Send a result to rank 0; None says that there will be no more from this group."""
        if self._group.is_main:
            self._store.queue_push(self._mailbox, json.dumps(record))

    def _collect(self, on_result: OnResult) -> int:
        """Take what the mailbox holds, on rank 0; return how much that was."""
        if not self._world.is_main:
            return 0
        waiting = self._store.queue_len(self._mailbox)
        for _ in range(waiting):
            record = json.loads(self._store.queue_pop(self._mailbox))
            if record is None:
                self._num_done += 1
            else:
                result = MemberResult(**record)
                self._results[result.member] = result
                on_result(result)
        return waiting

    def _wait_for_all(self, on_result: OnResult) -> None:
        """Take results until every group is done.

        Raises:
            TimeoutError: Nothing has come for too long.
        """
        num_groups = self._world.world_size // self._group.world_size
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            if self._collect(on_result):
                deadline = time.monotonic() + self._timeout_seconds
            if self._num_done == num_groups:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no member's result for {self._timeout_seconds} s (parallel.timeout_seconds), and "
                    f"{num_groups - self._num_done} of {num_groups} groups of ranks are still at work"
                )
            time.sleep(_POLL_SECONDS)
