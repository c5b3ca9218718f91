"""Calls of tools in answers: the formats that models write, and texts that only look like calls."""

import pytest

from shardes.rollout.tool_calls import parse_tool_calls
from tests.helpers.tokenizers import byte_pieces

SPECIAL = ["<|im_end|>", "<|python_tag|>", "<|eom_id|>"]
PLAIN = byte_pieces(special=SPECIAL, eos="<|im_end|>")


def parsed(text, *, tokenizer=PLAIN, end="<|im_end|>", **arguments):
    """An answer as an engine gives it: its tokens, and its text without special ones."""
    ids = tokenizer(text + end, add_special_tokens=False).input_ids
    return parse_tool_calls(tokenizer.decode(ids, skip_special_tokens=True), ids, tokenizer, **arguments)


def hermes(*calls):
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


ADD = '{"name": "add", "arguments": {"a": 1, "b": [2.5, null, "x"]}}'
ARGUMENTS = {"a": 1, "b": [2.5, None, "x"]}
LLAMA = ADD.replace("arguments", "parameters")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (hermes(ADD), "", [("add", ARGUMENTS)]),
        (f"I add.\n{hermes(ADD)}", "I add.", [("add", ARGUMENTS)]),
        (hermes(ADD, '{"name": "sub", "arguments": {}}'), "", [("add", ARGUMENTS), ("sub", {})]),
        # No spaces, no arguments, arguments as text, and a close that is missing at the end.
        ('<tool_call>{"name":"f"}</tool_call>', "", [("f", {})]),
        ('<tool_call>{"name":"f","arguments":null}</tool_call>', "", [("f", {})]),
        (hermes('{"name": "f", "arguments": "{\\"a\\": 2}"}'), "", [("f", {"a": 2})]),
        (f"<tool_call>\n{ADD}", "", [("add", ARGUMENTS)]),
        # Marks within texts end nothing, and raw line breaks in texts are kept.
        (
            hermes('{"name": "run", "arguments": {"code": "a\nb</tool_call><tool_call>"}}'),
            "",
            [("run", {"code": "a\nb</tool_call><tool_call>"})],
        ),
        (hermes('{"name": "f", "arguments": {"a": "</think>"}}'), "", [("f", {"a": "</think>"})]),
        ('{"name": "f", "parameters": {"a": "</think>"}}', "", [("f", {"a": "</think>"})]),
        # Calls in thoughts are none.
        (f"<think>\n{hermes(ADD)}\n</think>\n{hermes(ADD)}", None, [("add", ARGUMENTS)]),
        (LLAMA, "", [("add", ARGUMENTS)]),
        (f" \n{LLAMA}\n", "", [("add", ARGUMENTS)]),
        (f'{{"type": "function", {LLAMA[1:]}', "", [("add", ARGUMENTS)]),
        (f'{LLAMA}; {{"name": "sub", "parameters": {{}}}}', "", [("add", ARGUMENTS), ("sub", {})]),
        (f"<|python_tag|>{LLAMA}", "", [("add", ARGUMENTS)]),
        (f"I add.<|python_tag|>{LLAMA}", "I add.", [("add", ARGUMENTS)]),
    ],
)
def test_calls(text, content, calls):
    message = parsed(text)
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert found == calls
    assert {call["type"] for call in message["tool_calls"]} == {"function"}
    ids = [call["id"] for call in message["tool_calls"]]
    assert len({*ids}) == len(ids)
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    assert message["role"] == "assistant"
    assert "tool_call_error" not in message
    if content is not None:
        assert message["content"] == content
    assert parsed(text, end="<|eom_id|>") == message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12",
        "{12}",
        '{"name": "Ada", "age": 36}',
        '{"name": "Ada"',
        '[{"name": "add"}]',
        f"The call is {LLAMA}",
        f"{LLAMA} is the call.",
        f"<think>I could write {hermes(ADD)}",
        f"<think>I could write {hermes(ADD)}</think>12",
    ],
)
def test_answers_without_calls(text):
    assert parsed(text) == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (hermes('{"name": "add", "arguments": {"a": 1}'), "not valid JSON (Expecting ',' delimiter"),
        (hermes("add(1, 2)"), "not valid JSON (Expecting value): '\\nadd(1, 2)"),
        (hermes('{"arguments": {}}'), 'has no "name": {"arguments": {}}'),
        (hermes('["add"]'), 'has no "name": ["add"]'),
        (
            hermes('{"name": "add", "arguments": [1]}'),
            'The "arguments" of the call of add are no JSON object: [1]',
        ),
        (hermes(ADD + " and more"), "goes on after its JSON: 'and more"),
        # One bad call, and none is made.
        (hermes(ADD, "oh"), "not valid JSON"),
        (hermes("[" * 100_000), "not valid JSON (RecursionError)"),
        (hermes('{"name": "add", "arguments": {"a": ' + "[" * 60 + "]" * 60 + "}}"), "more than 50 levels"),
        ("<tool_call>", "not valid JSON"),
        ('{"name": "add", "parameters": {"a": 1', "not valid JSON"),
        ('<|python_tag|>search.call(query="x")', "not valid JSON (Expecting value): 'search.call"),
    ],
)
def test_calls_that_cannot_be_parsed(text, problem):
    message = parsed(text)
    assert problem in message["tool_call_error"]
    assert len(message["tool_call_error"]) < 400
    assert "tool_calls" not in message
    assert message["content"] == text.replace("<|python_tag|>", "")


def test_a_thought_that_the_prompt_has_opened_has_no_calls_either():
    prefix = PLAIN("Hello. <think>\n", add_special_tokens=False).input_ids
    text = f"I could write {hermes(ADD)}"
    assert parsed(text, prefix=prefix) == {"role": "assistant", "content": text}
    assert len(parsed(f"{text}</think>{hermes(ADD)}", prefix=prefix)["tool_calls"]) == 1
    closed = PLAIN("<think>\n</think>\n", add_special_tokens=False).input_ids
    assert len(parsed(text, prefix=closed)["tool_calls"]) == 1


# A format that no other answer has.
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<call name=(?P<name>\w+)>",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def test_a_tokenizers_own_response_template_goes_first():
    tokenizer = byte_pieces(special=SPECIAL, eos="<|im_end|>", response_template=TEMPLATE)
    message = parsed('I add.<call name=add>{"a": 1}</call><call name=sub>{}</call>', tokenizer=tokenizer)
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "add", "arguments": {"a": 1}},
        {"name": "sub", "arguments": {}},
    ]
    assert message["content"] == "I add."
    # The prompt has opened a thought.
    prefix = tokenizer("<|assistant|><think>", add_special_tokens=False).input_ids
    thought = parsed("the</think>12", tokenizer=tokenizer, prefix=prefix)
    assert thought == {"role": "assistant", "reasoning_content": "the", "content": "12"}
    # Other formats are texts to it.
    assert parsed(hermes(ADD), tokenizer=tokenizer) == {"role": "assistant", "content": hermes(ADD)}
    error = parsed('<call name=add>{"a": </call>', tokenizer=tokenizer)
    assert "could not be parsed: json parser could not parse region as JSON" in error["tool_call_error"]
    error = parsed("<call name=add>[1]</call>", tokenizer=tokenizer)
    assert 'The "arguments" of the call of add are no JSON object: [1]' in error["tool_call_error"]
    error = parsed('<call name=add>{"a": ' + "[" * 60 + "]" * 60 + "}</call>", tokenizer=tokenizer)
    assert "more than 50 levels of brackets" in error["tool_call_error"]
    assert parse_tool_calls("", [], tokenizer) == {"role": "assistant", "content": ""}
