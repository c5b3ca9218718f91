"""Answers in the shapes that OpenAI's clients expect.

An answer is a pure function of what was asked and of what the model said, so that a program that goes by an
answer's id, say, does the same in every run. It has no clock: ``created`` is 0.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from shardes.endpoint.requests import Request

FinishReason = Literal["stop", "length", "tool_calls"]

# Some chat templates, such as Mistral's, refuse ids of another length.
_CALL_ID_CHARACTERS = 9


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        text: What the model has said, without the calls of tools.
        finish_reason: Reason why it ends there.
        num_tokens: Number of tokens that were generated.
        tool_calls: For each call, the tool's name and its arguments.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int
    tool_calls: tuple[tuple[str, dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class Reply:
    """Answers to a request.

    Attributes:
        choices: Those to the first prompt, then those to the second, and so on.
        num_prompt_tokens: Number of tokens of all prompts.
    """

    choices: tuple[Choice, ...]
    num_prompt_tokens: int


def body_of(reply: Reply, request: Request, *, model: str, number: int) -> dict[str, Any]:
    """Return the body of a response.

    Args:
        reply: The answers.
        request: What was asked.
        model: The model's whole name.
        number: Number of the request in its episode.
    """
    head = _head(request, model, number, "chat.completion" if request.is_chat else "text_completion")
    choices = []
    for index, choice in enumerate(reply.choices):
        said = {"message": _message(choice, number, index)} if request.is_chat else {"text": choice.text}
        choices.append({"index": index} | said | {"logprobs": None, "finish_reason": choice.finish_reason})
    return head | {"choices": choices, "usage": _usage(reply)}


def events_of(reply: Reply, request: Request, *, model: str, number: int) -> Iterator[str]:
    """Yield the events of a response that is streamed: each answer is one piece, as it is whole by then."""
    head = _head(request, model, number, "chat.completion.chunk" if request.is_chat else "text_completion")
    if request.wants_usage:
        head["usage"] = None
    for index, choice in enumerate(reply.choices):
        place = {"index": index, "logprobs": None}
        if not request.is_chat:
            yield _event(
                head | {"choices": [place | {"text": choice.text, "finish_reason": choice.finish_reason}]}
            )
            continue
        delta = _message(choice, number, index)
        for at, call in enumerate(delta.get("tool_calls", ())):
            call["index"] = at
        yield _event(head | {"choices": [place | {"delta": delta, "finish_reason": None}]})
        yield _event(head | {"choices": [place | {"delta": {}, "finish_reason": choice.finish_reason}]})
    if request.wants_usage:
        yield _event(head | {"choices": [], "usage": _usage(reply)})
    yield "data: [DONE]\n\n"


def model_card(name: str) -> dict[str, Any]:
    """Return what ``/models`` says of a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "shardes"}


def _head(request: Request, model: str, number: int, kind: str) -> dict[str, Any]:
    prefix = "chatcmpl" if request.is_chat else "cmpl"
    return {"id": f"{prefix}-{number}", "object": kind, "created": 0, "model": model}


def _message(choice: Choice, number: int, index: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {
                "id": _call_id(number, index, at),
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for at, (name, arguments) in enumerate(choice.tool_calls)
        ]
    return message


def _call_id(*place: int) -> str:
    """Return an id that no other call in an episode has."""
    return hashlib.blake2b(repr(place).encode()).hexdigest()[:_CALL_ID_CHARACTERS]


def _usage(reply: Reply) -> dict[str, int]:
    num_answered = sum(choice.num_tokens for choice in reply.choices)
    return {
        "prompt_tokens": reply.num_prompt_tokens,
        "completion_tokens": num_answered,
        "total_tokens": reply.num_prompt_tokens + num_answered,
    }


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
