"""A memory of what was computed, with room for so many entries."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Memo(Generic[K, V]):
    """Remembers the values of a pure function; when it is full, it begins anew.

    Args:
        most: Entries at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[K, V] = {}

    def get(self, key: K, compute: Callable[[], V]) -> V:
        """Return the value of a key, computed unless it is known."""
        if key not in self._known:
            value = compute()
            if len(self._known) >= self._most:
                self._known.clear()
            self._known[key] = value
        return self._known[key]
