"""Having members evaluated: which ranks evaluate which, and how their results come together."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from shardes.distributed.group import Mesh
from shardes.distributed.stop import Stop, Stopped
from shardes.es.member import MemberResult
from shardes.rollout.aggregate import Evaluation
from shardes.rollout.evaluator import Evaluator, InFlightBatch
from shardes.rollout.iteration import IterationSpec
from shardes.rollout.member_queue import MemberQueue, OnResult, Turn, TurnResults
from shardes.rollout.memory import MemoryShortageError
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.share import WorkShare
from shardes.utils.timers import PhaseTimer

T = TypeVar("T")

# Numbers the queues, alike on every rank, so that keys of the store are never used twice.
_queues = itertools.count()


def pipelined(
    turns: Iterable[Turn], *, start: Callable[[Turn], T], finish: Callable[[Turn, T], TurnResults]
) -> Iterator[TurnResults]:
    """Evaluate turns in their order, each started before the one before it is finished.

    So the rewards of a turn's members are computed while the next turn's members answer.

    Args:
        turns: Members that are evaluated at the same time.
        start: Has them answer; returns what ``finish`` needs.
        finish: Returns what they earned, once that is known; None if there was too little memory.
    """
    started: list[tuple[Turn, T]] = []
    for turn in turns:
        started.append((turn, start(turn)))
        if len(started) > 1:
            yield finish(*started.pop(0))
    for last in started:
        yield finish(*last)


class MemberScheduler:
    """Evaluates members and the centre over the ranks.

    Members that share a forward are composed from their order alone: with K of them, the members at places
    c K to c K + K - 1. A forward of which some members are known already is evaluated whole, because what it
    computes may depend, in the last bits, on all of them.

    Args:
        evaluator: Generates and scores.
        mesh: The ranks.
        timeout_seconds: How long rank 0 waits for a result.
        stop: Whether the job was asked to stop.
        timer: Where the time goes.
    """

    def __init__(
        self, evaluator: Evaluator, *, mesh: Mesh, timeout_seconds: int, stop: Stop, timer: PhaseTimer
    ) -> None:
        self._evaluator, self._mesh, self._timer = evaluator, mesh, timer
        self._timeout_seconds, self._stop = timeout_seconds, stop

    def evaluate_members(
        self, members: Sequence[int], *, spec: IterationSpec, on_result: OnResult
    ) -> dict[int, MemberResult]:
        """Evaluate members; a collective of all ranks.

        Args:
            members: Indices of the members whose results are wanted.
            spec: What they are asked.
            on_result: Called on rank 0 with each result, as soon as rank 0 knows of it.

        Returns:
            Results by member, on every rank.

        Raises:
            Stopped: On all ranks, if the job was asked to stop; no member is in flight any more.
        """
        results: dict[int, MemberResult] = {}
        while missing := [member for member in members if member not in results]:
            self._evaluator.begin(spec.prompts)

            def record(result: MemberResult, missing: Sequence[int] = missing) -> None:
                if result.member in missing:
                    on_result(result)

            evaluated = partial(
                pipelined, start=partial(self._start, spec), finish=partial(self._finish, spec)
            )
            found = self._evaluate_turns(self._turns(missing, spec), evaluated, record)
            results |= {member: result for member, result in found.items() if member in missing}
            if len(results) < len(members):
                self._evaluator.engine.step_down()
        return results

    def evaluate_centre(
        self, prompts: PromptBatch, *, evaluator: Evaluator | None = None, keeps_samples: bool = False
    ) -> Evaluation:
        """Evaluate the centre; a collective of all ranks, which share the problems.

        Args:
            prompts: What it is asked.
            evaluator: What evaluates it; None: what evaluates members.
            keeps_samples: Whether every answer is kept, on the rank that gave it.

        Raises:
            Stopped: On all ranks, if the job was asked to stop.
        """
        if self._is_asked_to_stop():
            raise Stopped
        evaluator = evaluator or self._evaluator
        while True:
            evaluator.begin(prompts)
            try:
                return evaluator.evaluate_centre(prompts, group=self._mesh.world, keeps_samples=keeps_samples)
            except MemoryShortageError:
                evaluator.engine.step_down()

    def _turns(self, members: Sequence[int], spec: IterationSpec) -> list[Turn]:
        """Part members into turns: as many loads at a time as the ranks of a group take."""
        engine = self._evaluator.engine
        size, num_loads = engine.members_per_forward, engine.num_loads
        wanted = set(members)
        places = [place for place, member in enumerate(spec.members) if member in wanted]
        firsts = {spec.members[place // size * size]: place // size * size for place in places}
        in_order = [firsts[member] for member in spec.strategy.in_order(firsts)]
        loads = [spec.members[first : first + size] for first in in_order]
        return [loads[first : first + num_loads] for first in range(0, len(loads), num_loads)]

    def _slot(self) -> int:
        """Return which of a turn's loads is this rank's."""
        engine = self._evaluator.engine
        return engine.group.rank if engine.num_loads > 1 else 0

    def _start(self, spec: IterationSpec, turn: Turn) -> InFlightBatch:
        """Have this rank's load of a turn answer; a collective of the group where forwards are."""
        engine, slot = self._evaluator.engine, self._slot()
        if engine.num_loads > 1:
            # A rank without a load of its own repeats another's, so that all of the group call alike.
            share = WorkShare(0, 1, 0, is_counted=slot < len(turn))
        else:
            share = self._evaluator.share_of(engine.group)
        members = turn[slot if slot < len(turn) else 0]
        perturbations = [spec.perturbation(member) for member in members]
        return self._evaluator.start(spec.prompts_of(members[0]), perturbations, share=share)

    def _finish(self, spec: IterationSpec, turn: Turn, in_flight: InFlightBatch) -> TurnResults:
        """Return what the members of a turn earned, or None for too little memory; a collective."""
        try:
            found = self._evaluator.collect(
                in_flight,
                group=self._evaluator.engine.group,
                slot=self._slot(),
                sizes=[len(members) for members in turn],
            )
        except MemoryShortageError:
            return None
        return [
            spec.result_of(member, evaluation)
            for members, evaluations in zip(turn, found, strict=True)
            for member, evaluation in zip(members, evaluations, strict=True)
        ]

    def _evaluate_turns(
        self,
        turns: Sequence[Turn],
        evaluated: Callable[[Iterable[Turn]], Iterator[TurnResults]],
        on_result: OnResult,
    ) -> dict[int, MemberResult]:
        """Have turns evaluated until all are, or one could not be."""
        group, world = self._evaluator.engine.group, self._mesh.world
        if group.world_size < world.world_size:
            assert world.store is not None, "several ranks have a store"
            queue = MemberQueue(
                world,
                group=group,
                store=world.store,
                number=next(_queues),
                timeout_seconds=self._timeout_seconds,
                stop=self._stop,
            )
            return queue.hand_out(turns, evaluated=evaluated, on_result=on_result, timer=self._timer)
        results: dict[int, MemberResult] = {}
        is_short = is_stopping = False

        def left() -> Iterator[Turn]:
            nonlocal is_stopping
            for turn in turns:
                is_stopping = is_stopping or self._is_asked_to_stop()
                if is_short or is_stopping:
                    return  # the one already started is finished all the same
                yield turn

        for found in evaluated(left()):
            is_short |= found is None
            for result in found or ():
                results[result.member] = result
                on_result(result)
        if is_stopping:
            raise Stopped
        return results

    def _is_asked_to_stop(self) -> bool:
        """Return whether one of the ranks knows of a request to stop; a collective of all."""
        return self._mesh.world.any(self._stop.is_requested)
