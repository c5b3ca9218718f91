"""Handing members out: each is evaluated once, every rank learns all results, rank 0 as they come."""

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardes.distributed.group import Group, Mesh
from shardes.distributed.stop import Stop, Stopped
from shardes.es.member import MemberResult
from shardes.rollout.member_queue import MemberQueue
from shardes.rollout.scheduler import MemberScheduler, pipelined
from shardes.utils.timers import PhaseTimer

CPU = torch.device("cpu")


@dataclass
class Meeting:
    """Where threads that play ranks exchange a value."""

    barrier: threading.Barrier
    values: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadGroup(Group):
    """Ranks that are threads."""

    meeting: Meeting | None = None

    def broadcast_json(self, value):
        if self.world_size == 1:
            return value
        if self.rank == 0:
            self.meeting.values[0] = value
        self.meeting.barrier.wait(10)
        found = self.meeting.values[0]
        self.meeting.barrier.wait(10)
        return found


def whole(evaluate):
    """Evaluates turns of one member, whose evaluation is all done when it is finished."""

    def finish(turn, _):
        result = evaluate(turn[0][0])
        return None if result is None else [result]

    return lambda turns: pipelined(turns, start=lambda turn: turn, finish=finish)


def turns_of(members):
    return [[[member]] for member in members]


