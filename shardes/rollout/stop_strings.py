"""Texts that end an answer."""

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Finds where one of several texts first appears in an answer.

    Args:
        texts: The texts; none of them empty.
        tokenizer: Turns tokens into text.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        self._texts = tuple(texts)
        self._tokenizer = tokenizer
        # A token is at least one byte, and a character at most four.
        self._reach = 4 * max(map(len, texts), default=0)

    def __bool__(self) -> bool:
        return bool(self._texts)

    def find(self, tokens: Sequence[int], *, start: int = 0) -> int | None:
        """How many tokens there are up to the one that completes a text; None if none does.

        Args:
            tokens: An answer.
            start: Tokens that are known to complete none.
        """
        low = max(0, start - self._reach)
        if not self._texts or not self._is_in(tokens[low:]):
            return None
        return next(end for end in range(start + 1, len(tokens) + 1) if self._is_in(tokens[low:end]))

    def trim(self, text: str) -> str:
        """An answer up to and including the first of the texts."""
        ends = [place + len(stop) for stop in self._texts if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def _is_in(self, tokens: Sequence[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return any(stop in text for stop in self._texts)
