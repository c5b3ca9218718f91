"""Requests for answers, checked: what cannot be done as asked is refused, never left out in silence."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from shardes.endpoint.errors import ApiError

T = TypeVar("T", bound="_Asked")

Message = dict[str, Any]

MAX_CHOICES = 128
"""Answers to one prompt, at most, as at OpenAI."""
_MAX_STOPS = 16

# Parameters that change no answer.
_IGNORED = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user"}
)
# Parameters that are not supported, each with the values that ask for nothing; null never does.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class SamplingSettings:
    """How the run draws tokens, which a request cannot change.

    Attributes:
        temperature: The run's ``rollout.temperature``.
        top_p: The run's ``rollout.top_p``.
    """

    temperature: float
    top_p: float = 1.0


@dataclass(frozen=True)
class Request:
    """Request for answers.

    Attributes:
        model: Name of the model that is asked.
        prompts: Chat messages as templates take them, a text, or token ids; one for a chat.
        is_chat: True for a chat.
        tools: JSON schemas of the tools that the model may call; empty if it may call none.
        stop: Texts before which an answer ends.
        max_tokens: Largest number of tokens of an answer; None: as many as the run allows.
        is_greedy: True to take the most likely tokens; False to draw them as the run does.
        seed: Chooses the random numbers; None: those of the request's place in its episode.
        num_choices: Number of answers to each prompt.
        is_streamed: True to send the answer as events.
        wants_usage: True to have the last event tell the numbers of tokens.
    """

    model: str
    prompts: tuple[list[Message] | str | list[int], ...]
    is_chat: bool
    tools: tuple[dict[str, Any], ...] = ()
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    is_greedy: bool = True
    seed: int | None = None
    num_choices: int = 1
    is_streamed: bool = False
    wants_usage: bool = False


def read_chat(body: Any, sampling: SamplingSettings) -> Request:
    """Read the body of a request to ``/chat/completions``.

    Raises:
        ApiError: It cannot be done as asked.
    """
    asked = _parsed(_Chat, body)
    if not isinstance(asked.tool_choice, str) or asked.tool_choice not in ("none", "auto"):
        raise ApiError(
            f"tool_choice: got {asked.tool_choice!r}, which a model that is trained as it is cannot promise; "
            "set it to 'auto' or 'none'",
            param="tool_choice",
            code="unsupported_value",
        )
    limits = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError("max_tokens: differs from max_completion_tokens; give one", param="max_tokens")
    tools = () if asked.tool_choice == "none" else tuple(tool.as_schema() for tool in asked.tools or ())
    messages = [message.as_template() for message in asked.messages]
    return _request(
        asked, sampling, (messages,), is_chat=True, tools=tools, max_tokens=next(iter(limits), None)
    )


def read_completion(body: Any, sampling: SamplingSettings) -> Request:
    """Read the body of a request to ``/completions``.

    Raises:
        ApiError: It cannot be done as asked.
    """
    asked = _parsed(_Completion, body)
    # What OpenAI answers with if it is left out; here, too, as texts rarely end by themselves.
    max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
    return _request(asked, sampling, tuple(asked.prompt), is_chat=False, max_tokens=max_tokens)


def _request(asked: "_Asked", sampling: SamplingSettings, prompts: Any, **others: Any) -> Request:
    temperature = sampling.temperature if asked.temperature is None else asked.temperature
    if temperature not in (0, sampling.temperature):
        allowed = "0" if sampling.temperature == 0 else f"0 or {sampling.temperature:g}"
        raise ApiError(
            f"temperature: got {asked.temperature:g}, but the run's is {sampling.temperature:g} "
            f"(rollout.temperature); leave it out, or set it to {allowed}",
            param="temperature",
            code="unsupported_value",
        )
    is_greedy = temperature == 0
    if not is_greedy and asked.top_p not in (None, sampling.top_p):
        raise ApiError(
            f"top_p: got {asked.top_p:g}, but the run's is {sampling.top_p:g} (rollout.top_p); leave it out",
            param="top_p",
            code="unsupported_value",
        )
    if asked.stream_options is not None and not asked.stream:
        raise ApiError("stream_options: is for stream: true only", param="stream_options")
    return Request(
        model=asked.model,
        prompts=prompts,
        stop=tuple(asked.stop),
        is_greedy=is_greedy,
        seed=asked.seed,
        num_choices=asked.n,
        is_streamed=asked.stream,
        wants_usage=asked.stream_options is not None and asked.stream_options.include_usage,
        **others,
    )


def _parsed(kind: type[T], body: Any) -> T:
    if not isinstance(body, dict):
        raise ApiError(f"the body: got {type(body).__name__}; wanted a JSON object")
    given = {key: value for key, value in body.items() if value is not None and key not in _IGNORED}
    for key in given.keys() & (_NEUTRAL.keys() - kind.model_fields.keys()):
        if not _asks_for_nothing(key, given[key]):
            raise ApiError(
                f"{key}: got {given[key]!r:.200}, which is not supported here; leave it out",
                param=key,
                code="unsupported_parameter",
            )
        del given[key]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None


def _asks_for_nothing(key: str, value: Any) -> bool:
    # False is not 0: as a number, logprobs: 0 asks for some.
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[key]
    )


def _refusal(error: ValidationError) -> ApiError:
    """Return the refusal that names the first parameter that is wrong."""
    first = error.errors(include_url=False)[0]
    param = ""
    for at, part in enumerate(first["loc"]):
        if isinstance(part, int):
            param += f"[{part}]"
        elif not (at == 2 and part in _ROLES):  # pydantic names the kind of a message
            param += f".{part}" if param else part
    if first["type"] == "extra_forbidden":
        return ApiError(
            f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter"
        )
    return ApiError(
        f"{param}: {first['msg']}", param=param, code=first["ctx"].get("code") if "ctx" in first else None
    )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _as_text(content: Any) -> Any:
    """Return the text of a message's content, which may be in parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "content",
                "got a part of type {kind}; wanted parts of type 'text'",
                {"kind": repr(kind), "code": "unsupported_value"},
            )
        texts.append(part["text"])
    return "".join(texts)


