"""Having chunks of members evaluated, each chunk in the forwards of one team of ranks.

A team is one rank, or all ranks of a replica where each of them computes a part of the same forward. Chunks
are composed from the numbers of the members alone: chunk c is members c K to c K + K - 1. In a round, each
team evaluates another chunk; a chunk of which some members are known already is evaluated whole, because what
a forward computes may depend, in the last bits, on what it is of.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from shardes.distributed.group import Mesh
from shardes.distributed.stop import Stop, Stopped
from shardes.es.member import MemberResult
from shardes.rollout.evaluator import Evaluator, PendingChunk
from shardes.rollout.iteration import IterationSpec
from shardes.rollout.prompts import PromptBatch
from shardes.utils.timers import PhaseTimer


@dataclass(frozen=True)
class ChunkRound:
    """A chunk for each team.

    Attributes:
        chunks: The members of each team's chunk; the last teams may have none.
        pending: What this rank has begun and knows the scores of, if anything.
    """

    chunks: Sequence[Sequence[int]]
    pending: PendingChunk | None


class Chunks:
    """Evaluates members in chunks.

    Args:
        rollout: Generates and scores, in a batched mode.
        mesh: The ranks.
        stop: Whether the job was asked to stop.
        timer: Where the time goes.
    """

    def __init__(self, rollout: Evaluator, *, mesh: Mesh, stop: Stop, timer: PhaseTimer) -> None:
        self._rollout = rollout
        self._mesh = mesh
        self._stop = stop
        self._timer = timer

    def evaluate(
        self,
        members: Sequence[int],
        *,
        spec: IterationSpec,
        on_result: Callable[[MemberResult], None],
    ) -> dict[int, MemberResult]:
        """What members earn; a collective of all ranks. Some are missing if memory ran out.

        Args:
            members: Which.
            spec: What they are asked, all the same.
            on_result: Called with each result as soon as it is known.

        Raises:
            Stopped: On all ranks, if the job was asked to stop.
        """
        world, size, num_teams = self._mesh.world, self._rollout.members_per_forward, self._num_teams
        first_members = sorted({member // size * size for member in members})
        chunks = [spec.members[first : first + size] for first in first_members]
        results: dict[int, MemberResult] = {}
        started: list[ChunkRound] = []
        is_stopping = False

        def rounds() -> Iterator[ChunkRound]:
            """Each has been started when the one before it is finished."""
            nonlocal is_stopping
            for first in range(0, len(chunks), num_teams):
                is_stopping = world.any(self._stop.is_requested)
                if is_stopping:
                    break
                of_round = chunks[first : first + num_teams]
                started.append(self._start(of_round, spec))
                if len(started) > 1:
                    yield started.pop(0)
            yield from started

        for each in rounds():
            found = self._finish(each, spec.problems)
            if found is None:
                return results
            for result in found:
                if result.member in members:
                    results[result.member] = result
                    on_result(result)
        if is_stopping:
            raise Stopped
        return results

    @property
    def _num_teams(self) -> int:
        """How many chunks are evaluated at the same time."""
        return self._mesh.world.world_size // self._rollout.num_together

    @property
    def _place(self) -> int:
        """Which of a round's chunks is this rank's."""
        return self._mesh.world.rank // self._rollout.num_together

    def _start(self, chunks: Sequence[Sequence[int]], spec: IterationSpec) -> ChunkRound:
        """Has this rank's chunk answer; a collective of a replica's ranks where these are in step."""
        mine, shard = self._place, self._mesh.shard
        leader = (self._mesh.world.rank - shard.rank) // self._rollout.num_together
        if mine < len(chunks):
            place = mine
        elif self._rollout.mode.forward_is_collective and leader < len(chunks):
            # A rank without a chunk repeats another's, so that all of the replica call alike.
            place = leader
        else:
            return ChunkRound(chunks, None)
        where = [spec.perturbation(member) for member in chunks[place]]
        pending = self._rollout.start_chunk(spec.problems, where)
        is_first = shard.rank % self._rollout.num_together == 0
        return ChunkRound(chunks, pending if place == mine and is_first else None)

    def _finish(self, of_round: ChunkRound, problems: PromptBatch) -> list[MemberResult] | None:
        """What the members of a round earned; None if a rank had too little memory. A collective of all."""
        mine, pending = self._place, of_round.pending
        blank = self._rollout.accumulator(problems)
        length = len(blank.totals()) + 1
        # Every rank enters what it knows into a vector of zeros, so that the sum is exact.
        vector: list[float] = []
        with self._timer("reward"):
            for place, chunk in enumerate(of_round.chunks):
                if place == mine and pending is not None and not pending.is_short:
                    for accumulator, is_broken in zip(pending.accumulators, pending.are_broken, strict=True):
                        vector += [*accumulator.totals(), float(is_broken)]
                else:
                    vector += [0.0] * (length * len(chunk))
        with self._timer("io"):
            is_short = float(pending is not None and pending.is_short)
            *vector, is_short = self._mesh.world.sum_float64([*vector, is_short])
        if is_short:
            return None
        results: list[MemberResult] = []
        for place, chunk in enumerate(of_round.chunks):
            for index, member in enumerate(chunk):
                accumulator = pending.accumulators[index] if place == mine and pending is not None else blank
                *totals, broken = vector[len(results) * length : (len(results) + 1) * length]
                evaluation = accumulator.evaluation(totals)
                is_finite = evaluation.is_finite and not broken
                results.append(replace(evaluation, is_finite=is_finite).result_of(member))
        return results
