"""How far something long has come: a bar on a terminal, a line of the log now and then elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

# Where there is no terminal, how often a line of the log says how far it is; shorter work has none.
_SECONDS_BETWEEN_LINES = 10.0
# What takes less is over before anybody reads a bar.
_SECONDS_BEFORE_BAR = 1.0

logger = logging.getLogger(__name__)

T = TypeVar("T")


def progress(items: Iterable[T], *, what: str, total: int, unit: str) -> Iterator[T]:
    """Passes items on, and shows on rank 0 how many have been dealt with.

    Args:
        items: What is worked on, one after the other.
        what: What is done with them, such as ``"loading weights"``.
        total: How many there are.
        unit: What one of them is, in the plural.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(
            items, desc=what, total=total, unit=f" {unit}", leave=False, delay=_SECONDS_BEFORE_BAR
        )
    else:
        start = last = time.monotonic()
        for number, item in enumerate(items):
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES:
                last = now
                left = duration((now - start) / number * (total - number)) if number else "?"
                logger.info("%s: %d of %d %s, about %s left", what, number, total, unit, left)
            yield item


def duration(seconds: float) -> str:
    """A time for people, in its two largest units: ``"0.9 s"``, ``"42 s"``, ``"7 min"``, ``"3 h 20 min"``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
