"""The decode loop against transformers' own: tokens, budgets, stops, shared prefixes, draws, cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shardes.errors import UserError
from shardes.modeling import load_tokenizer
from shardes.rollout import decode
from shardes.rollout.batching import LEAST_PREFIX, compose, shared_prefix
from shardes.rollout.decode import LEAST_ROWS, TOKENS_PER_CHECK, Answers, Decoder
from shardes.rollout.graphs import ladder
from shardes.rollout.likelihood import completion_log_likelihoods, compose_completions
from shardes.rollout.sampling import Sampling
from shardes.rollout.stop_texts import StopTexts
from tests.helpers.models import ARCHITECTURES, QUICKSTART, tiny_model

PAD = 0
BUDGET = 20
VOCABULARY = 37


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    loaded = {}
    for i, name in enumerate(ARCHITECTURES):
        path = tiny_model(root / name, tied=name in ("qwen2", "phi3"), architecture=name, seed=i)
        loaded[name] = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(2)
    # Learned positions: unlike rotary ones, they tell a shifted row from one that is not.
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    config = GPT2Config(**sizes, initializer_range=0.5, bos_token_id=None, eos_token_id=1)
    loaded["gpt2"] = AutoModelForCausalLM.from_config(config)
    return {name: model.eval() for name, model in loaded.items()}


EVERY = [*ARCHITECTURES, "gpt2"]


def random_prompts(seed, *, num_prompts=13, prefix_length=0):
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()

    prefix = some(prefix_length)
    return [prefix + some(1 + (5 * i) % 9) for i in range(num_prompts)]


def composed(prompts, *, max_new_tokens=BUDGET, max_positions=None):
    (batch,) = compose(
        prompts,
        micro_batch_size=len(prompts),
        pad_id=PAD,
        max_new_tokens=max_new_tokens,
        max_positions=max_positions,
    )
    return batch


def generated(model, batch, *, max_new_tokens=BUDGET, eos_ids=()):
    """What transformers generates for a batch, each answer up to its end."""
    output = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=PAD,
    )[:, batch.input_ids.shape[1] :]
    ends = [[i for i, token in enumerate(row) if token in eos_ids] for row in output.tolist()]
    return [row[: end[0] + 1] if end else row for row, end in zip(output.tolist(), ends, strict=True)]


def decoded(model, batch, *, max_new_tokens=BUDGET, eos_ids=(), prefix=(), any_rank=None, **arguments):
    decoder = Decoder(eos_ids=eos_ids, pad_id=PAD, max_new_tokens=max_new_tokens, **arguments)
    decoder.begin(model, torch.tensor([prefix]) if prefix else None)
    return decoder.decode(model, batch, any_rank=any_rank).tokens


class Rows:
    """Counts the rows of every forward of a model."""

    def __init__(self, model):
        self.seen = []
        self._handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, keywords):
        self.seen.append(tuple(keywords["input_ids"].shape))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self._handle.remove()


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
    monkeypatch.setattr(decode, "TOKENS_PER_PART", 8)  # long prompts do not fit these models
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
    assert decode.prefill_parts([7]) == [slice(0, 1)]
    assert decode.prefill_parts([9] * 64) == [slice(0, 64)]
    assert decode.prefill_parts([*[5] * 63, 12]) == [slice(0, 64)]
    assert decode.prefill_parts(list(range(8, 40))) == [slice(0, 16), slice(16, 32)]


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


# Captured steps, with a capture that only remembers the function.


class Remembered:
    """Stands in for a CUDA graph: a replay runs the function, which reads the addresses it was given."""

    made = 0

    def __init__(self, function):
        Remembered.made += 1
        self._function = function
        function()

    def replay(self):
        self._function()


CAPTURED = [name for name in EVERY if name not in ("gemma2", "gemma3")]


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_give_the_same_answers(models, name):
    model = models[name]
    decoder = Decoder(
        eos_ids=[3, 12, 9, 20, 33, 28], pad_id=PAD, max_new_tokens=BUDGET, make_graph=Remembered
    )
    Remembered.made, sizes = 0, set()
    for seed in (0, 1):
        prompts = random_prompts(seed, num_prompts=19, prefix_length=LEAST_PREFIX)
        batch = composed(prompts)
        with Rows(model) as seen:
            for prefix in (None, torch.tensor([shared_prefix(prompts)])):
                decoder.begin(model, prefix)
                assert decoder.decode(model, batch).tokens == generated(
                    model, batch, eos_ids=[3, 12, 9, 20, 33, 28]
                )
        sizes |= {rows for rows, width in seen if width == 1}
    assert sizes <= set(ladder(19))
    assert Remembered.made == len(sizes), "batches of the same sizes share what was captured"
    assert name == "gpt_neox" or len(sizes) == 2, "a shrunken batch was meant to have a step of its own"
    assert decoder._graphs.is_usable


def test_the_sizes_that_are_captured_are_halves():
    assert ladder(64) == [64, 32, 16, 8]
    assert ladder(19) == [19, 10]
    assert ladder(5) == [5]


def test_what_cannot_be_captured_is_decoded_step_by_step_with_one_warning(models, caplog):
    model, batch = models["qwen2"], composed(random_prompts(0))
    wanted = generated(model, batch, eos_ids=[3])

    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=fails)
    for _ in range(2):
        decoder.begin(model)
        assert decoder.decode(model, batch).tokens == wanted
    assert [record.message for record in caplog.records] == [
        "Qwen2ForCausalLM cannot be captured as a CUDA graph (RuntimeError: operation not permitted when "
        "stream is capturing), so each token is decoded kernel by kernel"
    ]


def test_a_capture_that_gives_other_logits_is_not_used(models, caplog):
    model, batch = models["qwen2"], composed(random_prompts(0))

    class Stale(Remembered):
        def replay(self):
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
            self._function()
            for parameter in model.parameters():
                parameter.data.div_(1.5)

    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=Stale)
    decoder.begin(model)
    assert decoder.decode(model, batch).tokens == generated(model, batch, eos_ids=[3])
    assert "other logits" in caplog.text


def test_a_member_that_is_not_finite_does_not_spoil_the_next(models):
    model, batch = models["mistral"], composed(random_prompts(0))
    wanted = generated(model, batch, eos_ids=[3])
    for make_graph in (None, Remembered):
        decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=make_graph)
        handle = model.model.layers[0].register_forward_hook(
            lambda module, args, states: states * float("nan")
        )
        decoder.begin(model)
        assert not decoder.decode(model, batch).is_finite
        handle.remove()
        assert decoder.decode(model, batch) == Answers(wanted, [True] * len(wanted))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt_neox"])
def test_captured_steps_on_a_device_give_the_models_own_tokens(models, name):
    model = models[name].to("cuda")
    try:
        batch = composed(random_prompts(0, num_prompts=19)).to("cuda")
        decoder = Decoder(eos_ids=[3, 12], pad_id=PAD, max_new_tokens=BUDGET)
        wanted = generated(model, batch, eos_ids=[3, 12])
        for _ in range(2):
            decoder.begin(model)
            assert decoder.decode(model, batch).tokens == wanted
        assert decoder._graphs.is_usable
        # A member's weights are written where the captured ones were.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        assert decoder.decode(model, batch).tokens == generated(model, batch, eos_ids=[3, 12])
    finally:
        models[name].to("cpu")


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
    stop = StopTexts(stops, tokenizer)
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
    stop = StopTexts(["</a>", "END"], tokenizer)
    assert stop.trim("x</a>y") == "x</a>"
    assert stop.trim("xENDy</a>") == "xEND"
    assert stop.trim("nothing") == "nothing"
    assert not StopTexts([], tokenizer)
    assert StopTexts([], tokenizer).find([5, 6]) is None


# Drawing.


def draws(sampling, logits, *, count):
    uniforms = torch.from_numpy(
        np.concatenate(
            [
                sampling.uniforms(iteration=1, prompts=[i], samples=[0], num_tokens=1000)[0].numpy()
                for i in range(count // 1000)
            ]
        )
    )
    tokens = sampling.draw(logits.expand(count, -1), uniforms)
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1]) / count


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.6, None, 1.0), (1.3, 5, 1.0), (1.0, None, 0.7), (0.8, 9, 0.8), (1.0, 500, 0.01)],
)
def test_draws_have_the_distribution_of_transformers_warpers(temperature, top_k, top_p):
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    wanted = warpers(None, logits).softmax(dim=-1)[0].double().numpy()
    count = 40_000
    found = draws(Sampling(5, temperature=temperature, top_k=top_k, top_p=top_p), logits, count=count)
    assert np.array_equal(found > 0, wanted > 1e-9) or found[wanted == 0].sum() == 0
    assert np.abs(found - wanted).max() < 5 * np.sqrt(0.25 / count)
    assert found[wanted == 0].sum() == 0


def test_random_numbers_depend_on_what_is_drawn_and_on_nothing_else():
    sampling = Sampling(7, temperature=1.0)

    def numbers(iteration=2, prompts=(4,), samples=(1,), num_tokens=6):
        return sampling.uniforms(
            iteration=iteration, prompts=prompts, samples=samples, num_tokens=num_tokens
        ).tolist()

    (row,) = numbers()
    assert numbers(num_tokens=3) == [row[:3]]
    assert numbers(prompts=(9, 4), samples=(0, 1))[1] == row
    others = [numbers(iteration=3), numbers(prompts=(5,)), numbers(samples=(0,))]
    assert all(not set(row) & set(other[0]) for other in others)
    assert not set(row) & set(
        Sampling(8, temperature=1.0).uniforms(iteration=2, prompts=[4], samples=[1], num_tokens=6)[0].tolist()
    )
    assert all(0 <= value < 1 for value in row)


def test_a_drawn_answer_does_not_depend_on_its_neighbours(models):
    model, sampling = models["llama"], Sampling(3, temperature=1.5, top_p=0.95)
    prompts = random_prompts(5)

    def answers(order):
        batch = composed([prompts[i] for i in order])
        problems = [order[row] for row in batch.rows]
        uniforms = sampling.uniforms(
            iteration=0, prompts=problems, samples=[0] * len(order), num_tokens=BUDGET
        )
        found = decoded(model, replace(batch, uniforms=uniforms), eos_ids=[3, 9], sampling=sampling)
        return dict(zip(problems, found, strict=True))

    everyone = answers(range(13))
    assert len({tuple(answer) for answer in everyone.values()}) == 13
    assert answers(list(range(12, -1, -1))) == everyone
    some = [11, 2, 7, 5, 8]
    assert answers(some) == {i: everyone[i] for i in some}


# Scoring without generating.


@pytest.mark.parametrize("name", EVERY)
def test_log_likelihoods_are_those_of_each_pair_alone(models, name):
    model = models[name]
    prompts = random_prompts(6, num_prompts=9)
    completions = random_prompts(7, num_prompts=9)[::-1]
    batches = compose_completions(prompts, completions, micro_batch_size=4, pad_id=PAD)
    assert [len(batch.rows) for batch in batches] == [4, 4, 1]
    found = {}
    for batch in batches:
        found |= dict(zip(batch.rows, completion_log_likelihoods(model, batch), strict=True))
    assert sorted(found) == list(range(9))
    for row, scores in found.items():
        pair = prompts[row] + completions[row]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([pair])).logits[0].log_softmax(dim=-1)
        start = len(prompts[row])
        wanted = [logits[place - 1, pair[place]].item() for place in range(start, len(pair))]
        assert scores.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_completion_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="pair 1"):
        compose_completions([[1], [2]], [[3], []], micro_batch_size=2, pad_id=PAD)
