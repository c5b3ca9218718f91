"""Calls of tools in a model's answer, parsed by the tokenizer's response template or by common formats."""

import json
import re
from collections.abc import Sequence
from typing import Any

from shardes.environments.base import Message
from shardes.rollout.rendering import Tools
from shardes.utils.nesting import MAX_DEPTH, is_deep

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON = "<|python_tag|>"
_END = "</think>"
# A prompt that has opened a thought for the answer, and tokens at its end that this is looked for in.
_OPENED, _NUM_LAST = re.compile(r"<think>\s*\Z"), 16
# A whole answer that begins so is a call in Llama's format, or was meant to be one.
_LLAMA = re.compile(r'\s*\{\s*"(?:type"\s*:\s*"function"\s*,\s*")?name"\s*:')
_BETWEEN = re.compile(r"[\s;]*")
_SPACE = re.compile(r"\s*")
_EXCERPT = 200

# Raw line breaks within strings are not JSON, but models write code with them.
_DECODER = json.JSONDecoder(strict=False)


class _BadCallError(Exception):
    """A call that cannot be parsed; the text says why, to the model."""


def parse_tool_calls(
    text: str,
    token_ids: Sequence[int],
    tokenizer: Any,
    *,
    prefix: Sequence[int] = (),
    tools: Tools | None = None,
) -> Message:
    """Return an answer as a message of the assistant, with the tools that it calls.

    A tokenizer with a ``response_template`` parses its model's answers itself. Otherwise the formats of
    Hermes and Qwen (``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number) and of Llama 3
    (``{"name": ..., "parameters": {...}}`` as the whole answer, or after ``<|python_tag|>``) are looked for.
    Calls within thoughts are none.

    Args:
        text: The answer.
        token_ids: Its tokens, as they were sampled.
        tokenizer: The model's tokenizer.
        prefix: Tokens of what the model was asked, which may have opened a thought.
        tools: JSON schemas of the tools, by which some formats tell numbers from texts.

    Returns:
        ``role`` and ``content``; ``tool_calls`` if there are any, each with a dict as its ``arguments``; or
        ``tool_call_error``, a text for the model, if one of them cannot be parsed: then there are no
        ``tool_calls``.
    """
    try:
        if getattr(tokenizer, "response_template", None) is not None and len(token_ids):
            return _by_template(text, list(token_ids), tokenizer, list(prefix), tools)
        opened = bool(len(prefix)) and _OPENED.search(tokenizer.decode(list(prefix[-_NUM_LAST:])))
        content, calls = _by_format(_with_tags(text, token_ids, tokenizer), is_thought=bool(opened))
        return _message(text if not calls else content, calls)
    except _BadCallError as error:
        return {"role": "assistant", "content": text, "tool_call_error": str(error)}


def _by_template(
    text: str, ids: list[int], tokenizer: Any, prefix: list[int], tools: Tools | None
) -> Message:
    schemas = None if tools is None else list(tools)
    try:
        parsed = dict(tokenizer.parse_response(ids, prefix=prefix, tools=schemas))
    except MemoryError:
        raise
    except Exception as error:  # parsers of users' templates raise whatever they do
        raise _BadCallError(f"The answer could not be parsed: {_short(str(error))}") from None
    calls = [_of_template(call) for call in parsed.pop("tool_calls", None) or []]
    content = parsed.get("content")
    if isinstance(content, str) and tokenizer.eos_token:
        content = content.removesuffix(tokenizer.eos_token)
    return {**parsed, **_message(content or "", calls)}


def _of_template(call: Any) -> tuple[str, dict[str, Any]]:
    function = call.get("function") if isinstance(call, dict) else None
    return _named(function if isinstance(function, dict) else call)


