"""Small tokenizers of the kinds that models have."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
WORDS = ["▁good", "▁bad", "▁the", "▁film", "▁is", "good", "▁▁"]
CHARACTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!:<>/|()\n='_+-"
VOCABULARY = [*SPECIAL, *WORDS, *CHARACTERS]

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# ChatML with tools, as Qwen 2.5 has it.
CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first else '' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentence_pieces(
    *, bos=True, eos=False, legacy=True, chat_template=None, special=SPECIAL[1:], **arguments
):
    """A tokenizer as Llama 2 has it, by default: each text begins with a space, and with ``<s>``.

    ``legacy`` has the normaliser put the space, as old conversions do, otherwise the pre-tokenizer does.
    """
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(VOCABULARY)], unk_id=0)
    tokenizer = Tokenizer(model)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(parts)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(special)
    if bos or eos:
        around = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        known = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=known)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | arguments
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = chat_template
    return made


def byte_pieces(*, special, eos, bos=None, chat_template=None, **arguments):
    """A tokenizer as GPT-2 and Llama 3 have it: any text, in bytes that a few merges make words of."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "s"), ("Ġ", "is"), ("Ċ", "Ċ"), ("1", "2")]
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    tokenizer = Tokenizer(model)
    # Line breaks are tokens of their own, whatever follows them.
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?[^\s\p{N}]+| ?\p{N}+|\s+"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, **arguments)
    made.chat_template = chat_template
    return made
