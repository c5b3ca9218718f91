"""Prompts and completions as tokens: rendered by the chat template, tokenised, checked, and remembered."""

import datetime
import functools
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.rollout.rendering import ChatRenderer, Tools
from shardes.tasks.base import ChatTemplate, Prompt, Row, Task, as_text
from shardes.utils.limits import SECONDS, limited_map
from shardes.utils.memo import Memo

# A tag that a template has opened for the model: a thought that only the model closes.
_OPENED = re.compile(
    r"(?:<\|?(?:\w+:)?(?:think|thinking|thought|reason|reasoning)\|?>|\[THINK\]"
    r"|\N{WHITE LEFT-POINTING TRIANGLE}think\N{WHITE RIGHT-POINTING TRIANGLE})\s*\Z"
)
# Texts between the answers of episodes whose tokens are remembered, and their characters at most.
_NUM_REMEMBERED = 1 << 16
_MOST_REMEMBERED = 256
# Tokens at the end of a prompt in which such a tag is looked for.
_NUM_LAST_TOKENS = 16

Ids: TypeAlias = "array[int]"


@dataclass(frozen=True)
class Question:
    """What a model is asked: a prompt to answer, or completions of it to score.

    Attributes:
        prompt: Text, or chat messages.
        chat: The template that chat messages go through.
        completions: Texts to score; None: the prompt is to be answered.
    """

    prompt: Prompt
    chat: ChatTemplate
    completions: tuple[str, ...] | None = None

    @classmethod
    def of(cls, task: Task, row: Row) -> Self:
        """Return what a task asks about a row."""
        completions = None if task.choices is None else tuple(task.choices(row).completions)
        return cls(task.make_prompt(row), task.chat, completions)

    @property
    def key(self) -> bytes:
        """Return a hash that other questions do not have."""
        parts = [self.prompt, self.chat.name, dict(self.chat.arguments), self.completions]
        return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class EncodedQuestion:
    """Tokens of a question.

    Attributes:
        prompts: Token ids of the prompt; for completions, those that each completion follows.
        completions: Token ids of each completion; none for a prompt to be answered.
        opened: The tag that the chat template has opened for the answer, such as ``<think>`` and a line
            break; empty if none.
    """

    prompts: tuple[Ids, ...]
    completions: tuple[Ids, ...] = ()
    opened: str = ""

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens; for completions, of the longest one with its prompt."""
        if not self.completions:
            return len(self.prompts[0])
        return max(len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True))

    def to_json(self) -> list[Any]:
        """Return an object that JSON keeps as it is, for ``from_json``."""
        return [[list(ids) for ids in part] for part in (self.prompts, self.completions)] + [self.opened]

    @classmethod
    def from_json(cls, record: Sequence[Any]) -> Self:
        """Return the question of which ``to_json`` made an object."""
        prompts, completions, opened = record
        return cls(_arrays(prompts), _arrays(completions), opened)


class PromptEncoder:
    """Turns questions into tokens, and remembers them.

    Text that stands for special tokens is read as these. Where a tokenizer puts tokens around a text, those
    before it are kept, once, and those after it are not: a prompt does not end.

    Args:
        tokenizer: The model's tokenizer.
        date: What templates are told is today's date; None: today's.
        max_positions: Tokens of a prompt and its answer that the model was made for; None: any number.
        num_tokens: Tokens that the model knows; None: any.

    Attributes:
        tokenizer: The model's tokenizer.
        chats: Renders chats.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        date: datetime.date | None = None,
        max_positions: int | None = None,
        num_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chats = ChatRenderer(tokenizer, date=date or datetime.datetime.now().date())
        self._max_positions = max_positions
        self._num_tokens = num_tokens
        self._known: dict[bytes, EncodedQuestion] = {}
        # What members of an iteration are told in their episodes is much the same.
        self._followings: Memo[tuple[str, int | None], list[int]] = Memo(_NUM_REMEMBERED)

    @functools.cached_property
    def longest_token(self) -> int:
        """Return how many characters one token stands for at most."""
        return max(map(len, self.tokenizer.get_vocab()))

    @property
    def told_date(self) -> str | None:
        """Return the date that templates were told, in ISO format; None if none has asked for it."""
        return self.chats.date.isoformat() if self.chats.has_told_date else None

    def settle_date(self, world: Group) -> None:
        """Take over rank 0's date, encoding again what depends on it; a collective of all ranks."""
        date = datetime.date.fromisoformat(world.broadcast_json(self.chats.date.isoformat()))
        if date != self.chats.date and self.chats.has_told_date:
            self._known.clear()
        self.chats.date = date

    def encode(self, question: Question) -> EncodedQuestion:
        """Return a question's tokens.

        Raises:
            UserError: It has no tokens, or too many, or ones that the model does not know; or the chat
                template fails.
        """
        key = question.key
        if key not in self._known:
            self._known[key] = self._encode(question)
        return self._known[key]

    def encode_ahead(self, questions: Sequence[Question]) -> Iterator[UserError | None]:
        """Encode questions under limits of time and memory; ``encode`` then has them at once.

        Yields:
            For each question, what is wrong with it, or None.

        Raises:
            LimitError: Encoding a question took too much time or memory.
        """

        def encoded(question: Question) -> list[Any]:
            try:
                return [self._encode(question).to_json(), None, self.chats.has_told_date]
            except UserError as error:
                return [None, str(error), self.chats.has_told_date]

        records = limited_map(encoded, questions, seconds=SECONDS)
        for question, (record, problem, has_told_date) in zip(questions, records, strict=True):
            self.chats.has_told_date |= has_told_date
            if problem is None:
                self._known[question.key] = EncodedQuestion.from_json(record)
                yield None
            else:
                yield UserError(problem)

    def text_tokens(self, text: str) -> list[int]:
        """Return the tokens of a text that begins a prompt, however many.

        Raises:
            UserError: It has none, or some that the model does not know; or the tokenizer fails.
        """
        return self._known_tokens(text, self._text_ids)

    def rendered_tokens(self, text: str) -> list[int]:
        """Return the tokens of what the chat template has made, however many.

        Raises:
            UserError: See ``text_tokens``.
        """
        return self._known_tokens(text, self._plain)

    def chat_tokens(
        self, messages: list[dict[str, Any]], chat: ChatTemplate, tools: Tools | None = None
    ) -> list[int]:
        """Return the tokens of a chat, however many, as the model is to answer or to continue it.

        Raises:
            UserError: There is no template, or it fails; or see ``text_tokens``.
        """
        if not self.chats.has_own_tokens:
            return self.rendered_tokens(self.chats.text(messages, chat, tools))
        ids = self.chats.tokens(messages, chat, tools)
        if not ids:
            raise UserError("the tokenizer makes no tokens of the chat")
        self.check_tokens(ids)
        return ids

    def following_tokens(self, text: str, after: int | None = None) -> list[int]:
        """Return the tokens of a text that goes on with another, computed without that one.

        Args:
            text: The text.
            after: The special token that it follows; None: a text.

        Raises:
            UserError: See ``text_tokens``.
        """
        if not text:
            return []
        if len(text) > _MOST_REMEMBERED:
            return self._following(text, after)
        return list(self._followings.get((text, after), lambda: self._following(text, after)))

    def _following(self, text: str, after: int | None) -> list[int]:
        # Some tokenizers put a space before a text's beginning, and some drop spaces after special tokens.
        before = "\n" if after is None else self.tokenizer.decode([after])
        start = self._plain(before)
        _check_text(text)
        both = self._plain(before + text)
        if not both or both[: len(start)] != start:
            return self._known_tokens(text, self._plain)
        added = both[len(start) :]
        if added:
            self._check_known(f"the text {text[:80]!r}", added)
        return added

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the model does not know.

        Raises:
            UserError: There are some.
        """
        self._check_known(f"the prompt {list(ids[:8])}", ids)

    def opened_tag(self, text: str) -> str:
        """Return the tag that the end of a rendered prompt opens for the answer; empty if there is none."""
        found = _OPENED.search(text)
        return found.group() if found else ""

    def sha256_of(self, task: Task) -> str:
        """Compute a hash of the tokens of a task's training rows, in their order."""
        digest = hashlib.sha256()
        for row in task.train:
            digest.update(json.dumps(self.encode(Question.of(task, row)).to_json()).encode())
        return digest.hexdigest()

    def _encode(self, question: Question) -> EncodedQuestion:
        prompt, completions = question.prompt, question.completions
        for text in [*_texts(prompt), *(completions or ())]:
            _check_text(text)
        if completions is None:
            ids = self._text_ids(prompt) if isinstance(prompt, str) else self._chat_ids(question)
            encoded = EncodedQuestion(_arrays([ids]), opened=self._opened(prompt, ids))
        else:
            is_chat = not isinstance(prompt, str) and bool(prompt)
            context = self.chats.text(prompt, question.chat) if is_chat else prompt or ""
            assert isinstance(context, str)
            pairs = [self._pair(context, completion, is_chat=is_chat) for completion in completions]
            encoded = EncodedQuestion(_arrays(start for start, _ in pairs), _arrays(ids for _, ids in pairs))
        self._check(question, encoded)
        return encoded

    def _chat_ids(self, question: Question) -> list[int]:
        if self.chats.has_own_tokens:
            return self.chats.tokens(question.prompt, question.chat)
        return self._plain(self.chats.text(question.prompt, question.chat))

    def _plain(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that the tokenizer puts around it."""
        return self._tokens(text, add_special_tokens=False)

    def _tokens(self, text: str, **arguments: Any) -> list[int]:
        try:
            return list(self.tokenizer(text, **arguments)["input_ids"])
        except MemoryError:
            raise
        except Exception as error:  # tokenizers raises plain exceptions
            raise UserError(
                f"the tokenizer fails for {text[:80]!r} ({type(error).__name__}: {error}); leave out what it "
                "does not know"
            ) from None

    def _known_tokens(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        _check_text(text)
        ids = encode(text)
        if not ids:
            raise UserError(f"the text {text[:80]!r} has no tokens")
        self._check_known(f"the text {text[:80]!r}", ids)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """Return the tokens of a text after those that the tokenizer puts before texts, each of them once."""
        plain, whole = self._plain(text), self._tokens(text)
        if whole == plain:
            return plain
        places = range(len(whole) - len(plain) + 1)
        start = next((at for at in places if whole[at : at + len(plain)] == plain), None)
        if start is None:  # it puts tokens within a text
            return whole
        before = whole[:start]
        return plain if plain[:start] == before else before + plain

    def _pair(self, context: str, completion: str, *, is_chat: bool) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of what follows it, cut from those of both together.

        A completion by itself would begin with what a tokenizer puts at the beginning of texts. White space
        at the end of a context that is a text goes to the completion, as a part of its first word's token.
        """
        kept = context if is_chat else context.rstrip()
        if not kept:
            return self._first(context + completion)
        encode = self._plain if is_chat else self._text_ids
        start, both = encode(kept), encode(context + completion)
        # Where the two are one token, there is nothing after the first.
        return start, both[len(start) :] or self._plain(completion)

    def _first(self, text: str) -> tuple[list[int], list[int]]:
        """Return what a text that nothing precedes follows, and its tokens."""
        tokens, bos = self._plain(text), self.tokenizer.bos_token_id
        return (tokens[:1], tokens[1:]) if bos is None or tokens[:1] == [bos] else ([bos], tokens)

    def _opened(self, prompt: Prompt, ids: Sequence[int]) -> str:
        """Return the tag that the template has opened after the messages; empty if there is none."""
        if isinstance(prompt, str) or prompt[-1]["role"] == "assistant":
            return ""
        found = _OPENED.search(self.tokenizer.decode(list(ids[-_NUM_LAST_TOKENS:])))
        return found.group() if found else ""

    def _check(self, question: Question, encoded: EncodedQuestion) -> None:
        prompt = f"the prompt {as_text(question.prompt)[:80]!r}"
        for i, start in enumerate(encoded.prompts):
            completion = None if question.completions is None else question.completions[i]
            ids = start if completion is None else start + encoded.completions[i]
            if not start:
                raise UserError(f"{prompt} has no tokens; give every problem a non-empty prompt")
            if completion is not None and not encoded.completions[i]:
                raise UserError(
                    f"the completion {completion!r} of {prompt} has no tokens to score; give every "
                    "completion some text"
                )
            self._check_known(prompt, ids)
            self._check_length(prompt, len(ids), is_scored=completion is not None)

    def _check_known(self, what: str, ids: Sequence[int]) -> None:
        known = self._num_tokens
        if known is not None and not 0 <= min(ids) <= max(ids) < known:
            token = next(token for token in ids if not 0 <= token < known)
            raise UserError(
                f"{what} has the token {self.tokenizer.convert_ids_to_tokens(token)!r} ({token}), but "
                f"the model has embeddings for {known} tokens only (vocab_size); use the model's own "
                "tokenizer, or prompts and a chat template without this token"
            )

    def _check_length(self, prompt: str, length: int, *, is_scored: bool) -> None:
        most = self._max_positions
        if most is None or length < most + is_scored:
            return
        what = f"{prompt} and a completion of it have" if is_scored else f"{prompt} has"
        raise UserError(
            f"{what} {length} tokens, but the model has {most} positions (max_position_embeddings)"
            f"{'' if is_scored else ', the answer included'}; shorten or drop "
            f"{'them' if is_scored else 'the prompt'}"
        )


def _arrays(lists: Iterable[Sequence[int]]) -> tuple[Ids, ...]:
    """Return token ids in little memory, and equal ones that follow each other once."""
    found: list[Ids] = []
    for ids in lists:
        packed = array("i", ids)
        found.append(found[-1] if found and found[-1] == packed else packed)
    return tuple(found)


def _texts(prompt: Prompt) -> Iterator[str]:
    """Yield the texts of a prompt."""
    if isinstance(prompt, str):
        yield prompt
    else:
        for message in prompt:
            yield from (value for value in message.values() if isinstance(value, str))


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{text[:80]!r} has half a surrogate pair at character {error.start + 1}, which is no text in "
            "UTF-8; mend or drop it"
        ) from None