def _message(content: str, calls: Sequence[tuple[str, dict[str, Any]]]) -> Message:
    message: Message = {"role": "assistant", "content": content}
    _check_depth([arguments for _, arguments in calls])
    if calls:
        # Ids of nine letters and digits, as Mistral's templates want them.
        message["tool_calls"] = [
            {"type": "function", "id": f"call{i:05}", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
    return message


def _with_tags(text: str, ids: Sequence[int], tokenizer: Any) -> str:
    """Return an answer's text with the marks of calls where these are special tokens."""
    if not len(ids):
        return text
    ids = list(ids)
    added = tokenizer.added_tokens_decoder
    while ids and ids[-1] in added and added[ids[-1]].special and added[ids[-1]].content != _CLOSE:
        ids.pop()
    whole: str = tokenizer.decode(ids, skip_special_tokens=False)
    is_hidden = any(tag in whole and tag not in text for tag in (_OPEN, _PYTHON))
    return whole if is_hidden else text


def _by_format(text: str, *, is_thought: bool) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Return what an answer says besides its calls, and its calls; it may begin within a thought."""
    is_thought |= text.lstrip().startswith("<think>")
    start, end = 0, text.find(_END)
    # A call may have the mark in its arguments.
    if end >= 0 and (is_thought or not (_OPEN in text[:end] or _LLAMA.match(text))):
        start = end + len(_END)
    elif is_thought:
        return text, []
    said = text[start:]
    if _OPEN in said:
        content, calls = _hermes(said)
    elif _PYTHON in said:
        content, _, rest = said.partition(_PYTHON)
        calls = _llama(rest)
    elif _LLAMA.match(said) and not _is_other_json(said):
        content, calls = "", _llama(said)
    else:
        return text, []
    return text[:start] + (content.rstrip() if start else content.strip()), calls


def _hermes(said: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    content, calls, at = "", [], 0
    while (found := said.find(_OPEN, at)) >= 0:
        content += said[at:found]
        value, at = _json(said, found + len(_OPEN))
        calls.append(_named(value))
        # The last one's close may be missing.
        if said.startswith(_CLOSE, at):
            at += len(_CLOSE)
        elif said[at:].strip():
            raise _BadCallError(f"The tool call goes on after its JSON: {_short(said[at:])!r}")
    return content + said[at:], calls


def _llama(said: str) -> list[tuple[str, dict[str, Any]]]:
    calls, at = [], 0
    while at == 0 or at < len(said):
        value, at = _json(said, at)
        calls.append(_named(value))
        at = _end(_BETWEEN, said, at)
    return calls


def _is_other_json(said: str) -> bool:
    """Return whether an answer is JSON, or begins with it, but of something else than a call."""
    try:
        value, at = _json(said, 0)
    except _BadCallError:
        return not ('"parameters"' in said or '"arguments"' in said)
    rest = said[_end(_BETWEEN, said, at) :]
    is_call = isinstance(value.get("name"), str) and any(
        isinstance(value.get(key), dict) for key in ("parameters", "arguments")
    )
    return not is_call or bool(rest and not rest.startswith("{"))


def _json(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value at a place, and the place after it and the white space that follows."""
    try:
        value, end = _DECODER.raw_decode(text, _end(_SPACE, text, start))
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise _BadCallError(f"The tool call is not valid JSON ({reason}): {_short(text[start:])!r}") from None
    _check_depth(value)
    return value, _end(_SPACE, text, end)


def _check_depth(value: Any) -> None:
    if is_deep(value):
        raise _BadCallError(f"The tool call has more than {MAX_DEPTH} levels of brackets in each other")


def _named(call: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of a call."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise _BadCallError(f'The tool call has no "name": {_short(json.dumps(call, default=str))}')
    arguments: Any = next((call[key] for key in ("arguments", "parameters") if key in call), {})
    if isinstance(arguments, str):
        arguments, _ = _json(arguments, 0) if arguments.strip() else ({}, 0)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _BadCallError(
            f'The "arguments" of the call of {call["name"]} are no JSON object: '
            f"{_short(json.dumps(arguments, default=str))}"
        )
    return call["name"], arguments


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return found.end() if found else start


def _short(text: str) -> str:
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}..."
