"""Chat messages as text: the tokenizer's chat template, with the run's date."""

import datetime
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from shardes.errors import UserError
from shardes.tasks.base import ChatTemplate, Prompt
from shardes.tasks.templates import MAX_PROMPT_CHARACTERS
from shardes.utils.memo import Memo

Tools: TypeAlias = Sequence[dict[str, Any]]
"""JSON schemas of functions that the model may call, as transformers makes them."""

# What transformers marks the end of a message with that is to be continued.
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG"
# Chats whose texts are remembered, as members are asked much the same, and their characters at most.
_NUM_REMEMBERED = 1 << 14
_MOST_REMEMBERED = 1 << 12
# Some templates (Mistral's) want a call's id to have nine characters.
_CALL_ID = "call00000"


class ChatRenderer:
    """Renders chats by a tokenizer's templates: the same text on every rank, on every day of a run.

    A chat that ends with a message of the assistant is continued; after any other message, the template opens
    the assistant's turn.

    Args:
        tokenizer: The model's tokenizer.
        date: What templates are told is today's date.

    Attributes:
        date: What templates are told is today's date.
        has_told_date: Whether a template has asked for it.
    """

    def __init__(self, tokenizer: Any, *, date: datetime.date) -> None:
        self._tokenizer = tokenizer
        self.date = date
        self.has_told_date = False
        self._texts: Memo[str, str] = Memo(_NUM_REMEMBERED)

    @property
    def has_own_tokens(self) -> bool:
        """Return whether the tokenizer makes tokens of chats in a way of its own, not of their text."""
        return type(self._tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template

    def check_arguments(self, chat: ChatTemplate, *, has_chats: bool) -> None:
        """Refuse a template, and arguments of it, that change no prompt.

        Args:
            chat: The template and its arguments.
            has_chats: Whether some prompts are chat messages.

        Raises:
            UserError: No prompt is, or the template has no variable of such a name.
        """
        given = {"task.chat_template": chat.name, "task.template_arguments": chat.arguments}
        for key, value in given.items():
            if value and not has_chats:
                raise UserError(
                    f"{key}: the prompts are plain texts, for which there is no chat template; remove it, or "
                    'make chats of them with task.system: ""'
                )
        if chat.arguments:
            self.check_template(chat.name)
            template = self._tokenizer.get_chat_template(chat.name)
            for name in chat.arguments:
                if name not in template:
                    raise UserError(
                        f"task.template_arguments: the chat template has no {name!r}; remove it, or give "
                        "another template (task.chat_template)"
                    )

    def check_tools(self, chat: ChatTemplate, tools: Tools) -> None:
        """Refuse a template that does not show the model its tools, its calls, or what they return.

        Args:
            chat: The template and its arguments.
            tools: The tools' JSON schemas.

        Raises:
            UserError: There is no template, or it leaves something of it out, or fails.
        """
        self.check_template(chat.name, has_tools=True)
        name, argument, value, result = "lookUpName", "lookUpArgument", "lookUpValue", "lookUpResult"
        function = {"name": name, "arguments": {argument: value}}
        call = {"type": "function", "id": _CALL_ID, "function": function}
        told = {"role": "tool", "name": name, "tool_call_id": _CALL_ID, "content": result}
        asked: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
        missing = "give an instruct model that calls tools, or a template of your own (task.chat_template)"
        try:
            offered = self.text(asked, chat, tools)
            called = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}, told]
            shown = self.text(called, chat, tools)
        except UserError as error:
            raise UserError(
                f"task.chat_template: there are tools, and the chat template fails for a conversation that "
                f"calls one: {error}"
            ) from None
        for tool in tools:
            if tool["function"]["name"] not in offered:
                raise UserError(
                    f"task.chat_template: the chat template does not tell the model of its tools, such as "
                    f"{tool['function']['name']!r}; {missing}"
                )
        if not all(part in shown for part in (name, argument, value, result)):
            what = "what a tool returns" if name in shown and value in shown else "the model's calls of tools"
            raise UserError(f"task.chat_template: the chat template leaves out {what}; {missing}")

    def text(self, prompt: Prompt, chat: ChatTemplate, tools: Tools | None = None) -> str:
        """Return the text of a chat.

        Raises:
            UserError: There is no template, or it fails.
        """
        key = json.dumps([self.date.isoformat(), prompt, chat.name, dict(chat.arguments), tools], default=str)
        if len(key) > _MOST_REMEMBERED:
            return self._text(prompt, chat, tools)
        return self._texts.get(key, lambda: self._text(prompt, chat, tools))

    def _text(self, prompt: Prompt, chat: ChatTemplate, tools: Tools | None) -> str:
        text: str = self._apply(prompt, chat, tools, tokenize=False)
        if _CONTINUED in text and not any(_CONTINUED in str(message) for message in prompt):
            raise UserError(
                "the tokenizer's chat template has the last message, one of the assistant, more than once, "
                "so that it cannot be continued; leave the message out, or give another template "
                "(task.chat_template)"
            )
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise UserError(f"the chat template makes a text of {len(text)} characters; shorten the prompt")
        return text

    def tokens(self, prompt: Prompt, chat: ChatTemplate, tools: Tools | None = None) -> list[int]:
        """Return the tokens of a chat, for a tokenizer that has its own way.

        Raises:
            UserError: There is no template, or it fails.
        """
        return list(self._apply(prompt, chat, tools, tokenize=True, return_dict=False))

    def _apply(self, prompt: Prompt, chat: ChatTemplate, tools: Tools | None, **arguments: Any) -> Any:
        assert isinstance(prompt, list)
        self.check_template(chat.name, has_tools=bool(tools))
        is_continued = prompt[-1]["role"] == "assistant"
        messages = [_without_none(message) for message in prompt]
        arguments |= {"add_generation_prompt": not is_continued, "continue_final_message": is_continued}
        if tools:
            arguments["tools"] = list(tools)
        try:
            with self._dated():
                return self._tokenizer.apply_chat_template(
                    messages, chat_template=chat.name, **arguments, **chat.arguments
                )
        except MemoryError:
            raise
        except Exception as error:  # templates raise whatever their expressions do
            raise UserError(
                f"the tokenizer's chat template refuses the prompt ({type(error).__name__}: {error}); leave "
                "out what it does not take, such as a system message (task.system) or two messages in a row "
                "of the same role, or give another template (task.chat_template)"
            ) from None

    def check_template(self, name: str | None, *, has_tools: bool = False) -> None:
        """Refuse the name of a template that there is not.

        Args:
            name: The name, or a template itself; None: the tokenizer's own.
            has_tools: Whether there are tools, for which some tokenizers have a template of its own.

        Raises:
            UserError: There is no such template, or none at all.
        """
        templates = self._tokenizer.chat_template
        names = sorted(templates) if isinstance(templates, dict) else []
        if name is None and not templates:
            raise UserError(
                "the prompts are chat messages, but the model's tokenizer has no chat template; use an "
                "instruct model, prompts of plain text, or a template of your own (task.chat_template)"
            )
        if name is None and names and "default" not in names and not (has_tools and "tool_use" in names):
            raise UserError(
                f"the tokenizer has several chat templates, {', '.join(names)}, and none is the default; say "
                "which with task.chat_template"
            )
        # transformers takes what is no name for a template, and every prompt would be that text.
        if name is not None and name not in names and "{" not in name:
            known = f"there are {', '.join(names)}" if names else "the tokenizer's has none"
            raise UserError(
                f"task.chat_template: got {name!r}, neither a Jinja template nor the name of one: {known}"
            )

    @contextmanager
    def _dated(self) -> Iterator[None]:
        """Have templates see the run's date, and draw the same random numbers every time."""
        renderer, midnight = self, datetime.datetime.combine(self.date, datetime.time())

        class Midnight(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Any:
                renderer.has_told_date = True
                return midnight

        # transformers has no argument for it.
        original, state = chat_template_utils.datetime, random.getstate()
        chat_template_utils.datetime = Midnight
        random.seed(0)
        try:
            yield
        finally:
            chat_template_utils.datetime = original
            random.setstate(state)


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without keys that have no value, but for its content.

    Tables give every message the keys of all, and templates ask whether there is a key, as for tool calls.
    """
    return {key: _dense(value) for key, value in message.items() if value is not None or key == "content"}


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dense(each) for key, each in value.items() if each is not None}
    return [_dense(each) for each in value] if isinstance(value, list) else value
