"""Racing: who goes on answering after a portion of the problems, and what those that stopped would earn.

Everything is a pure function of what members have earned so far, with exact sums: the same on every rank, and
again when a run is resumed.

A *contrast* is what weighs in an update: a member's distance from the mean reward, or with antithetic members
the difference between the two of a pair.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from shardes.config.es import RacingConfig


@dataclass(frozen=True)
class Standing:
    """State of a race after a round.

    Attributes:
        rewards: Reward of each member, estimated for the answers asked so far where it was not asked all of
            them; None if it has none.
        racing: Members that go on, ascending.
        squared_error: Expected sum, over contrasts, of the squared change that the answers make which those
            that stopped were not asked; None if it cannot be told.
    """

    rewards: Sequence[float | None]
    racing: Sequence[int]
    squared_error: float | None = 0.0


@dataclass(frozen=True)
class Round:
    """Results of a round, over all answers so far.

    Attributes:
        earned: Reward, over all answers so far, of each member that took part; None if it has none.
        by_problem: For those of them that have a reward, that of each problem; None where it does not count,
            or was not asked yet.
        broken: Those of them whose logits were not finite.
        asked_before: Part of an iteration's answers that were asked before this round, from 0 to 1.
        asked: The same, with this round.
    """

    earned: Mapping[int, float | None]
    by_problem: Sequence[Sequence[float | None]]
    broken: Collection[int]
    asked_before: float
    asked: float


def begin(num_members: int) -> Standing:
    """Return where a race stands before its first round."""
    return Standing([None] * num_members, range(num_members))


def advance(standing: Standing, found: Round, *, settings: RacingConfig, antithetic: bool) -> Standing:
    """Compute where a race stands after a round.

    Members whose logits were not finite stop. Of the others that can be compared, ``settings.keep`` go on, or
    more if ``settings.tolerance`` wants it; what cannot be compared, because there is no reward, goes on.

    Args:
        standing: Where it stood before.
        found: What is known after it.
        settings: Section ``es.racing``.
        antithetic: Whether members 2n and 2n + 1 are a pair.
    """
    share = found.asked_before / found.asked
    rewards = estimated(standing.rewards, found.earned, share=share)
    racing = [member for member in found.earned if member not in found.broken]
    if found.asked == 1:
        return Standing(rewards, racing, standing.squared_error)
    error, most = standing.squared_error, None
    of_one = _error_of_one(found, antithetic=antithetic)
    if settings.tolerance is not None:
        num_units = len(_compared(rewards, racing, antithetic=antithetic))
        length = _squared_length(rewards, antithetic=antithetic)
        most = _affordable(length, error, of_one, num_units=num_units, tolerance=settings.tolerance)
    going = going_on(rewards, racing, settings=settings, antithetic=antithetic, most_stopping=most)
    num_stopping = (len(racing) - len(going)) // (2 if antithetic else 1)
    if num_stopping:
        error = None if error is None or of_one is None else error + num_stopping * of_one
    return Standing(rewards, going, error)


def estimated(
    earlier: Sequence[float | None], earned: Mapping[int, float | None], *, share: float
) -> list[float | None]:
    """Estimate what each member would have earned by all answers that were asked so far.

    For members that took part in the last round this is known. For the others it is read off the straight
    line by which the rewards of these follow from their rewards before the round (least squares). Who takes
    part was decided by the latter, which does not bias such a line: as the regression estimator of two-phase
    sampling (Cochran 1977, Sampling Techniques, section 12.6) it allows for portions of different difficulty,
    and for the luck of those that were ahead. Its slope is held between ``share`` and 1, that is, between new
    answers that say nothing of a member and new answers that say the same as the old ones.

    Args:
        earlier: Reward of each member before the round; None if it has none.
        earned: Reward after it, by member that took part.
        share: Part of the answers that were asked before the round, from 0 to 1.
    """
    known = [(earlier[member], reward) for member, reward in earned.items()]
    line = _line([(x, y) for x, y in known if x is not None and y is not None], least_slope=share)
    return [
        earned[member] if member in earned else None if reward is None else line(reward)
        for member, reward in enumerate(earlier)
    ]


def going_on(
    rewards: Sequence[float | None],
    racing: Sequence[int],
    *,
    settings: RacingConfig,
    antithetic: bool,
    most_stopping: int | None = None,
) -> list[int]:
    """Choose who goes on: those with the largest contrasts, as many above the middle as below.

    Args:
        rewards: Reward of each member so far; None if it has none.
        racing: Members that could go on.
        settings: Section ``es.racing``.
        antithetic: Whether the two members of a pair go on, or stop, together.
        most_stopping: Largest number of members (or pairs) that stop; None: no limit.

    Returns:
        Members that go on, ascending.
    """
    compared = _compared(rewards, racing, antithetic=antithetic)
    num_stopping = len(compared) - settings.num_kept(len(compared))
    if most_stopping is not None:
        num_stopping = min(num_stopping, most_stopping)
    num_going = len(compared) - num_stopping
    if antithetic:
        stopping = sorted(compared, key=lambda unit: (-abs(compared[unit]), unit))[num_going:]
    else:
        in_order = sorted(compared, key=lambda unit: (compared[unit], unit))
        stopping = in_order[num_going // 2 : num_going // 2 + num_stopping]
    stopped = {member for unit in stopping for member in unit}
    return sorted(set(racing) - stopped)


def relative_error(standing: Standing, *, antithetic: bool) -> float | None:
    """Return how much the missing answers are expected to change the update, as a part of its length.

    Returns:
        The root of the expected squared change of the contrasts over their sum of squares; None if that
        cannot be told.
    """
    if standing.squared_error is None:
        return None
    if standing.squared_error == 0:
        return 0.0
    length = _squared_length(standing.rewards, antithetic=antithetic)
    return math.sqrt(standing.squared_error / length) if length else None


def _compared(
    rewards: Sequence[float | None], members: Sequence[int], *, antithetic: bool
) -> dict[tuple[int, ...], float]:
    """Return what members, or pairs, are compared by: their reward, or their difference."""
    if not antithetic:
        return {(member,): reward for member in members if (reward := rewards[member]) is not None}
    found: dict[tuple[int, ...], float] = {}
    present = set(members)
    for first in (member for member in members if member % 2 == 0 and member + 1 in present):
        one, other = rewards[first], rewards[first + 1]
        if one is not None and other is not None:
            found[first, first + 1] = one - other
    return found


def _squared_length(rewards: Sequence[float | None], *, antithetic: bool) -> float | None:
    """Return the sum of the squared contrasts of all members; None if it is too large for a number."""
    values = list(_compared(rewards, range(len(rewards)), antithetic=antithetic).values())
    try:
        mean = 0.0 if antithetic or not values else math.fsum(values) / len(values)
        return math.fsum((value - mean) ** 2 for value in values)
    except OverflowError:
        return None


def _affordable(
    length: float | None, error: float | None, of_one: float | None, *, num_units: int, tolerance: float
) -> int:
    """Return how many of those that race may stop.

    Args:
        length: Sum of the squared contrasts so far, None if not known.
        error: Expected squared change of those that have stopped.
        of_one: The same of each that stops now. By as much, luck makes the contrasts longer than they will be
            when all is answered.
        num_units: Number of members, or pairs, that race and can be compared.
        tolerance: ``es.racing.tolerance``.
    """
    if length is None or error is None or of_one is None:
        return 0
    left = tolerance**2 * (length - error - num_units * of_one) - error
    if left < 0 or of_one == 0:
        return 0 if left < 0 else num_units
    return math.floor(min(left / of_one, float(num_units)))


def _error_of_one(found: Round, *, antithetic: bool) -> float | None:
    """Return the expected squared change of a contrast by the answers that have not been asked yet.

    The mean over p problems drawn from P differs from the mean over all of them by ``v (1/p - 1/P)`` in the
    mean square, v the variance of a member's rewards about what members and problems explain.
    """
    variance = residual_variance(found.by_problem)
    if variance is None:
        return None
    num_problems = len(found.by_problem[0])
    members = 2 if antithetic else 1
    return members * variance * (1 / found.asked - 1) / num_problems


def residual_variance(rows: Sequence[Sequence[float | None]]) -> float | None:
    """Return the residual variance of a two-way table members x problems without interaction.

    Args:
        rows: Rewards of each member by problem; problems that not all have a reward for are left out.

    Returns:
        The residual mean square; None with fewer than two members or problems, or if it is too large for a
        number.
    """
    columns = [column for column in zip(*rows, strict=True) if None not in column]
    num_rows, num_columns = len(rows), len(columns)
    if num_rows < 2 or num_columns < 2:
        return None
    table = [[float(value or 0.0) for value in row] for row in zip(*columns, strict=True)]
    try:
        of_columns = [math.fsum(column) / num_rows for column in zip(*table, strict=True)]
        mean = math.fsum(of_columns) / num_columns
        squares = []
        for row in table:
            shift = math.fsum(row) / num_columns - mean
            squares += [(value - column - shift) ** 2 for value, column in zip(row, of_columns, strict=True)]
        return math.fsum(squares) / ((num_rows - 1) * (num_columns - 1))
    except OverflowError:
        return None


def _line(points: Sequence[tuple[float, float]], *, least_slope: float) -> Callable[[float], float]:
    """Return the straight line through points by least squares, of a slope from ``least_slope`` to 1."""
    if not points:
        return lambda x: x
    scale = max(max(abs(x), abs(y)) for x, y in points) or 1.0  # so that no square is too large
    xs, ys = [x / scale for x, _ in points], [y / scale for _, y in points]
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    spread = math.fsum((x - mean_x) ** 2 for x in xs)
    slope = 1.0
    if spread > 0:
        moments = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
        slope = min(max(moments / spread, least_slope), 1.0)
    return lambda x: (mean_y + slope * (x / scale - mean_x)) * scale
