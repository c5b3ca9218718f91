"""Prompts and completions as tokens, compared with the tokens of whole texts, written out by hand."""

import datetime
from itertools import product
from unittest import mock

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from shardes.errors import UserError
from shardes.rollout.encoding import PromptEncoder, Question
from shardes.tasks.base import ChatTemplate
from shardes.tasks.templates import check_prompt
from shardes.utils.limits import LimitError
from tests.helpers.tokenizers import CHAT, VOCABULARY, sentence_pieces

KINDS = [dict(zip(("legacy", "bos", "eos"), each, strict=True)) for each in product([True, False], repeat=3)]


def chat(*messages):
    return [{"role": role, "content": content} for role, content in messages]


def pieces(tokenizer, prompt, *completions, template=None, **arguments):
    """The tokens of a prompt, or of a prompt and each completion."""
    question = Question(prompt, ChatTemplate(template, arguments), completions or None)
    encoder = PromptEncoder(tokenizer)
    found = encoder.encode(question)
    # Encoding ahead finds the same, in another process.
    ahead = PromptEncoder(tokenizer)
    assert list(ahead.encode_ahead([question])) == [None]
    assert ahead._known == {question.key: found}
    prompts = [tokenizer.convert_ids_to_tokens(list(ids)) for ids in found.prompts]
    if not completions:
        return prompts[0]
    return [
        (a, tokenizer.convert_ids_to_tokens(list(b))) for a, b in zip(prompts, found.completions, strict=True)
    ]


def refusal(tokenizer, prompt, *completions, template=None, **limits):
    question = Question(prompt, ChatTemplate(template), completions or None)
    with pytest.raises(UserError) as error:
        PromptEncoder(tokenizer, **limits).encode(question)
    (again,) = PromptEncoder(tokenizer, **limits).encode_ahead([question])
    assert str(again) == str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_text_begins_once_and_does_not_end(kind):
    tokenizer = sentence_pieces(**kind)
    first = ["<s>"] if kind["bos"] else []
    assert pieces(tokenizer, "the film") == [*first, "▁the", "▁film"]
    rendered = pieces(tokenizer, "<s>the film")
    assert rendered == tokenizer.convert_ids_to_tokens(
        tokenizer("<s>the film", add_special_tokens=False).input_ids
    )
    assert rendered.count("<s>") == 1
    assert "</s>" not in rendered
    # What the text itself says is not taken away.
    assert pieces(tokenizer, "the film</s>")[-1] == "</s>"
    assert pieces(tokenizer, "<s><s>the").count("<s>") == 2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_completions_are_what_follows_in_the_whole_text(kind):
    tokenizer = sentence_pieces(**kind)
    first = ["<s>"] if kind["bos"] else []
    wanted = [([*first, "▁the", "▁film", "▁is"], [word]) for word in ("▁good", "▁bad")]
    assert pieces(tokenizer, "the film is", " good", " bad") == wanted
    # A space at the end of the prompt belongs to the first word.
    assert pieces(tokenizer, "the film is ", "good", "bad") == wanted
    (start, rest), *_ = pieces(tokenizer, "the film is\n", "good")
    assert (start, rest) == ([*first, "▁the", "▁film", "▁is"], ["\n", "good"])
    # Nothing comes before the first word of a text.
    assert pieces(tokenizer, "", "the film") == [(["<s>"], ["▁the", "▁film"])]
    assert pieces(tokenizer, "", "<s>the film")[0][0] == ["<s>"]


def test_a_completion_that_is_one_token_with_the_prompt_is_scored_by_itself():
    tokenizer = sentence_pieces(bos=False)
    assert pieces(tokenizer, "a goo", "d") == [(["▁", "a", "▁", "g", "o", "o"], ["▁", "d"])]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_chats_go_through_the_template_and_an_answer_that_was_begun_is_continued(kind):
    tokenizer = sentence_pieces(**kind, chat_template=CHAT)

    def plain(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)

    asked = "<s><|im_start|>user\nthe film<|im_end|>\n<|im_start|>assistant\n"
    assert pieces(tokenizer, chat(("user", "the film"))) == plain(asked)
    begun = chat(("user", "the film"), ("assistant", "is "))
    assert pieces(tokenizer, begun) == plain(f"{asked}is ")
    (start, rest), *_ = pieces(tokenizer, chat(("user", "the film")), "good")
    assert start == plain(asked)
    assert start + rest == plain(f"{asked}good")


