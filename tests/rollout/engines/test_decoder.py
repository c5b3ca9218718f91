"""The decode loop against transformers' own: tokens, budgets, stops, shared prefixes, cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardes.errors import UserError
from shardes.models.build import load_tokenizer
from shardes.rollout.batching import LEAST_PREFIX, shared_prefix
from shardes.rollout.engines.transformers import rows as decoding_rows
from shardes.rollout.engines.transformers.decoder import TOKENS_PER_CHECK, Decoder
from shardes.rollout.engines.transformers.rows import LEAST_ROWS
from shardes.rollout.stop_strings import StopStrings
from tests.helpers.decoding import (
    BUDGET,
    EVERY,
    PAD,
    VOCABULARY,
    HeadInputs,
    Rows,
    composed,
    decoded,
    generated,
    random_prompts,
)
from tests.helpers.models import QUICKSTART


@pytest.mark.parametrize("name", EVERY)
def test_greedy_answers_are_those_of_transformers(models, name):
    batch = composed(random_prompts(EVERY.index(name)))
    lengths = set()
    for eos_ids in ([], [3], [17, 2], [22, 30, 4], [10, 5, 8, 9, 33]):
        wanted = generated(models[name], batch, eos_ids=eos_ids)
        assert decoded(models[name], batch, eos_ids=eos_ids) == wanted
        lengths |= set(map(len, wanted))
    assert len(lengths) >= 4, "rows were meant to end at different places"


@pytest.mark.parametrize("name", EVERY)
def test_a_shared_prefix_computed_once_changes_no_token(models, name):
    prompts = random_prompts(EVERY.index(name) + 50, prefix_length=LEAST_PREFIX + 3)
    prefix = shared_prefix(prompts)
    assert LEAST_PREFIX <= len(prefix) <= LEAST_PREFIX + 3
    batch = composed(prompts)
    wanted = generated(models[name], batch, eos_ids=[3, 12])
    with Rows(models[name]) as seen:
        assert decoded(models[name], batch, eos_ids=[3, 12], prefix=prefix) == wanted
    width = batch.input_ids.shape[1]
    assert seen[:2] == [(1, len(prefix)), (13, width - len(prefix))]


@pytest.mark.parametrize("name", EVERY)
def test_the_head_computes_one_position_of_all_rows_at_once(models, name):
    batch = composed(random_prompts(3))
    wanted = generated(models[name], batch, max_new_tokens=3)
    with HeadInputs(models[name]) as seen:
        assert decoded(models[name], batch, max_new_tokens=3) == wanted
    assert seen[:3] == [(13, 1)] * 3


def test_a_prefix_is_shared_only_if_it_is_long_and_nobodys_whole_prompt():
    long = list(range(2, 2 + LEAST_PREFIX))
    assert shared_prefix([]) == shared_prefix([[*long, 1]]) == []
    assert shared_prefix([[*long, 1], [*long, 2, 3]]) == long
    assert shared_prefix([long, [*long, 2, 3]]) == []
    assert shared_prefix([[*long, 7], [*long, 7, 3]]) == long
    assert shared_prefix([[1, *long], [2, *long]]) == []


@pytest.mark.parametrize("name", EVERY)
def test_prompts_of_like_lengths_are_computed_together(models, name, monkeypatch):
    model = models[name]
    monkeypatch.setattr(decoding_rows, "TOKENS_PER_PART", 8)  # long prompts do not fit these models
    for prefix_length in (0, LEAST_PREFIX):
        prompts = random_prompts(EVERY.index(name) + 90, num_prompts=37, prefix_length=prefix_length)
        prefix = shared_prefix(prompts)
        batch = composed(prompts)
        wanted = generated(model, batch, eos_ids=[3, 12])
        lengths = sorted(map(len, prompts))
        with Rows(model) as seen:
            assert decoded(model, batch, eos_ids=[3, 12], prefix=prefix) == wanted
        parts = [(12, lengths[11]), (12, lengths[23]), (13, lengths[36])]
        first = [(1, len(prefix))] if prefix else []
        longest = lengths[-1]
        widths = [(rows, longest - max(longest - length, len(prefix))) for rows, length in parts]
        assert seen[: len(first) + 3] == first + widths
        with Rows(model) as seen:
            decoder = Decoder(eos_ids=[3, 12], pad_id=PAD, max_new_tokens=BUDGET)
            decoder.begin(model, torch.tensor([prefix]) if prefix else None)
            answers = decoder.decode(model, batch, any_rank=lambda flag: flag, num_prefills=5)
        assert answers.tokens == wanted
        assert seen[: len(first) + 5] == [*first, *widths, widths[-1], widths[-1]]


def test_prompts_are_parted_only_if_that_saves_padding():
    def parts(*lengths, num_members=1):
        found = decoding_rows.prefill_parts(lengths, num_members=num_members)
        assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])]
        assert found[-1].stop == len(lengths)
        return [part.stop - part.start for part in found]

    assert parts(7) == [1]
    assert parts(*[9] * 64) == [64]
    assert parts(*[5] * 63, 8) == [64]
    assert parts(*[5] * 63, 12) == [32, 32]
    assert parts(*range(8, 40)) == [16, 16]
    assert parts(*range(8, 24)) == [16]
    assert parts(*range(8, 24), num_members=3) == [8, 8]
    assert parts(*range(8, 24), num_members=200) == [1] * 16


@given(st.lists(st.integers(1, 60), min_size=1, max_size=70), st.integers(1, 40))
def test_fewer_members_never_take_more_parts(lengths, num_members):
    """In step, all ranks make as many forwards as a full chunk takes."""
    lengths = tuple(sorted(lengths))
    counts = [len(decoding_rows.prefill_parts(lengths, num_members=n)) for n in range(1, num_members + 1)]
    assert counts == sorted(counts)


def test_rows_that_have_ended_are_no_longer_computed(models):
    model = models["qwen2"]
    batch = composed(random_prompts(0))
    eos_ids = [17, 2, 9, 30, 5, 21]
    lengths = sorted(map(len, generated(model, batch, eos_ids=eos_ids)))
    with Rows(model) as seen:
        decoded(model, batch, eos_ids=eos_ids)
    live = [sum(length > step for length in lengths) for step in range(1, lengths[-1])]
    assert [rows for rows, _ in seen[1:]] == [max(rows, LEAST_ROWS) for rows in live]
    assert min(live) < LEAST_ROWS < max(live)


@pytest.mark.parametrize("max_new_tokens", [1, 2, TOKENS_PER_CHECK, TOKENS_PER_CHECK + 1])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt2"])
def test_small_budgets_are_kept_exactly(models, name, max_new_tokens):
    batch = composed(random_prompts(2), max_new_tokens=max_new_tokens)
    wanted = generated(models[name], batch, max_new_tokens=max_new_tokens, eos_ids=[3])
    assert decoded(models[name], batch, max_new_tokens=max_new_tokens, eos_ids=[3]) == wanted


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@pytest.mark.parametrize("any_rank", [None, lambda flag: True], ids=["alone", "in step"])
def test_an_answer_ends_where_the_models_positions_do(models, name, any_rank):
    prompts = random_prompts(4)
    whole = generated(models[name], composed(prompts), eos_ids=[3])
    limit = 14
    batch = composed(prompts, max_positions=limit)
    wanted = [answer[: limit - len(prompts[row])] for row, answer in zip(batch.rows, whole, strict=True)]
    assert wanted != whole
    assert decoded(models[name], batch, eos_ids=[3], any_rank=any_rank) == wanted


def test_a_prompt_that_leaves_no_place_for_an_answer_is_refused():
    with pytest.raises(UserError, match=r"a prompt has 9 tokens, but the model has 9 positions"):
        composed(random_prompts(1), max_positions=9)
    assert composed(random_prompts(1), max_positions=9 + BUDGET).budgets is None


def test_the_storage_serves_batches_of_any_shape_in_any_order(models):
    for name in ("qwen2", "gemma2"):
        model = models[name]
        decoder = Decoder(eos_ids=[3, 9], pad_id=PAD, max_new_tokens=BUDGET)
        for seed, num_prompts in enumerate((9, 4, 13, 5, 13)):
            batch = composed(random_prompts(seed + 10, num_prompts=num_prompts))
            decoder.begin(model)
            assert decoder.decode(model, batch).tokens == generated(model, batch, eos_ids=[3, 9])


def test_the_storage_stays_where_it_is(models):
    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET)
    addresses = set()
    for seed in range(3):
        decoder.begin(models["qwen2"])
        decoder.decode(models["qwen2"], composed(random_prompts(seed)))
        addresses.add(tuple(layer.keys.data_ptr() for layer in decoder._slab.layers))
    assert len(addresses) == 1


def test_ranks_in_step_go_on_until_all_have_ended_and_ask_seldom(models):
    batch, looks = composed(random_prompts(0), max_new_tokens=100), []

    def any_rank(unfinished):
        looks.append(unfinished)
        return len(looks) < 3  # another rank is busy for two looks more

    every = list(range(VOCABULARY))
    with Rows(models["qwen2"]) as seen:
        answers = decoded(models["qwen2"], batch, max_new_tokens=100, eos_ids=every, any_rank=any_rank)
    assert looks == [False] * 3
    assert len(seen) == 3 * TOKENS_PER_CHECK
    assert [len(answer) for answer in answers] == [1] * 13
    assert {rows for rows, _ in seen[1:]} == {LEAST_ROWS}


class Linear(torch.nn.Module):
    """A model that does not remember."""

    def __init__(self, like):
        super().__init__()
        self.config = like.config
        self.head = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids, **_):
        return type("Output", (), {"logits": self.head(input_ids)})


def test_a_model_without_a_cache_is_refused_by_name(models):
    with pytest.raises(UserError, match="Linear keeps no key-value cache"):
        decoded(Linear(models["qwen2"]), composed(random_prompts(0)))


def test_logits_that_are_not_finite_are_told(models):
    model = models["llama"]
    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=5)
    batch = composed(random_prompts(0))
    decoder.begin(model)
    assert decoder.decode(model, batch).is_finite
    for value in (float("nan"), float("inf")):
        handle = model.lm_head.register_forward_hook(
            lambda module, args, logits, value=value: logits.index_fill(-1, torch.tensor([7]), value)
        )
        assert not decoder.decode(model, batch).is_finite
        handle.remove()
    assert decoder.decode(model, batch).is_finite


# Texts that end an answer.


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(QUICKSTART / "model", trust_remote_code=False)


def test_a_stop_text_ends_an_answer_wherever_it_is_seen(models, tokenizer):
    model = models["mistral"]
    batch = composed(random_prompts(3))
    whole = decoded(model, batch)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in whole]
    stops = [texts[0][3:5], texts[1][6]]
    stop = StopStrings(stops, tokenizer)
    wanted = []
    for answer in whole:
        ends = [
            n
            for n in range(1, len(answer) + 1)
            if any(s in tokenizer.decode(answer[:n], skip_special_tokens=True) for s in stops)
        ]
        wanted.append(answer[: ends[0]] if ends else answer)
    assert len({len(answer) for answer in wanted}) > 2
    with Rows(model) as seen:
        assert decoded(model, batch, stop=stop) == wanted
    assert seen[-1][0] < 13, "rows that were stopped leave the batch"
    # In step with others, rows are only looked at now and then, and cut all the same.
    assert decoded(model, batch, stop=stop, any_rank=lambda flag: True) == wanted


def test_a_stop_text_is_kept_and_what_follows_in_its_token_is_not(tokenizer):
    stop = StopStrings(["</a>", "END"], tokenizer)
    assert stop.trim("x</a>y") == "x</a>"
    assert stop.trim("xENDy</a>") == "xEND"
    assert stop.trim("nothing") == "nothing"
    assert not StopStrings([], tokenizer)
    assert StopStrings([], tokenizer).find([5, 6]) is None
