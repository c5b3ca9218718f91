"""Objects that are closed at the end of a ``with`` statement."""

from typing import Self


class Closing:
    """A context manager that closes itself."""

    def close(self) -> None:
        """Close it; there is nothing to do unless a class says so."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
