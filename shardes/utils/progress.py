"""Progress of long work: a bar on a terminal, and now and then a log line elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

# Interval of log lines where there is no terminal; shorter work has none.
_SECONDS_BETWEEN_LINES = 10.0
# Shorter work is over before anybody reads a bar.
_SECONDS_BEFORE_BAR = 1.0

logger = logging.getLogger(__name__)

T = TypeVar("T")


def progress(items: Iterable[T], *, what: str, total: int, unit: str) -> Iterator[T]:
    """Yield the items, and show on rank 0 how many have been processed.

    Args:
        items: Items to process, one after the other.
        what: Description of the work, such as ``"loading weights"``.
        total: Number of items.
        unit: Noun for the items, in the plural.
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
    """Format a time in its two largest units: ``"0.9 s"``, ``"42 s"``, ``"7 min"``, ``"3 h 20 min"``."""
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
