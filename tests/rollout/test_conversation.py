"""An episode's tokens turn by turn, compared with those of whole conversations."""

import datetime
import importlib.util
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shardes.errors import UserError
from shardes.rollout.conversation import Conversation, ConversationError
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.tool_calls import parse_tool_calls
from shardes.tasks.base import ChatTemplate
from tests.helpers.models import QUICKSTART
from tests.helpers.tokenizers import CHAT, CHATML_TOOLS, byte_pieces, sentence_pieces

LLAMA = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n"
    "{% for t in tools or [] %}{{ t | tojson(indent=4) }}\n{% endfor %}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>\n\n{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content and loop.index0 < ns.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]"
    "{% else %}{{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
FAMILIES = {
    "chatml": (CHATML_TOOLS, IM, "<|im_end|>", None),
    "llama": (LLAMA, HEADERS, "<|eot_id|>", "<|begin_of_text|>"),
    "qwen3": (QWEN3, IM, "<|im_end|>", None),
    "mistral": (MISTRAL, ["<s>", "</s>"], "</s>", "<s>"),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], "<end_of_turn>", "<bos>"),
}
DAY = datetime.date(2025, 3, 1)


def tokenizer_of(family):
    template, special, eos, bos = FAMILIES[family]
    return byte_pieces(special=special, eos=eos, bos=bos, chat_template=template)