THINKING = CHAT.replace(
    "assistant\n",
    "assistant\n{% if enable_thinking | default(true) %}<think>\n{% else %}<think></think>{% endif %}",
)


def test_template_arguments_and_tags_that_the_template_opens():
    tokenizer = sentence_pieces(legacy=False, chat_template=THINKING)
    asked = chat(("user", "the film"))
    assert pieces(tokenizer, asked)[-2:] == ["<think>", "\n"]
    assert pieces(tokenizer, asked, enable_thinking=False)[-2:] == ["<think>", "</think>"]

    def opened(prompt, **arguments):
        return PromptEncoder(tokenizer).encode(Question(prompt, ChatTemplate(None, arguments))).opened

    assert opened(asked) == "<think>\n"
    assert opened(asked, enable_thinking=False) == ""
    # What a row or a text says itself is the user's own.
    assert opened([*asked, *chat(("assistant", "<think>\n"))]) == ""
    assert opened("the <think>\n") == ""

    # Other models have other tags for it.
    for tag in ("<seed:think>", "<|thinking|>", "[THINK]", "◁think▷\n", "<reason>"):
        other = sentence_pieces(legacy=False, chat_template=CHAT.replace("assistant\n", tag))
        with mock.patch.object(type(other), "decode", lambda *_, tag=tag, **__: f"assistant\n{tag}"):
            assert PromptEncoder(other).encode(Question(asked, ChatTemplate())).opened == tag

    renderer = PromptEncoder(tokenizer).chats
    renderer.check_arguments(ChatTemplate(None, {"enable_thinking": False}), has_chats=True)
    with pytest.raises(UserError, match="has no 'enable_thinkin_'"):
        renderer.check_arguments(ChatTemplate(None, {"enable_thinkin_": False}), has_chats=True)
    with pytest.raises(UserError, match="template_arguments: the prompts are plain texts"):
        renderer.check_arguments(ChatTemplate(None, {"enable_thinking": False}), has_chats=False)
    with pytest.raises(UserError, match="chat_template: the prompts are plain texts"):
        renderer.check_arguments(ChatTemplate("default"), has_chats=False)


def test_keys_that_a_table_gives_every_message_are_no_keys_of_it():
    template = (
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% if 'tool_calls' in m %}"
        "{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    )
    call = {"name": "f", "arguments": {"a": "b"}}
    messages = [
        {"role": "user", "content": "good"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "bad"},
    ]
    padded = [
        {"name": None, "tool_calls": None} | messages[0],
        messages[1] | {"tool_calls": [call | {"id": None, "arguments": {"a": "b", "c": None}}]},
        {"name": None, "tool_calls": None} | messages[2],
    ]
    tokenizer = sentence_pieces(legacy=False, chat_template=template)
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(wanted, add_special_tokens=False).input_ids
    assert pieces(tokenizer, padded) == tokenizer.convert_ids_to_tokens(ids)
    assert PromptEncoder(tokenizer).chats.text(padded, ChatTemplate()) == wanted
    check_prompt(padded, "here")
    with pytest.raises(UserError, match=r"whose message 2 is \{'role'"):
        check_prompt([messages[0], {"role": "assistant", "content": None}], "here")


def test_an_answer_that_the_template_repeats_cannot_be_continued():
    tokenizer = sentence_pieces(chat_template=CHAT + "{{ messages[-1].content }}<|im_end|>")
    said = refusal(tokenizer, chat(("user", "good"), ("assistant", "bad")))
    assert "has the last message, one of the assistant, more than once" in said


def test_named_templates():
    tokenizer = sentence_pieces(chat_template={"rag": "{{ messages[0].content }}", "tool_use": "good"})
    asked = chat(("user", "the film"))
    assert "several chat templates, rag, tool_use, and none is the default" in refusal(tokenizer, asked)
    assert pieces(tokenizer, asked, template="rag") == ["▁the", "▁film"]
    assert "neither a Jinja template nor the name of one: there are rag" in refusal(
        tokenizer, asked, template="rg"
    )
    assert pieces(tokenizer, asked, template="{{ messages[0].role }}") == ["▁", *"user"]
    tokenizer.chat_template["default"] = "{{ 'bad' }}"
    assert pieces(tokenizer, asked) == ["▁bad"]
    tokenizer.chat_template = None
    assert "no chat template" in refusal(tokenizer, asked)
    assert "the tokenizer's has none" in refusal(tokenizer, asked, template="rag")


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