def play(num_ranks, members, evaluate, *, team_size=1, timeout_seconds=10, stop=None, told=None):
    """Runs a queue on every rank; returns what each got, and what rank 0 was told in which order."""
    stop, told = stop or Stop(), [] if told is None else told
    store = dist.HashStore()
    world = Meeting(threading.Barrier(num_ranks))
    teams = [Meeting(threading.Barrier(team_size)) for _ in range(num_ranks // team_size)]
    found, errors = {}, []

    def rank(number):
        queue = MemberQueue(
            ThreadGroup(number, num_ranks, CPU, meeting=world),
            group=ThreadGroup(number % team_size, team_size, CPU, meeting=teams[number // team_size]),
            store=store,
            number=3,
            timeout_seconds=timeout_seconds,
            stop=stop,
        )
        try:
            found[number] = queue.hand_out(
                turns_of(members),
                evaluated=whole(lambda member: evaluate(number, member)),
                on_result=told.append if number == 0 else None,
                timer=PhaseTimer(),
            )
        except Exception as error:
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    if errors:
        raise errors[0]
    return found, told


def result_of(member):
    return MemberResult(member, None if member == 5 else member / 7, member % 2, 10 * member)


@pytest.mark.parametrize(("num_ranks", "team_size"), [(2, 1), (3, 1), (4, 2), (6, 3)])
def test_every_member_is_evaluated_once_and_every_rank_learns_it(num_ranks, team_size):
    members, evaluated = [1, 2, 4, 5, 8, 9, 11], []

    def evaluate(rank, member):
        evaluated.append((rank // team_size, rank % team_size, member))
        return result_of(member)

    found, told = play(num_ranks, members, evaluate, team_size=team_size)
    assert sorted(member for _, _, member in evaluated) == sorted(members * team_size)
    for member in members:  # by the ranks of one team, all of them
        assert len({team for team, _, of in evaluated if of == member}) == 1
        assert {place for _, place, of in evaluated if of == member} == set(range(team_size))
    wanted = {member: result_of(member) for member in members}
    assert found == dict.fromkeys(range(num_ranks), wanted)
    assert sorted(result.member for result in told) == members


def test_members_go_to_whoever_is_free():
    counts = [0, 0, 0]

    def evaluate(rank, member):
        counts[rank] += 1
        time.sleep(0.5 if rank == 1 else 0.01)
        return result_of(member)

    play(3, range(24), evaluate)
    assert counts[1] <= 2
    assert sum(counts) == 24


def test_rank_0_is_told_of_others_results_between_its_own():
    order = []

    def evaluate(rank, member):
        time.sleep(0.15 if rank == 0 else 0.04)
        if rank == 0:
            order.append(len(told_now))
        return result_of(member)

    told_now = []
    store = dist.HashStore()
    world = Meeting(threading.Barrier(2))

    def rank(number):
        MemberQueue(
            ThreadGroup(number, 2, CPU, meeting=world),
            group=Group(0, 1, CPU),
            store=store,
            number=0,
            timeout_seconds=10,
            stop=Stop(),
        ).hand_out(
            turns_of(range(12)),
            evaluated=whole(lambda member: evaluate(number, member)),
            on_result=told_now.append,
            timer=PhaseTimer(),
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(order) >= 2
    assert order[0] < order[1], "what the other had done was known before rank 0 ended its second member"
    assert len(told_now) == 12


def test_each_member_is_started_before_the_one_before_it_is_finished():
    log = []

    def start(turn):
        log.append(("start", turn))
        return turn

    def finish(turn, _):
        log.append(("finish", turn))
        return None if turn == 2 else [result_of(turn)]

    found = list(pipelined(range(4), start=start, finish=finish))
    assert found == [None if turn == 2 else [result_of(turn)] for turn in range(4)]
    starts, finishes = [[m for what, m in log if what == word] for word in ("start", "finish")]
    assert starts == finishes == [0, 1, 2, 3]
    for turn in range(3):
        assert log.index(("finish", turn)) == log.index(("start", turn + 1)) + 1
    assert list(pipelined([], start=start, finish=finish)) == []


@pytest.mark.parametrize("num_members", [1, 2, 5])
def test_after_a_shortage_the_member_in_flight_is_finished_and_no_other_is_started(num_members):
    started, told = [], []

    def start(turn):
        started.append(turn[0][0])
        return turn[0][0]

    world = Group(0, 1, CPU)
    evaluator = SimpleNamespace(engine=SimpleNamespace(group=world))
    mesh = Mesh(world, world)
    scheduler = MemberScheduler(evaluator, mesh=mesh, timeout_seconds=1, stop=Stop(), timer=PhaseTimer())

    def evaluated(turns):
        return pipelined(
            turns, start=start, finish=lambda _, member: None if member == 0 else [result_of(member)]
        )

    found = scheduler._evaluate_turns(turns_of(range(num_members)), evaluated, told.append)
    assert started == [0, 1][:num_members]
    assert found == {member: result_of(member) for member in started if member}
    assert told == list(found.values())


def test_after_a_shortage_nobody_draws_and_what_is_done_is_kept():
    evaluated = []

    def evaluate(rank, member):
        if rank == 2 and len(evaluated) >= 3:
            return None
        time.sleep(0.02)
        evaluated.append(member)
        return result_of(member)

    found, told = play(3, range(100), evaluate)
    assert found[0] == found[1] == found[2] == {member: result_of(member) for member in evaluated}
    assert 3 <= len(evaluated) < 20
    assert len(told) == len(evaluated)


@pytest.mark.parametrize("team_size", [1, 2])
def test_when_asked_to_stop_what_is_in_flight_is_finished_and_all_ranks_stop(team_size):
    stop, evaluated, told = Stop(), [], []

    def evaluate(rank, member):
        if rank == 3 and len(evaluated) >= 6:
            stop.reason = "SIGTERM"
        time.sleep(0.02)
        evaluated.append(member)
        return result_of(member)

    with pytest.raises(Stopped):
        play(4, range(100), evaluate, team_size=team_size, stop=stop, told=told)
    assert sorted(result.member for result in told) == sorted(set(evaluated)), "rank 0 has every result"
    assert 6 <= len(evaluated) < 20


def test_rank_0_does_not_wait_for_ever():
    begun, gone = threading.Event(), threading.Event()

    def evaluate(rank, member):
        if rank == 1:
            begun.set()
            gone.wait(3)
        else:
            begun.wait(10)  # so that each has members
        return result_of(member)

    try:
        with pytest.raises(TimeoutError, match=r"parallel\.timeout_seconds\), and 1 of 2 groups"):
            play(2, range(4), evaluate, timeout_seconds=0.3)
    finally:
        gone.set()