def begun(tokenizer, first="What is 12?", *, tools=None, template=None, **arguments):
    encoder = PromptEncoder(tokenizer, date=DAY)
    arguments = {"end_ids": [tokenizer.eos_token_id], **arguments}
    conversation = Conversation(encoder, ChatTemplate(template), tools, as_chat=True, **arguments)
    conversation.begin(first)
    return conversation


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def anew(conversation, messages=None):
    """The tokens of a whole conversation, as its template renders it at once."""
    encoder = conversation._encoder
    text = encoder.chats.text(messages or conversation.messages, conversation._chat, conversation._tools)
    return plain(encoder.tokenizer, text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_end", [True, False], ids=["ended", "cut"])
def test_turns_have_the_tokens_of_the_whole_conversation(family, has_end):
    tokenizer = tokenizer_of(family)
    conversation = begun(tokenizer)
    assert conversation.tokens == anew(conversation)
    for answer, said in (("the end", "\nis it?"), ("is 1212", "12"), ("", "go on"), ("the", "the ")):
        before = conversation.tokens
        ids = plain(tokenizer, answer) + ([tokenizer.eos_token_id] if has_end else [])
        conversation.answer(ids, answer)
        assert conversation.tokens == before + ids
        conversation.observe(said)
        assert conversation.tokens[: len(before) + len(ids)] == before + ids
        assert conversation.tokens == anew(conversation)
        assert conversation.messages[-2:] == [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": said},
        ]
    assert conversation.num_reencoded == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_tokens_stay_even_if_the_text_has_others(family):
    tokenizer = tokenizer_of(family)
    conversation = begun(tokenizer)
    before = conversation.tokens
    apart = [tokenizer.convert_tokens_to_ids(piece) for piece in "the"] + [tokenizer.eos_token_id]
    assert plain(tokenizer, "the") != apart[:-1]
    conversation.answer(apart, "the")
    conversation.observe("is")
    assert conversation.tokens[: len(before) + 4] == before + apart
    # Apart from them, it is the whole conversation.
    whole = anew(conversation)
    assert conversation.tokens[len(before) + 4 :] == whole[len(before) + 2 :]
    # Half a character at the cut stays, too.
    before, cut = conversation.tokens, plain(tokenizer, "é")[:1]
    conversation.answer(cut, "\ufffd")
    conversation.observe("is")
    assert conversation.tokens[: len(before) + 1] == before + cut
    assert conversation.num_reencoded == 0


def test_thoughts_that_the_template_drops_are_dropped_and_those_before_a_tools_answer_stay():
    tokenizer = tokenizer_of("qwen3")
    conversation = begun(tokenizer)
    first = conversation.tokens
    thought = plain(tokenizer, "<think>\nthe\n</think>\n\n12<|im_end|>")
    conversation.answer(thought, "<think>\nthe\n</think>\n\n12")
    conversation.observe([{"role": "tool", "name": "f", "content": "3"}])
    assert conversation.num_reencoded == 0
    assert conversation.tokens[: len(first) + len(thought)] == first + thought
    conversation.answer(plain(tokenizer, "3<|im_end|>"), "3")
    conversation.observe("And now?")
    assert conversation.num_reencoded == 1
    assert tokenizer.decode(conversation.tokens) == (
        "<|im_start|>user\nWhat is 12?<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n<|im_start|>user\n3"
        "<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert conversation.tokens == anew(conversation)
    # What was dropped is shown to people all the same.
    assert "<think>" in conversation.messages[1]["content"]
    # From there on nothing is written anew.
    conversation.answer(plain(tokenizer, "4<|im_end|>"), "4")
    conversation.observe("Well?")
    assert conversation.num_reencoded == 1


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_white_space_that_the_template_strips_is_stripped(family):
    tokenizer = tokenizer_of(family)
    conversation = begun(tokenizer)
    conversation.answer([*plain(tokenizer, "12 \n"), tokenizer.eos_token_id], "12 \n")
    conversation.observe("is")
    assert conversation.num_reencoded == 1
    assert conversation.tokens == anew(conversation)
    assert "12 \n" not in tokenizer.decode(conversation.tokens)


def test_the_runs_date_is_in_every_turn():
    conversation = begun(tokenizer_of("llama"))
    conversation.answer(plain(conversation._encoder.tokenizer, "is<|eot_id|>"), "is")
    conversation.observe("is")
    assert conversation._encoder.tokenizer.decode(conversation.tokens).count("Today Date: 01 Mar 2025") == 1
    assert conversation._encoder.told_date == "2025-03-01"


def test_an_end_that_the_template_does_not_put_there_is_replaced_by_its_own():
    tokenizer = tokenizer_of("llama")
    eot, eom = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>"])
    conversation = begun(tokenizer, end_ids=[eot, eom])
    conversation.answer([*plain(tokenizer, "12"), eom], "12")
    assert conversation.tokens[-1] == eom
    conversation.observe("is")
    assert eom not in conversation.tokens
    assert conversation.tokens == anew(conversation)
    assert conversation.num_reencoded == 0


def test_a_thought_that_the_template_opens_is_a_part_of_the_turn():
    opening = CHATML_TOOLS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = byte_pieces(special=IM, eos="<|im_end|>", chat_template=opening)
    conversation = begun(tokenizer)
    assert conversation.opened == "<think>\n"
    before, ids = conversation.tokens, plain(tokenizer, "is</think>12<|im_end|>")
    conversation.answer(ids, "<think>\nis</think>12")
    conversation.observe("is")
    assert conversation.num_reencoded == 0
    assert conversation.tokens == before + ids + plain(
        tokenizer, "\n<|im_start|>user\nis<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    # A template that drops the thought of the earlier turn has the whole encoded anew.
    tokenizer.chat_template = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    conversation = begun(tokenizer)
    conversation.answer(ids, "<think>\nis</think>12")
    conversation.observe("is")
    assert conversation.num_reencoded == 1
    assert "assistant\n12<|im_end|>" in tokenizer.decode(conversation.tokens)


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALLS = {
    "chatml": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "llama": '{"name": "add", "parameters": {"a": 1}}',
}


@pytest.mark.parametrize("family", CALLS)
@pytest.mark.parametrize("spacing", ["as the template", "as the model"])
def test_calls_of_tools_stay_as_they_were_sampled(family, spacing):
    tokenizer = tokenizer_of(family)
    conversation = begun(tokenizer, tools=[TOOL])
    assert '"add"' in tokenizer.decode(conversation.tokens)
    text = CALLS[family] if spacing == "as the template" else CALLS[family].replace('"a": 1', '"a":1')
    before, ids = conversation.tokens, [*plain(tokenizer, text), tokenizer.eos_token_id]
    message = parse_tool_calls(text, ids, tokenizer)
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    conversation.answer(ids, text, message)
    conversation.observe([{"role": "tool", "name": "add", "content": "13"}])
    assert conversation.num_reencoded == 0
    assert conversation.tokens[: len(before) + len(ids)] == before + ids
    if spacing == "as the template":
        assert conversation.tokens == anew(conversation)
    # A later turn still finds the earlier one as it was.
    middle, ids = conversation.tokens, [*plain(tokenizer, "13"), tokenizer.eos_token_id]
    conversation.answer(ids, "13", {"role": "assistant", "content": "13"})
    conversation.observe("Thanks.")
    assert conversation.num_reencoded == 0
    assert conversation.tokens[: len(middle) + len(ids)] == middle + ids


def test_calls_whose_frame_depends_on_them_are_encoded_anew():
    # Only a message with calls is followed by this mark.
    template = CHATML_TOOLS.replace(
        "{% endfor %}{% endif %}<|im_end|>", "{% endfor %}{% endif %}{{ '!' if m.tool_calls }}<|im_end|>"
    )
    tokenizer = byte_pieces(special=IM, eos="<|im_end|>", chat_template=template)
    conversation = begun(tokenizer, tools=[TOOL])
    text = CALLS["chatml"].replace('"a": 1', '"a":1')
    ids = plain(tokenizer, text)
    conversation.answer(ids, text, parse_tool_calls(text, ids, tokenizer))
    conversation.observe([{"role": "tool", "name": "add", "content": "13"}])
    assert conversation.num_reencoded == 1
    assert conversation.tokens == anew(conversation)


def test_thoughts_parsed_apart_are_never_kept_against_the_template():
    # The template never shows thoughts, and knows nothing of them in a message's content.
    tokenizer = tokenizer_of("chatml")
    conversation = begun(tokenizer)
    ids = plain(tokenizer, "<think>the</think>12<|im_end|>")
    conversation.answer(
        ids, "12", {"role": "assistant", "content": "12", "reasoning_content": "the", "tool_calls": []}
    )
    conversation.observe("is")
    assert conversation.num_reencoded == 1
    assert "<think>" not in tokenizer.decode(conversation.tokens)
    assert conversation.tokens == anew(conversation)


def test_an_answer_that_the_environment_has_begun_is_one_message_with_it():
    tokenizer = tokenizer_of("chatml")
    conversation = begun(
        tokenizer, [{"role": "user", "content": "the?"}, {"role": "assistant", "content": "it is"}]
    )
    before, ids = conversation.tokens, plain(tokenizer, " the<|im_end|>")
    assert tokenizer.decode(before).endswith("assistant\nit is")
    conversation.answer(ids, " the")
    conversation.observe("is")
    assert conversation.num_reencoded == 0
    assert conversation.tokens == before + ids + plain(
        tokenizer, "\n<|im_start|>user\nis<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_a_text_is_appended_to_as_it_is(legacy):
    tokenizer = sentence_pieces(legacy=legacy)
    conversation = Conversation(PromptEncoder(tokenizer), ChatTemplate(), end_ids=[tokenizer.eos_token_id])
    conversation.begin("the film is")
    asked = conversation.tokens
    assert tokenizer.convert_ids_to_tokens(asked) == ["<s>", "▁the", "▁film", "▁is"]
    good = tokenizer.convert_tokens_to_ids(["▁good"])
    conversation.answer([*good, tokenizer.eos_token_id], "good")
    conversation.observe("\nthe film is")
    # No space is put before the line break, and the text goes on: it has not ended.
    assert conversation.tokens == tokenizer("the film is good\nthe film is").input_ids
    conversation.answer(good, "good")
    conversation.observe("")
    assert conversation.tokens[-1:] == good
    with pytest.raises(ConversationError, match=r"began with a text.*task\.system"):
        conversation.observe([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("legacy", [True, False])
def test_chats_of_tokenizers_that_put_spaces_before_texts(legacy):
    tokenizer = sentence_pieces(legacy=legacy, chat_template=CHAT, eos_token="<|im_end|>")
    for end in ([], [tokenizer.eos_token_id]):
        conversation = begun(tokenizer, "the film")
        ids = plain(tokenizer, f"{tokenizer.decode(conversation.tokens)}is good")[len(conversation.tokens) :]
        conversation.answer([*ids, *end], "is good")
        conversation.observe("the film is bad")
        assert conversation.tokens == anew(conversation)
        assert conversation.num_reencoded == 0


class OwnTokens(PreTrainedTokenizerFast):
    """A tokenizer that makes tokens of chats in a way of its own: here, it counts the messages first."""

    def apply_chat_template(self, conversation, *, tokenize, return_dict, **arguments):
        assert (tokenize, return_dict) == (True, False)
        text = super().apply_chat_template(conversation, tokenize=False, **arguments)
        return plain(self, f"{'1' if 'COUNT' in text else ''}{text}")


def test_tokenizers_with_a_way_of_their_own_make_tokens_of_the_whole():
    made = tokenizer_of("chatml")
    tokenizer = OwnTokens(tokenizer_object=made.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML_TOOLS
    conversation, same = begun(tokenizer), begun(made)
    for each in (conversation, same):
        each.answer(plain(tokenizer, "12<|im_end|>"), "12")
        each.observe("is the 12?")
    assert conversation.tokens == same.tokens
    assert conversation.num_reencoded == 0
    conversation.answer(plain(tokenizer, "is<|im_end|>"), "is")
    conversation.observe("COUNT")
    assert conversation.num_reencoded == 1
    assert tokenizer.decode(conversation.tokens).startswith("1<|im_start|>user\nWhat")


def test_what_the_template_or_the_model_refuses_fails_the_episode_only():
    with pytest.raises(ConversationError, match="returned no messages"):
        begun(tokenizer_of("chatml"), [])
    conversation = begun(tokenizer_of("gemma"))
    conversation.answer(plain(conversation._encoder.tokenizer, "12"), "12")
    with pytest.raises(ConversationError, match=r"refuses the prompt.*roles must alternate"):
        conversation.observe([{"role": "tool", "name": "f", "content": "3"}])
    with pytest.raises(ConversationError, match="System role not supported"):
        begun(tokenizer_of("gemma"), [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    with pytest.raises(ConversationError, match="half a surrogate pair"):
        begun(tokenizer_of("chatml"), "\ud800")
    no_letters = PromptEncoder(AutoTokenizer.from_pretrained(QUICKSTART / "model"))
    no_text = Conversation(no_letters, ChatTemplate(), end_ids=[])
    no_text.begin("12=")
    no_text.answer(no_text.tokens[:1], "1")
    with pytest.raises(ConversationError, match=r"^the text '>' has no tokens"):
        no_text.observe(">")
    few = PromptEncoder(tokenizer_of("chatml"), num_tokens=263)
    conversation = Conversation(few, ChatTemplate(), end_ids=[])
    conversation.begin("the")
    conversation.answer(plain(few.tokenizer, "is"), "is")
    with pytest.raises(ConversationError, match=r"embeddings for 263 tokens only"):
        conversation.observe("<|im_start|>")
    own = OwnTokens(tokenizer_object=few.tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    own.chat_template = few.tokenizer.chat_template
    conversation = Conversation(PromptEncoder(own, num_tokens=263), ChatTemplate(), as_chat=True, end_ids=[])
    with pytest.raises(ConversationError, match=r"embeddings for 263 tokens only"):
        conversation.begin("the")
    # Without a template, no episode could begin.
    with pytest.raises(UserError, match="has no chat template"):
        begun(byte_pieces(special=IM, eos="<|im_end|>"))


def test_templates_are_refused_that_do_not_show_tools():
    def problem(template):
        tokenizer = byte_pieces(special=IM, eos="<|im_end|>", chat_template=template)
        with pytest.raises(UserError) as error:
            PromptEncoder(tokenizer).chats.check_tools(ChatTemplate(), [TOOL])
        return str(error.value)

    assert "task.chat_template: the chat template does not tell the model of its tools, such as 'add'" in (
        problem(CHAT)
    )
    assert "leaves out the model's calls of tools" in problem(CHAT + "{{ tools }}")
    assert "leaves out what a tool returns" in problem(
        CHATML_TOOLS.replace("{{ m.content }}\n</tool", "</tool")
    )
    assert "task.chat_template: there are tools, and the chat template fails" in problem(GEMMA)
    for family in CALLS:
        PromptEncoder(tokenizer_of(family)).chats.check_tools(ChatTemplate(), [TOOL])
    # Some tokenizers have a template for tools of its own.
    several = byte_pieces(special=IM, eos="<|im_end|>", chat_template={"tool_use": CHATML_TOOLS, "x": CHAT})
    PromptEncoder(several).chats.check_tools(ChatTemplate(), [TOOL])


def _templates_of_trl():
    found = importlib.util.find_spec("trl")
    folder = Path(next(iter(found.submodule_search_locations))) / "chat_templates" if found else Path("none")
    return sorted(folder.glob("*.jinja"))


@pytest.mark.skipif(not _templates_of_trl(), reason="needs trl, for the templates of many models in it")
@pytest.mark.parametrize("path", _templates_of_trl(), ids=lambda path: path.stem)
def test_templates_of_many_models(path):
    """Whatever a template does, the text is what it makes of the whole conversation."""
    special = ["<|im_start|>", "<|im_end|>", "<bos>", "<eos>"]
    tokenizer = byte_pieces(special=special, eos="<|im_end|>", bos="<bos>", chat_template=path.read_text())
    try:
        conversation = begun(tokenizer)
        conversation.answer([], "")
        conversation.observe("the")
    except ConversationError as error:
        pytest.skip(str(error))
    conversation = begun(tokenizer)
    for answer in ("the", "<think>\nthe\n</think>\n\nis", "12"):
        before, ids, count = conversation.tokens, plain(tokenizer, answer), conversation.num_reencoded
        conversation.answer(ids, answer)
        conversation.observe("is the 12?")
        whole = conversation._encoder.chats.text(conversation._given, ChatTemplate())
        assert tokenizer.decode(conversation.tokens) == whole
        assert conversation.tokens == plain(tokenizer, whole)
        if conversation.num_reencoded == count:
            assert conversation.tokens[: len(before) + len(ids)] == before + ids