def test_questions_that_cannot_be_asked_say_why():
    tokenizer = sentence_pieces(chat_template=ALTERNATING)
    system = refusal(tokenizer, chat(("system", "a"), ("user", "b")))
    assert (
        "refuses the prompt (TemplateError: roles must alternate); leave out what it does not take" in system
    )
    assert "task.system" in system
    assert "roles must alternate" in refusal(tokenizer, chat(("user", "a"), ("user", "b")))
    assert "refuses the prompt" in refusal(tokenizer, chat(("user", "a")), template="{{ 1 / 0 }}")
    assert "refuses the prompt" in refusal(tokenizer, chat(("user", "a")), template="{% if %}")
    for prompt, *completions in [["a\ud800"], [chat(("user", "\udfff"))], ["a", "b\ud800"]]:
        assert "half a surrogate pair" in refusal(tokenizer, prompt, *completions)
    assert "has no tokens" in refusal(sentence_pieces(bos=False), "")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    strict = PreTrainedTokenizerFast(tokenizer_object=words)
    assert pieces(strict, "a") == ["a"]
    assert "the tokenizer fails for 'b' (Exception: WordLevel error: Missing" in refusal(strict, "b")
    assert "has 3 tokens, but the model has 3 positions" in refusal(tokenizer, "the film", max_positions=3)
    assert "have 4 tokens, but the model has 3 positions" in refusal(
        tokenizer, "the film", " good", max_positions=3
    )
    known = len(VOCABULARY)
    tokenizer.add_tokens(["<added>"])
    assert f"<added>' ({known}), but the model has embeddings for {known} tokens" in refusal(
        tokenizer, "the <added>", num_tokens=known
    )
    assert "<added>'" in refusal(tokenizer, "the", " <added>", num_tokens=known)


def test_templates_see_the_date_of_the_run_and_draw_the_same_numbers():
    tokenizer = sentence_pieces(
        chat_template="{{ strftime_now('%Y-%m-%d %H:%M') }} {{ [1,2,3,4,5,6,7,8,9] | random }}"
        "{{ [1,2,3,4,5,6,7,8,9] | random }}"
    )
    question = Question(chat(("user", "a")), ChatTemplate())
    date = datetime.date(2024, 7, 26)
    encoder = PromptEncoder(tokenizer, date=date)
    assert encoder.told_date is None
    found = encoder.encode(question)
    text = tokenizer.decode(list(found.prompts[0]))
    assert text.startswith("2024-07-26 00:00 ")
    assert encoder.told_date == "2024-07-26"
    assert PromptEncoder(tokenizer, date=date).encode(question) == found
    ahead = PromptEncoder(tokenizer, date=date)
    list(ahead.encode_ahead([question]))
    assert ahead.encode(question) == found
    assert ahead.told_date == "2024-07-26"
    # Without one it is today's, as transformers has it.
    today = tokenizer.apply_chat_template(chat(("user", "a")), tokenize=False)[:10]
    assert PromptEncoder(tokenizer).chats.date.isoformat() == today

    class World:
        def broadcast_json(self, value):
            return "2025-01-02"

    encoder.settle_date(World())
    assert tokenizer.decode(list(encoder.encode(question).prompts[0])).startswith("2025-01-02")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
        ("{{ 9 ** (9 ** 9) }}", "processor time"),
        ("{{ 'x' * 10 ** 11 }}", "of memory"),
        (
            "{% set n = namespace(t='x') %}{% for a in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
            "of memory|time",
        ),
    ],
)
def test_a_template_without_end_is_ended(template, words, monkeypatch):
    monkeypatch.setattr("shardes.rollout.encoding.SECONDS", 0.5)
    tokenizer = sentence_pieces(chat_template=template)
    questions = [Question("a", ChatTemplate()), Question(chat(("user", "a")), ChatTemplate())]
    found = PromptEncoder(tokenizer).encode_ahead(questions)
    assert next(found) is None
    with pytest.raises(LimitError, match=words) as error:
        next(found)
    assert error.value.index == 1
