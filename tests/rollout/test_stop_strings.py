"""Stop texts in answers that grow, against decoding all of an answer at every check."""

import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shardes.models.build import load_tokenizer
from shardes.rollout.stop_strings import TOKENS_PER_WINDOW, GrowingAnswer, StopStrings
from tests.helpers.decoding import composed, decoded, random_prompts
from tests.helpers.models import QUICKSTART
from tests.helpers.tokenizers import sentence_pieces

WORDS = [
    *["don't", "we've", "it's", "'", '"', ".", " .", ",", "?", "\n", "\n\n", " ", "  ", "END", "</answer>"],
    *["é", "naïve", "漢字", "かな", "한국어", "😀", "👩\u200d🚀", "\ufffd", "x" * 30, "12", "the answer is"],
]
CHARACTERS = sorted(set("".join(WORDS)) - {" "})
SPECIAL = ["<unk>", "<pad>", "<eos>"]


class Bytes:
    """A tokenizer whose tokens are bytes, whatever they make."""

    def __len__(self):
        return 256

    def decode(self, tokens, *, skip_special_tokens):
        return bytes(tokens).decode(errors="replace")


def wrapped(model, decoder, pre_tokenizer=None, **arguments):
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **arguments)
    assert set(fast.all_special_tokens) == set(SPECIAL)
    return fast


def numbered(pieces):
    return {piece: i for i, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}


def byte_level():
    """Tokens of up to three bytes, which may begin and end within a character."""
    splits = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [splits.pre_tokenize_str(word)[0][0] for word in WORDS]
    parts = [word[i : i + 3] for word in words for i in range(0, len(word), 3)]
    merges = [(part[:i], part[i]) for part in parts for i in range(1, len(part))]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    model = models.BPE(vocab=numbered(pieces), merges=list(dict.fromkeys(merges)))
    return wrapped(model, decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False))


def byte_fallback():
    """As Llama 2 decodes: a run of bytes is text only if all of it is."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁the", "▁answer", "▁▁", "'", "t", ".", "don", "▁'", "END", "<", "/", "an", "swer", ">"]
    model = models.BPE(vocab=numbered(pieces), merges=[], byte_fallback=True, unk_token="<unk>")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return wrapped(model, decoders.Sequence(parts))


def metaspace():
    pieces = ["▁", *CHARACTERS, *(word.replace(" ", "▁") for word in WORDS), "▁the", "▁answer", "▁'"]
    model = models.Unigram([(piece, -float(i)) for piece, i in numbered(pieces).items()], unk_id=0)
    return wrapped(model, decoders.Metaspace(), pre_tokenizers.Metaspace(), clean_up_tokenization_spaces=True)


def word_pieces():
    pieces = [*CHARACTERS, *(f"##{piece}" for piece in CHARACTERS), "don", "the", "answer", "##wer", "an"]
    model = models.WordPiece(vocab=numbered(pieces), unk_token="<unk>")
    return wrapped(
        model, decoders.WordPiece(), pre_tokenizers.BertPreTokenizer(), clean_up_tokenization_spaces=True
    )


def ends_of_words():
    pieces = [*CHARACTERS, *(f"{piece}</w>" for piece in CHARACTERS), "don", "the</w>", "answer</w>", "an"]
    model = models.BPE(vocab=numbered(pieces), merges=[], unk_token="<unk>", end_of_word_suffix="</w>")
    return wrapped(
        model,
        decoders.BPEDecoder(suffix="</w>"),
        pre_tokenizers.Whitespace(),
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )


def shipped(name):
    return load_tokenizer(QUICKSTART.parent / name / "model", trust_remote_code=False)


TOKENIZERS = {
    "quickstart": lambda: shipped("quickstart"),
    "addition": lambda: shipped("addition"),
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "metaspace": metaspace,
    "word pieces": word_pieces,
    "ends of words": ends_of_words,
    "bytes": Bytes,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True)


def tokens_of(tokenizer, text):
    if isinstance(tokenizer, Bytes):
        return list(text.encode())
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def is_in(tokenizer, stops, tokens):
    """Decodes all tokens."""
    text = text_of(tokenizer, tokens)
    return any(stop in text for stop in stops)


def random_answer(tokenizer, rng):
    """Words, repetitions and any tokens at all, in shares that differ from answer to answer."""
    weights = [rng.random(), rng.random() ** 2, rng.random() ** 4]
    num_words, tokens = rng.randrange(5, 120), []
    few = rng.sample(WORDS, rng.randrange(1, len(WORDS)))
    for kind in rng.choices(range(3), weights, k=num_words):
        word = rng.choice(few) + rng.choice(["", " "])
        pieces = tokens_of(tokenizer, word)
        if kind == 0:
            tokens += pieces
        elif kind == 1:
            tokens += pieces * rng.randrange(1, 30)
        else:
            tokens += rng.choices(range(len(tokenizer)), k=rng.randrange(1, 10))
    return tokens[: rng.randrange(1, 400)]


def random_stops(tokenizer, tokens, rng):
    """Pieces of an answer's text, some of them changed a little, so that they are nearly there."""
    stops = []
    for _ in range(rng.randrange(1, 4)):
        end = rng.randrange(len(tokens) + 1)
        text = text_of(tokenizer, tokens[:end])[-rng.randrange(1, 50) :][: rng.randrange(1, 25)] or "END"
        change = rng.random()
        if change < 0.1:
            text = text.replace(" ", "") or "END"
        elif change < 0.2:
            text = " ".join(text)
        elif change < 0.5:
            text += rng.choice("!x \n")
        stops.append(text)
    return stops


