"""Requests: what is asked for, and what is refused, by the name of the parameter."""

import pytest

from shardes.endpoint.errors import ApiError
from shardes.endpoint.requests import SamplingSettings, read_chat, read_completion

GREEDY, DRAWN = SamplingSettings(0.0), SamplingSettings(0.7, top_p=0.9)
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(sampling=GREEDY, **others):
    return read_chat({"model": "m", "messages": [USER], **others}, sampling)


def text(sampling=GREEDY, **others):
    return read_completion({"model": "m", "prompt": "Hi", **others}, sampling)


REFUSED = [
    ({"messages": []}, "messages", None),
    ({"messages": "Hi"}, "messages", None),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content", None),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0]", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
        "unsupported_value",
    ),
    ({"messages": [{"role": "user", "content": "", "audio": 1}]}, "messages[0].audio", "unknown_parameter"),
    ({"messages": [{"role": "tool", "content": "3"}]}, "messages[0].tool_call_id", None),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
        None,
    ),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "unsupported_value"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "unsupported_value"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", None),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        "tools[0].function.strict",
        None,
    ),
    ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    ({"top_logprobs": 3}, "top_logprobs", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ({"functions": [{}]}, "functions", "unsupported_parameter"),
    ({"top_k": 5}, "top_k", "unknown_parameter"),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", None),
    ({"n": 129}, "n", None),
    ({"stop": ["a", ""]}, "stop[1]", None),
    ({"seed": 2**63}, "seed", None),
    ({"temperature": 0.7}, "temperature", "unsupported_value"),
    ({"stream_options": {}}, "stream_options", None),
]


@pytest.mark.parametrize(("others", "param", "code"), REFUSED)
def test_what_cannot_be_done_is_refused_by_its_name(others, param, code):
    with pytest.raises(ApiError) as refused:
        chat(**others)
    body = refused.value.to_json()["error"]
    assert refused.value.status == 400
    assert body["type"] == "invalid_request_error"
    assert (body["param"], body["code"]) == (param, code)
    assert body["message"].startswith(param) or param in body["message"]


@pytest.mark.parametrize(
    ("others", "param"),
    [
        ({"logprobs": 0}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"messages": [USER]}, "messages"),
    ],
)
def test_completions_refuse_what_is_theirs(others, param):
    with pytest.raises(ApiError) as refused:
        text(**others)
    assert refused.value.param.startswith(param)


def test_parameters_that_ask_for_nothing_are_taken():
    neutral = {
        "logprobs": False,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
    }
    ignored = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": None,
        "parallel_tool_calls": True,
        "tools": None,
    }
    assert chat(**neutral, **ignored) == chat()


def test_messages_are_as_templates_take_them():
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []}
    request = chat(
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1"}]},
            said,
            {"role": "tool", "content": "2", "tool_call_id": "a"},
        ]
    )
    assert request.prompts[0] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "1 + 1"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "a"},
    ]


def test_tools_are_left_out_where_none_may_be_called():
    assert chat(tools=[TOOL]).tools == (TOOL,)
    assert chat(tools=[TOOL], tool_choice="none").tools == ()


def test_tokens_are_drawn_as_the_run_does_or_not_at_all():
    assert chat().is_greedy
    assert chat(temperature=0).is_greedy
    assert chat(DRAWN, temperature=0.0, top_p=0.5).is_greedy
    assert not chat(DRAWN).is_greedy
    assert not chat(DRAWN, temperature=0.7, top_p=0.9).is_greedy
    for others in ({"temperature": 1.0}, {"top_p": 0.5}):
        with pytest.raises(ApiError, match=r"rollout\."):
            chat(DRAWN, **others)


def test_prompts_of_completions():
    assert text().prompts == ("Hi",)
    assert text(prompt=["a", "b"]).prompts == ("a", "b")
    assert text(prompt=[1, 2]).prompts == ([1, 2],)
    assert text(prompt=[[1], [2, 3]]).prompts == ([1], [2, 3])
    assert text().max_tokens == 16
    assert text(stop="x", max_tokens=3, n=2, seed=-1).stop == ("x",)