_Content = Annotated[str, BeforeValidator(_as_text)]


class _System(_Strict):
    role: Literal["system", "developer"]
    content: _Content
    name: str | None = None

    def as_template(self) -> Message:
        # Newer models of OpenAI call it developer; chat templates do not.
        return {"role": "system", "content": self.content} | _named(self.name)


class _User(_Strict):
    role: Literal["user"]
    content: _Content
    name: str | None = None

    def as_template(self) -> Message:
        return {"role": "user", "content": self.content} | _named(self.name)


def _as_arguments(arguments: Any) -> Any:
    try:
        found = json.loads(arguments)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise PydanticCustomError("arguments", "wanted a JSON object as text")
    return found


class _CalledFunction(_Strict):
    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_as_arguments)]


class _ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction
    index: int | None = None


class _Assistant(_Strict):
    role: Literal["assistant"]
    content: Annotated[str | None, BeforeValidator(_as_text)] = None
    tool_calls: list[_ToolCall] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    function_call: None = None

    def as_template(self) -> Message:
        message: Message = {"role": "assistant", "content": self.content or ""} | _named(self.name)
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        return message


class _ToolResult(_Strict):
    role: Literal["tool"]
    content: _Content
    tool_call_id: str
    name: str | None = None

    def as_template(self) -> Message:
        return {"role": "tool", "content": self.content, "tool_call_id": self.tool_call_id} | _named(
            self.name
        )


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _named(name: str | None) -> Message:
    return {} if name is None else {"name": name}


class _Function(_Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class _Tool(_Strict):
    type: Literal["function"]
    function: _Function

    def as_schema(self) -> dict[str, Any]:
        """Return the schema as chat templates take it."""
        return {
            "type": "function",
            "function": self.function.model_dump(exclude_none=True, exclude={"strict"}),
        }


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # of which there is none


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Stop = Annotated[str, Field(min_length=1)]


class _Asked(_Strict):
    model: str
    stop: Annotated[list[_Stop], BeforeValidator(_listed), Field(max_length=_MAX_STOPS)] = []
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: _StreamOptions | None = None


class _Chat(_Asked):
    messages: list[Annotated[_System | _User | _Assistant | _ToolResult, Field(discriminator="role")]] = (
        Field(min_length=1)
    )
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[_Tool] | None = None
    tool_choice: Any = "auto"


def _as_prompts(value: Any) -> Any:
    is_one = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    return [value] if is_one else value


def _checked_prompt(value: Any) -> Any:
    is_tokens = isinstance(value, list) and value and all(type(each) is int and each >= 0 for each in value)
    if not is_tokens and not isinstance(value, str):
        raise PydanticCustomError("prompt", "wanted a text, a list of token ids, or a list of these")
    return value


class _Completion(_Asked):
    prompt: Annotated[
        list[Annotated[Any, BeforeValidator(_checked_prompt)]],
        BeforeValidator(_as_prompts),
        Field(min_length=1),
    ]
