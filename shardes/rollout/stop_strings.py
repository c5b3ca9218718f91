"""Texts that end an answer, looked for in its last tokens while it grows."""

from collections.abc import Sequence
from typing import Any

from shardes.config.schema import RolloutConfig

# Stands in decoded text for bytes that are no character, or none yet.
NO_CHARACTER = "\ufffd"
# Tokens that a check decodes, at most; more where their text is shorter than it must be.
TOKENS_PER_WINDOW = 32
# A character is at most four bytes, and a token at least one: one of so many tokens begins a character.
TOKENS_PER_CHARACTER = 4
# Characters before the end of a text around which later tokens may still remove spaces ("do n", "don't"):
# more than all of a tokenizer's replacements, one after the other, reach back.
UNSETTLED_CHARACTERS = 16
# Tokens between two places at which it is seen that no text has ended since the one before.
TOKENS_PER_STRIDE = 16


def make_stop_strings(settings: RolloutConfig, tokenizer: Any) -> "StopStrings":
    """Return the finder of the texts that end an answer by the section ``rollout``."""
    return StopStrings(settings.stop, tokenizer, skip_special_tokens=settings.skip_special_tokens)


class StopStrings:
    """Finds where one of several texts first appears in an answer.

    Args:
        texts: The texts; none of them empty. One that has the text of a special token in it is looked for in
            the text of all tokens.
        tokenizer: Turns tokens into text.
        skip_special_tokens: Whether an answer's text is without special tokens.

    Attributes:
        reach: Characters, spaces not counted, at the end of an answer in which a text may begin that is not
            complete yet.
        of_all_tokens: Finder of the texts that have special tokens in them, where an answer's text is without
            these; None if there are none.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._all_texts = tuple(texts)
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        special = _special_texts(tokenizer) if skip_special_tokens else frozenset()
        hidden = [text for text in texts if any(token in text for token in special)]
        self.of_all_tokens = StopStrings(hidden, tokenizer, skip_special_tokens=False) if hidden else None
        self._texts = tuple(text for text in texts if text not in hidden)
        # A text with a broken character may come and go with any token: it may always be there.
        self._spaceless = ["" if NO_CHARACTER in text else text.replace(" ", "") for text in self._texts]
        self.reach = max(map(len, self._spaceless), default=0) + UNSETTLED_CHARACTERS

    def __bool__(self) -> bool:
        return bool(self._all_texts)

    def find(self, tokens: Sequence[int]) -> int | None:
        """Return the number of tokens up to the one that first completes a text; None if none does.

        Args:
            tokens: An answer.
        """
        ends = [self._find(tokens), self.of_all_tokens.find(tokens) if self.of_all_tokens else None]
        return min((end for end in ends if end is not None), default=None)

    def _find(self, tokens: Sequence[int]) -> int | None:
        """Return the same for the texts that have no special token in them."""
        if not self._texts or not self.is_in(tokens):
            return None
        answer = GrowingAnswer(self)
        for start in range(0, len(tokens), TOKENS_PER_STRIDE):
            stride = tokens[start : start + TOKENS_PER_STRIDE]
            window = answer.extend(stride)
            # Where no character is broken, fewer tokens had the beginning of this text.
            if NO_CHARACTER in window or self.may_be_in(window):
                for end in range(start + 1, start + len(stride) + 1):
                    if self.is_in(tokens[:end]):
                        return end
        return len(tokens)

    def trim(self, text: str) -> str:
        """Return an answer up to and including the first of the texts."""
        ends = [place + len(stop) for stop in self._all_texts if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def is_in(self, tokens: Sequence[int]) -> bool:
        """Return whether a text without special tokens is in that of the tokens."""
        text = self.decode(tokens)
        return any(stop in text for stop in self._texts)

    def may_be_in(self, spaceless: str) -> bool:
        """Return whether one of the texts is in a text whose spaces, and theirs, were removed."""
        return any(stop in spaceless for stop in self._spaceless)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens)
        return text


class GrowingAnswer:
    """An answer, and the window of its last tokens that a check decodes instead of all of it.

    Nothing may be missed because a window begins where it does. Tokenizers set spaces by what comes before
    and after, so spaces are not compared, and what is found is looked for once more in all of the answer. And
    a window is shortened only if the characters in which a text may begin stay as they were; one that cannot
    be shortened grows to all of the answer.

    Args:
        stop: What is looked for.
    """

    def __init__(self, stop: StopStrings) -> None:
        self._stop = stop
        self._of_all_tokens = GrowingAnswer(stop.of_all_tokens) if stop.of_all_tokens else None
        self._tokens: list[int] = []
        self._start = 0
        self._max_tokens = TOKENS_PER_WINDOW

    def has_stopped(self, tokens: Sequence[int]) -> bool:
        """Append tokens; return whether a text is in the answer, if none was before."""
        has_special = self._of_all_tokens is not None and self._of_all_tokens.has_stopped(tokens)
        return (self._stop.may_be_in(self.extend(tokens)) and self._stop.is_in(self._tokens)) or has_special

    def extend(self, tokens: Sequence[int]) -> str:
        """Append tokens; return the text of a window in which they can complete a text, without spaces."""
        self._tokens += tokens
        window = self._decode(self._start)
        # Some tokenizers show a run of characters as broken until its last one is complete.
        if len(self._tokens) - self._start >= self._max_tokens and not window.endswith(NO_CHARACTER):
            self._shorten(window[-self._stop.reach :])
        return window

    def _shorten(self, tail: str) -> None:
        """Begin the window where its text still ends with the tail, or else let it grow."""
        middle = len(self._tokens) - self._max_tokens // 2
        for start in range(middle, middle + TOKENS_PER_CHARACTER):
            if self._decode(start).endswith(tail):
                self._start = start
                return
        self._max_tokens += self._max_tokens // 2

    def _decode(self, start: int) -> str:
        return self._stop.decode(self._tokens[start:]).replace(" ", "")


def _special_texts(tokenizer: Any) -> frozenset[str]:
    """Return the texts of the tokens that are left out of text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {token.content for token in added if token.special}
    return frozenset(texts.union(getattr(tokenizer, "all_special_tokens", ()))) - {""}