def check(tokenizer, stops, tokens, strides):
    """Compares the checks up to the first that finds a text, and the end; returns that check's tokens."""
    stop = StopStrings(stops, tokenizer)
    growing, end, is_over = GrowingAnswer(stop), 0, False
    while end < len(tokens) and not is_over:
        start, end = end, min(end + next(strides), len(tokens))
        is_over = is_in(tokenizer, stops, tokens[:end])
        assert growing.has_stopped(tokens[start:end]) == is_over, (stops, end)
    wanted = None
    if is_in(tokenizer, stops, tokens):
        ends = range(1, len(tokens) + 1)
        wanted = next(end for end in ends if is_in(tokenizer, stops, tokens[:end]))
    assert stop.find(tokens) == wanted, stops
    return end if is_over else None


@pytest.mark.parametrize("stride", [1, 8, None])
def test_checks_and_ends_are_those_of_decoding_everything(tokenizer, stride):
    hits = []
    for seed in range(60):
        rng = random.Random(f"{seed} {stride}")
        tokens = random_answer(tokenizer, rng)
        stops = random_stops(tokenizer, tokens, rng)
        strides = itertools.repeat(stride) if stride else iter(rng.choices(range(1, 40), k=len(tokens)))
        hits.append(check(tokenizer, stops, tokens, strides))
    found = [end for end in hits if end is not None]
    assert len(found) > 5, "some were meant to be found"
    assert max(found) > 2 * TOKENS_PER_WINDOW, "some of them after windows were shortened"


@pytest.mark.parametrize(("stride", "skips"), [(1, True), (None, True), (8, False)])
def test_a_stop_text_may_have_special_tokens_in_it(tokenizer, stride, skips):
    """Such a text is looked for in the text of all tokens, any other in what rewards see."""
    if isinstance(tokenizer, Bytes):
        pytest.skip("it has no special tokens")
    names = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    num_found = num_hidden = 0
    for seed in range(16):
        rng = random.Random(f"{seed} {stride}")
        tokens = random_answer(tokenizer, rng)
        for _ in range(rng.randrange(3)):
            place = rng.randrange(len(tokens) + 1)
            tokens[place:place] = rng.choices(list(names.values()), k=rng.randrange(1, 3))
        end = rng.randrange(len(tokens) + 1)
        whole = tokenizer.decode(tokens[:end], skip_special_tokens=False)[-rng.randrange(1, 30) :]
        stops = [rng.choice(list(names)), "END" if "\ufffd" in whole else whole or "END", "END"][
            rng.randrange(3) :
        ]
        hidden = [text for text in stops if not skips or any(name in text for name in names)]
        num_hidden += len(hidden)

        def found(end, texts, *, skips, tokens=tokens):
            text = tokenizer.decode(tokens[:end], skip_special_tokens=skips)
            return any(stop in text for stop in texts)

        def first_end(texts, *, skips, tokens=tokens, found=found):
            """None as well if later tokens took the text back, as words that lose their spaces do."""
            ends = [end for end in range(1, len(tokens) + 1) if found(end, texts, skips=skips)]
            return ends[0] if ends and ends[-1] == len(tokens) else None

        shown = [stop for stop in stops if stop not in hidden]
        ends = [first_end(shown, skips=True), first_end(hidden, skips=False)]
        wanted = min((end for end in ends if end is not None), default=None)
        stop = StopStrings(stops, tokenizer, skip_special_tokens=skips)
        assert stop.find(tokens) == wanted, stops
        strides = itertools.repeat(stride) if stride else iter(rng.choices(range(1, 40), k=len(tokens)))
        growing, end, is_over = GrowingAnswer(stop), 0, False
        while end < len(tokens) and not is_over:
            start, end = end, min(end + next(strides), len(tokens))
            is_over = found(end, shown, skips=True) or found(end, hidden, skips=False)
            assert growing.has_stopped(tokens[start:end]) == is_over, (stops, end)
        num_found += wanted is not None
    assert min(num_found, num_hidden) > 2, "some were meant to be found"


