"""One episode's context as tokens: what the model is asked next, after each of its answers."""

from collections.abc import Collection, Sequence
from typing import Any

from shardes.environments.base import Message, Observation
from shardes.errors import UserError
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.rendering import Tools
from shardes.rollout.tool_calls import parse_tool_calls
from shardes.tasks.base import ChatTemplate

# Names of a message's thoughts, which templates may drop once the turn is over.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class ConversationError(Exception):
    """An episode cannot be asked on: its template refuses what was said, or the model has no such token."""


class Conversation:
    """Context of an episode, which grows by what the model answers and by what the environment says.

    The tokens of an answer stay those that were sampled, and the chat template's text between two answers
    (the close of the assistant's turn, the new messages, and the opening of its next turn) is appended as
    tokens of its own, so that the earlier tokens stay the same. Templates that write earlier turns anew
    (without their thoughts or the white space at their ends, say) are found by comparing texts; then the
    whole conversation is encoded again, and is what the template makes of it.

    Call ``begin`` first, and then ``answer`` and ``observe`` in turn.

    Args:
        encoder: Turns texts into tokens.
        chat: The template that messages go through.
        tools: JSON schemas of what the model may call; None: nothing.
        as_chat: Makes texts messages of the user. Without it, a conversation that begins with a text is
            a text, which answers and observations are appended to.
        end_ids: Tokens that end an answer. One that the template does not put there is taken away.

    Attributes:
        tokens: What the model is asked next; after ``answer``, what it was asked and what it said.
        messages: The conversation for people to read; texts of a conversation without a template are
            messages of the user.
        opened: The tag that the template has opened for the next answer, such as ``<think>`` and a line
            break; empty if none.
        num_reencoded: Times that the whole was encoded again.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        chat: ChatTemplate,
        tools: Tools | None = None,
        *,
        as_chat: bool = False,
        end_ids: Collection[int],
    ) -> None:
        self._encoder = encoder
        self._chat = chat
        self._tools = tools or None
        self._is_chat = as_chat or bool(tools)
        self._end_ids = frozenset(end_ids)
        self.tokens: list[int] = []
        self.messages: list[Message] = []
        self.opened = ""
        self.num_reencoded = 0
        # The messages as the template is given them, and the text that it made of them for the last question.
        self._given: list[Message] = []
        self._asked = ""
        self._asked_ids: list[int] = []
        # The last answer: its text without the token that ended it, and this token.
        self._said = ""
        self._end: int | None = None
        self._candidates: list[Message] = []

    @property
    def longest_token(self) -> int:
        """Return how many characters one token stands for at most."""
        return self._encoder.longest_token

    def begin(self, observation: Observation) -> None:
        """Begin with what the environment says first.

        Raises:
            ConversationError: The template refuses it, or it has no tokens, or some that the model does not
                know.
            UserError: There is no chat template for messages.
        """
        self._is_chat |= not isinstance(observation, str)
        self.messages = as_messages(observation)
        if not self._is_chat:
            assert isinstance(observation, str)
            self.tokens = self._checked(self._encoder.text_tokens, observation)
            return
        self._encoder.chats.check_template(self._chat.name, has_tools=self._tools is not None)
        self._given = list(self.messages)
        if self._encoder.chats.has_own_tokens:
            self.tokens = self._own_tokens(self._given)
        else:
            self._encode_anew(self._rendered(self._given), self._given)

    def answer(self, token_ids: Sequence[int], text: str, message: Message | None = None) -> None:
        """Take in an answer.

        Args:
            token_ids: What was sampled, with the token that ended it, if one did.
            text: Its text, for people to read.
            message: The same as a message, if the model may call tools; see ``parse_tool_calls``.
        """
        ids = list(token_ids)
        self._end = ids[-1] if ids and ids[-1] in self._end_ids else None
        self._said = self._decoded(ids if self._end is None else ids[:-1])
        self.messages = [*self.messages, message or {"role": "assistant", "content": text}]
        self._candidates = self._answers(message)
        self._asked_ids = self.tokens
        self.tokens = [*self.tokens, *ids]

    def observe(self, observation: Observation) -> None:
        """Take in what the environment says next.

        Raises:
            ConversationError: See ``begin``.
        """
        said = as_messages(observation)
        self.messages = [*self.messages, *said]
        if self._is_chat:
            self._observe_messages(said)
        elif isinstance(observation, str):
            self._drop_end()
            if observation:
                self.tokens = [*self.tokens, *self._checked(self._encoder.following_tokens, observation)]
        else:
            raise ConversationError(
                "the episode began with a text, but the environment then returned messages; let it return "
                'one or the other, or make chats of texts with task.system: ""'
            )

    def _observe_messages(self, said: list[Message]) -> None:
        if self._encoder.chats.has_own_tokens:
            self._given = [*self._turn(self._candidates[0]), *said]
            whole = self._own_tokens(self._given)
            self.num_reencoded += whole[: len(self.tokens)] != self.tokens
            self.tokens = whole
            return
        first, *others = [[*self._turn(candidate), *said] for candidate in self._candidates]
        wanted = self._rendered(first)
        start = self._asked + self._said
        if wanted.startswith(start):
            self._append(wanted, first)
            return
        for given in others:
            try:
                text = self._rendered(given)
            except ConversationError:
                continue
            if text.startswith(start) and self._is_same(wanted, text[len(start) :]):
                self._append(text, given)
                return
        self.num_reencoded += 1
        self._encode_anew(wanted, first)

    def _is_same(self, wanted: str, suffix: str) -> bool:
        """Return whether a text differs from the wanted one in how the answer is written, and only there."""
        if not (wanted.startswith(self._asked) and wanted.endswith(suffix)):
            return False
        written = wanted[len(self._asked) : len(wanted) - len(suffix)]
        return self._parsed(written) == self._parsed(self._said)

    def _parsed(self, text: str) -> Message:
        """Return what an answer of this text says and calls, apart from white space around it."""
        tokenizer = self._encoder.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        message = parse_tool_calls(text, ids, tokenizer, prefix=self._asked_ids, tools=self._tools)
        return {key: value.strip() if isinstance(value, str) else value for key, value in message.items()}

    def _append(self, text: str, given: list[Message]) -> None:
        """Go on with what a text has after the answer, whose tokens stay."""
        suffix = text[len(self._asked) + len(self._said) :]
        after = None
        if self._end is not None:
            end = self._decoded([self._end])
            if suffix.startswith(end):
                after, suffix = self._end, suffix[len(end) :]
            else:
                self._drop_end()
        added = self._checked(lambda text: self._encoder.following_tokens(text, after), suffix)
        self.tokens = [*self.tokens, *added]
        self._ask(text, given)

    def _encode_anew(self, text: str, given: list[Message]) -> None:
        self.tokens = self._checked(self._encoder.rendered_tokens, text)
        self._ask(text, given)

    def _ask(self, text: str, given: list[Message]) -> None:
        self._asked, self._given = text, given
        is_continued = given[-1]["role"] == "assistant"
        self.opened = "" if is_continued else self._encoder.opened_tag(text)

    def _drop_end(self) -> None:
        if self._end is not None:
            self.tokens = self.tokens[:-1]
            self._end = None

    def _turn(self, answer: Message) -> list[Message]:
        """Return the messages up to the answer; one that the environment has begun is a part of it."""
        if self._given[-1]["role"] != "assistant":
            return [*self._given, answer]
        *earlier, begun = self._given
        content = f"{begun.get('content') or ''}{answer.get('content') or ''}"
        return [*earlier, {**begun, **answer, "content": content}]

    def _answers(self, message: Message | None) -> list[Message]:
        """Return the answer as messages for the template: what it should be, and what may look the same."""
        plain = {"role": "assistant", "content": self.opened + self._said}
        if message is None or not any(message.get(key) for key in ("tool_calls", *_THOUGHTS)):
            return [plain]
        structured = {key: value for key, value in message.items() if key != "tool_call_error"}
        content = structured.get("content") or ""
        has_thoughts = any(message.get(key) for key in _THOUGHTS)
        if self.opened and not has_thoughts and not content.startswith(self.opened):
            structured["content"] = self.opened + content
        return [structured, plain]

    def _rendered(self, given: list[Message]) -> str:
        return self._checked(lambda each: self._encoder.chats.text(each, self._chat, self._tools), given)

    def _own_tokens(self, given: list[Message]) -> list[int]:
        return self._checked(lambda each: self._encoder.chat_tokens(each, self._chat, self._tools), given)

    def _checked(self, function: Any, argument: Any) -> Any:
        try:
            return function(argument)
        except UserError as error:
            raise ConversationError(str(error)) from None

    def _decoded(self, ids: Sequence[int]) -> str:
        decoded: str = self._encoder.tokenizer.decode(list(ids), skip_special_tokens=False)
        return decoded


def num_characters(observation: Observation) -> int:
    """Return how many characters the texts of an observation have."""
    return sum(
        len(part)
        if isinstance(part, str)
        else len(str(part.get("text", "")))
        if isinstance(part, dict)
        else 0
        for message in as_messages(observation)
        for part in _parts(message)
    )


def shortened(observation: Observation, num: int) -> Observation:
    """Return an observation for people to read, with so many characters of each text at most."""
    if isinstance(observation, str):
        return observation[:num]
    texts = ["".join(str(part) for part in _parts(message)) for message in observation]
    return [{**each, "content": text[:num]} for each, text in zip(observation, texts, strict=True)]


def _parts(message: Message) -> list[Any]:
    """Return what a message is made of: one text, or parts of several kinds."""
    content = message.get("content") or []
    return [content] if isinstance(content, str) else content


def as_messages(observation: Observation) -> list[Message]:
    """Return an observation as messages, text as one of the user.

    Raises:
        ConversationError: There is none.
    """
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    if not observation:
        raise ConversationError(
            "the environment returned no messages, so that there is nothing to answer; let it return some, "
            "or say that the episode is over"
        )
    return [dict(message) for message in observation]
