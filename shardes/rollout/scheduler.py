"""Having members evaluated: which ranks evaluate which, and how their results come together."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from shardes.distributed.group import Group, Mesh
from shardes.distributed.stop import Stop, Stopped
from shardes.es.member import MemberResult
from shardes.rollout.aggregate import Evaluation
from shardes.rollout.chunks import Chunks
from shardes.rollout.evaluator import Evaluator, Pending
from shardes.rollout.gather_modes import BatchedGather
from shardes.rollout.iteration import IterationSpec
from shardes.rollout.memory import MemoryShortageError
from shardes.rollout.prompts import PromptBatch
from shardes.utils.timers import PhaseTimer

# How long rank 0 sleeps between two looks for results.
_POLL_SECONDS = 0.005

# Numbers the desks, alike on every rank, so that keys of the store are never used twice.
_desks = itertools.count()


T = TypeVar("T")
OnResult = Callable[[MemberResult], None]


@dataclass(frozen=True)
class Evaluate(Generic[T]):
    """How a member is evaluated, in two steps, so that its rewards are computed while the next one answers.

    Attributes:
        start: Has it answer; returns what ``finish`` needs.
        finish: What it earned, once that is known; None if there was too little memory.
    """

    start: Callable[[int], T]
    finish: Callable[[int, T], MemberResult | None]

    def each(self, members: Iterator[int]) -> Iterator[MemberResult | None]:
        """Evaluates members in their order; each has been started when the one before it is finished."""
        started: list[tuple[int, T]] = []
        for member in members:
            started.append((member, self.start(member)))
            if len(started) > 1:
                yield self.finish(*started.pop(0))
        for last in started:
            yield self.finish(*last)


class MemberScheduler:
    """Evaluates members and the centre, in whichever mode the rollout is.

    Args:
        rollout: Generates and scores.
        mesh: The ranks.
        timeout_seconds: How long rank 0 waits for a result.
        stop: Whether the job was asked to stop.
        timer: Where the time goes.
    """

    def __init__(
        self,
        rollout: Evaluator,
        *,
        mesh: Mesh,
        timeout_seconds: int,
        stop: Stop,
        timer: PhaseTimer,
    ) -> None:
        self._rollout = rollout
        self._mesh = mesh
        self._timeout_seconds = timeout_seconds
        self._stop = stop
        self._timer = timer
        self._chunks = Chunks(rollout, mesh=mesh, stop=stop, timer=timer)

    def evaluate_members(
        self, members: Sequence[int], *, spec: IterationSpec, on_result: OnResult
    ) -> dict[int, MemberResult]:
        """What members earn; a collective of all ranks.

        Args:
            members: Which.
            spec: What they are asked.
            on_result: Called on rank 0 with each result, as soon as rank 0 knows of it.

        Returns:
            Results by member, on every rank.

        Raises:
            Stopped: On all ranks, if the job was asked to stop; no member is in flight any more.
        """
        results: dict[int, MemberResult] = {}
        while missing := [member for member in members if member not in results]:
            self._rollout.begin(spec.problems)

            def start(member: int) -> Pending:
                return self._start(member, spec)

            def finish(member: int, pending: Pending) -> MemberResult | None:
                return self._finish(member, pending, spec)

            if isinstance(self._rollout.mode, BatchedGather):
                results |= self._chunks.evaluate(missing, spec=spec, on_result=on_result)
            else:
                results |= self._hand_out(missing, Evaluate(start, finish), on_result)
            if len(results) < len(members):
                self._rollout.step_down()
        return results

    def evaluate_centre(
        self, problems: PromptBatch, *, rollout: Evaluator | None = None, keeps_samples: bool = False
    ) -> Evaluation:
        """What the centre earns; a collective of all ranks, which share the problems.

        Args:
            problems: What it answers.
            rollout: How; None: as members do.
            keeps_samples: Whether every answer is kept, on the rank that gave it.

        Raises:
            Stopped: On all ranks, if the job was asked to stop.
        """
        self._stop_if_asked()
        rollout = rollout or self._rollout
        while True:
            rollout.begin(problems)
            rollout.mode.centre()
            try:
                return rollout.evaluate(problems, group=self._mesh.world, keeps_samples=keeps_samples)
            except MemoryShortageError:
                rollout.step_down()

    def _start(self, member: int, spec: IterationSpec) -> Pending:
        """Has a member answer; a collective of the team."""
        mode, where = self._rollout.mode, spec.perturbation(member)
        with self._timer("perturb"):
            mode.perturb(where)
        return self._rollout.start(spec.problems_of(member), group=mode.team)

    def _finish(self, member: int, pending: Pending, spec: IterationSpec) -> MemberResult | None:
        """What a member earns, or None for too little memory; a collective of the team."""
        try:
            return self._rollout.finish(pending).result_of(member, problems=spec.indices_of(member))
        except MemoryShortageError:
            return None

    def _hand_out(
        self, members: Sequence[int], evaluate: Evaluate[Any], on_result: OnResult
    ) -> dict[int, MemberResult]:
        """Has members evaluated until all are, or one could not be."""
        team, world = self._rollout.mode.team, self._mesh.world
        if team.world_size < world.world_size:
            assert world.store is not None, "several ranks have a store"
            desk = MemberQueue(
                world,
                team=team,
                store=world.store,
                number=next(_desks),
                timeout_seconds=self._timeout_seconds,
                stop=self._stop,
            )
            return desk.hand_out(members, evaluate=evaluate, on_result=on_result, timer=self._timer)
        results: dict[int, MemberResult] = {}
        is_short = is_stopping = False

        def left() -> Iterator[int]:
            nonlocal is_stopping
            for member in members:
                is_stopping = is_stopping or self._is_asked_to_stop()
                if is_short or is_stopping:
                    return  # the one already started is finished all the same
                yield member

        for result in evaluate.each(left()):
            if result is None:
                is_short = True
            else:
                results[result.member] = result
                on_result(result)
        if is_stopping:
            raise Stopped
        return results

    def _is_asked_to_stop(self) -> bool:
        """Whether one of the ranks knows of a request to stop; a collective of all."""
        return self._mesh.world.any(self._stop.is_requested)

    def _stop_if_asked(self) -> None:
        """Raises ``Stopped`` on all ranks if one of them knows of a request to stop; a collective."""
        if self._is_asked_to_stop():
            raise Stopped


class MemberQueue:
    """Gives members to teams as these become free, and takes their results to rank 0; used once.

    Teams talk through the store of the job: a counter says who is next, and a queue holds results until rank
    0 takes them, which it does between members of its own. There is no collective of all ranks until the last
    member is done, so no team waits for another. Which team evaluates which member depends on the clock; what
    the member earns does not.

    Args:
        world: All ranks.
        team: The ranks of this one's team.
        store: The job's.
        number: Tells this desk from all others of the job.
        timeout_seconds: How long rank 0, with nothing left to do, waits for the next result.
        stop: Whether the job was asked to stop: then no member is given out any more.
    """

    def __init__(
        self,
        world: Group,
        *,
        team: Group,
        store: dist.Store,
        number: int,
        timeout_seconds: float,
        stop: Stop,
    ) -> None:
        self._world = world
        self._team = team
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._stop = stop
        self._counter, self._mailbox = f"members{number}/next", f"members{number}/results"
        # Rank 0's: what has come, and how many teams have said that they are done.
        self._results: dict[int, MemberResult] = {}
        self._num_done = 0
        self._is_short = False

    def hand_out(
        self, members: Sequence[int], *, evaluate: Evaluate[Any], on_result: OnResult, timer: PhaseTimer
    ) -> dict[int, MemberResult]:
        """Has members evaluated until all are, or one could not be; a collective of all ranks.

        Returns:
            Results by member, on every rank.

        Raises:
            Stopped: On all ranks, if the job was asked to stop.
        """
        for result in evaluate.each(self._drawn(members)):
            if result is None:
                if not self._is_short:
                    self._shut(len(members))
                self._is_short = True
            else:
                self._post(asdict(result))
            self._collect(on_result)
        self._post(None)
        with timer("wait"):
            if self._world.is_main:
                self._wait_for_all(on_result)
            # Rank 0 is the first to know of a request to stop, so it does if any team left because of one.
            found, is_stopping = self._world.broadcast_json(
                [[asdict(result) for result in self._results.values()], self._stop.is_requested]
            )
        if is_stopping:
            raise Stopped
        return {record["member"]: MemberResult(**record) for record in found}

    def _drawn(self, members: Sequence[int]) -> Iterator[int]:
        """This team's members, each drawn when it is asked for."""
        while not self._is_short and (position := self._draw(len(members))) < len(members):
            yield members[position]

    def _draw(self, num_members: int) -> int:
        """The position of the next member that nobody has; beyond the last if there is none."""
        if self._stop.is_requested:
            self._shut(num_members)
        return self._team.broadcast_json(
            self._store.add(self._counter, 1) - 1 if self._team.is_main else None
        )

    def _shut(self, num_members: int) -> None:
        """Has all teams finish the members that they have, and draw no more."""
        if self._team.is_main:
            self._store.add(self._counter, num_members)

    def _post(self, record: dict[str, object] | None) -> None:
        """Sends a result to rank 0; None says that there will be no more from this team."""
        if self._team.is_main:
            self._store.queue_push(self._mailbox, json.dumps(record))

    def _collect(self, on_result: OnResult) -> int:
        """Takes what the mailbox holds, on rank 0; returns how much that was."""
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
        """Takes results until every team is done.

        Raises:
            TimeoutError: Nothing has come for too long.
        """
        num_teams = self._world.world_size // self._team.world_size
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            if self._collect(on_result):
                deadline = time.monotonic() + self._timeout_seconds
            if self._num_done == num_teams:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no member's result for {self._timeout_seconds} s (parallel.timeout_seconds), and "
                    f"{num_teams - self._num_done} of {num_teams} teams are still at work"
                )
            time.sleep(_POLL_SECONDS)