def test_what_is_special_stays_out_of_text_or_not():
    tokenizer = sentence_pieces(legacy=False)
    tokens = tokenizer("good<think>bad</think>the<|im_end|>film", add_special_tokens=False)["input_ids"]
    stop = StopStrings(["<|im_end|>", "the"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens[: stop.find(tokens)])[-3:] == [*"the"]
    stop = StopStrings(["<|im_end|>"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens[: stop.find(tokens)])[-1] == "<|im_end|>"
    assert stop.trim(stop.decode(tokens[: stop.find(tokens)])) == "goodbadthe"
    seen = StopStrings(["<|im_end|>"], tokenizer, skip_special_tokens=False)
    assert seen.trim(seen.decode(tokens)) == "good<think>bad</think>the<|im_end|>"
    # Pieces of one are no text of their own.
    assert StopStrings(["im_end"], tokenizer).find(tokens) is None
    assert StopStrings(["im_end"], tokenizer, skip_special_tokens=False).find(tokens) is not None


@pytest.mark.parametrize("stride", [1, 8])
def test_a_text_is_found_wherever_windows_begin(tokenizer, stride):
    text = "12 + 3 = 4, don't 5 6 7 8 9 " * 2
    stop = text_of(tokenizer, tokens_of(tokenizer, text + "0" + text))
    for length in range(50, 90):
        tokens = tokens_of(tokenizer, "1 " * length + text + "0" + text + "9")
        assert check(tokenizer, [stop.strip()], tokens, itertools.repeat(stride)), length


@pytest.mark.parametrize("first", range(8))
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_a_run_of_bytes_is_seen_as_soon_as_all_of_it_is_text(stride, first):
    tokenizer = byte_fallback()
    for run in ("漢" * 100, "😁" + "😀" * 80, "é" * 150):
        tokens = tokens_of(tokenizer, "END" * first + run + "." * 40)
        for stop in (run[:2], run[-3:] + ".", run[-3:] + "." * 20, "\ufffd\ufffd\ufffd" + run[-1]):
            check(tokenizer, [stop], tokens, itertools.repeat(stride))


class Counts:
    """Counts the tokens that are decoded."""

    num_tokens = 0

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def decode(self, tokens, **arguments):
        self.num_tokens += len(tokens)
        return self._tokenizer.decode(tokens, **arguments)


@pytest.mark.parametrize("characters", ["0123456789+-= don't.", "12漢éかな한😀ñ"])
def test_a_check_decodes_a_window_and_not_all_of_an_answer(tokenizer, characters):
    text = "".join(random.Random(0).choices(characters, k=20000))
    tokens = tokens_of(tokenizer, text)[:2000]
    counts = Counts(tokenizer)
    growing = GrowingAnswer(StopStrings(["</answer>", "answer is 13"], counts))
    assert not any(growing.has_stopped([token]) for token in tokens)
    assert counts.num_tokens < 8 * TOKENS_PER_WINDOW * len(tokens), "a thousand a check is all of them"


@pytest.mark.parametrize("any_rank", [None, lambda flag: True], ids=["alone", "in step"])
def test_long_answers_end_where_decoding_everything_ends_them(models, any_rank):
    tokenizer, model, budget = shipped("quickstart"), models["phi3"], 150
    batch = composed(random_prompts(3), max_new_tokens=budget)
    whole = decoded(model, batch, max_new_tokens=budget)
    ends = range(20, 20 + 10 * len(whole), 10)
    stops = [text_of(tokenizer, answer[:end])[-12:] for answer, end in zip(whole, ends, strict=True)]
    wanted = []
    for answer in whole:
        ends = (end for end in range(1, budget) if is_in(tokenizer, stops, answer[:end]))
        wanted.append(answer[: next(ends, budget)])
    lengths = sorted(map(len, wanted))
    assert lengths[-1] > 2 * TOKENS_PER_WINDOW and len(set(lengths)) > 4, "rows leave the batch one by one"
    stop = StopStrings(stops, tokenizer)
    assert decoded(model, batch, max_new_tokens=budget, stop=stop, any_rank=any_rank) == wanted
