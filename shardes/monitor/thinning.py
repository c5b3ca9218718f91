"""Fewer points for a picture of a long run, none of whose extremes may get lost."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from shardes.monitor.plot import Point

_JOINED: dict[str, Callable[[Sequence[float]], float]] = {"reward_min": min, "reward_max": max}


def thinned(points: Mapping[int, Point], *, most: int) -> tuple[dict[int, Point], int]:
    """Join neighbouring iterations, so that at most about ``most`` of them remain.

    Of the iterations that are joined, ``reward_min`` is the lowest and ``reward_max`` the highest value, and
    any other metric the mean of what is known. The last point stays as it is.

    Args:
        points: Metrics by iteration, in order of iterations; at least one.
        most: Number of points that is enough.

    Returns:
        The points, and the number of iterations that each stands for.
    """
    first, *_, last = [min(points), *points]
    step = -(-(last - first + 1) // most)
    if step == 1:
        return dict(points), 1
    groups: dict[int, list[Point]] = {}
    for iteration, point in points.items():
        groups.setdefault(iteration if iteration == last else iteration // step * step, []).append(point)
    return {iteration: _joined(group) for iteration, group in groups.items()}, step


def _joined(group: Sequence[Point]) -> Point:
    names = dict.fromkeys(name for point in group for name in point)
    return {
        name: _JOINED.get(name, fmean)([point[name] for point in group if name in point]) for name in names
    }
