"""Episodes asked again: the same answers as from the beginning, with nothing but new tokens computed."""

from dataclasses import replace

import pytest
import torch

from shardes.config.schema import RolloutConfig
from shardes.es.update import Perturbation
from shardes.models.build import load_tokenizer
from shardes.rollout.batching import IDLE_COHORT, LEAST_PREFIX
from shardes.rollout.engines.transformers import cohorts
from shardes.rollout.engines.transformers import decoder as decoders
from shardes.rollout.engines.transformers.decoder import Decoder
from shardes.rollout.engines.transformers.engine import TransformersEngine
from shardes.rollout.memory import cache_bytes
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.stop_strings import StopStrings
from shardes.session import open_session
from tests.helpers.decoding import PAD, Remembered, Rows, random_prompts
from tests.helpers.episodes import lives, next_prompts, turn_batch
from tests.helpers.models import QUICKSTART, make_config, tiny_model

TOKENS = 6
EOS = [3, 12, 20, 33]
NUM_TURNS = 4


class Logits:
    """Sees what a model returns for the last token of each row, in every forward."""

    def __init__(self, model):
        self.seen = []
        self._handle = model.register_forward_hook(lambda _, __, out: self.seen.append(out.logits[:, -1]))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self._handle.remove()


def make_decoder(model, *, prefix=(), **arguments):
    decoder = Decoder(eos_ids=EOS, pad_id=PAD, max_new_tokens=TOKENS, **arguments)
    decoder.begin(model, torch.tensor([prefix]) if prefix else None)
    return decoder


def anew(model, batch, **arguments):
    """What is answered where nothing is kept, and all logits on the way."""
    decoder = make_decoder(model, **arguments)
    with Logits(model) as logits:
        answers = decoder.decode(model, turn_batch(prompts_of(batch), cohort=IDLE_COHORT))
    assert decoder.num_prefilled_tokens == 0, "nobody reads them"
    return answers.tokens, logits


def prompts_of(batch):
    rows = zip(batch.rows, batch.input_ids.tolist(), batch.lengths, strict=True)
    return {row: ids[len(ids) - length :] for row, ids, length in rows}


def rewritten(prompts):
    """A template has dropped a token of what two episodes began with, and all that one has said."""
    changed = {
        episode: prompt[:2] + prompt[3:] if episode in (1, 4) else prompt
        for episode, prompt in prompts.items()
    }
    return changed | {0: prompts[0][:4]} if 0 in prompts else changed


def common(one, other):
    places = range(min(len(one), len(other)))
    return next((place for place in places if one[place] != other[place]), len(places))


@pytest.mark.parametrize("makes_graphs", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "gemma2", "gemma3", "gpt2"])
def test_a_turn_computes_its_new_tokens_and_answers_as_from_the_beginning(models, name, makes_graphs):
    model = models[name]
    if makes_graphs and name.startswith("gemma"):
        pytest.skip("never captured")
    decoder = make_decoder(model, make_graph=Remembered if makes_graphs else None)
    decoder.max_rows = 11
    starts = random_prompts(5, num_prompts=19)
    playing = [dict(enumerate(starts[:11])), dict(enumerate(starts[11:], start=11))]
    held, widths, lengths, num_compared = {}, [], set(), 0
    Remembered.made = 0
    for turn in range(NUM_TURNS):
        for cohort, prompts in enumerate(playing):
            if turn == 2:
                prompts = rewritten(prompts)
            batch = turn_batch(prompts, cohort=cohort)
            before, counts = decoder.num_prefilled_tokens, []
            for episode, prompt in prompts.items():
                known = min(common(held.get(episode, []), prompt), len(prompt) - 1)
                counts.append(len(prompt) - known)
                if turn in (1, 3):
                    assert known == len(held[episode]), "all but the last token of the answer"
            with Rows(model) as shapes, Logits(model) as logits:
                answers = decoder.decode(model, batch).tokens
            assert decoder.num_prefilled_tokens - before == sum(counts)
            assert shapes[0] == (len(prompts), max(counts))
            widths.append(max(counts) < batch.input_ids.shape[1])
            wanted, wanted_logits = anew(model, batch)
            assert answers == wanted
            if not makes_graphs:
                for one, other in zip(logits, wanted_logits, strict=True):
                    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
                    num_compared += len(one)
            held |= {
                episode: prompt + answer[:-1]
                for (episode, prompt), answer in zip(prompts.items(), answers, strict=True)
            }
            lengths |= set(map(len, answers))
            playing[cohort] = next_prompts(prompts, answers, turn=turn)
    assert len(playing[0]) < 11 and all(playing), "episodes were meant to end, but not all"
    assert widths[:2] == [False, False]
    assert all(widths[2:4]) and all(widths[6:])
    assert len(lengths) > 2, "answers were meant to end at different places"
    assert num_compared > 100 or makes_graphs
    if makes_graphs:
        assert decoder._graphs.is_usable
        # 11 and 6 rows, once for each of two sizes that the storage grows to.
        assert Remembered.made <= 4


@pytest.mark.parametrize("size", [None, 8])
def test_what_a_rank_has_computed_before_changes_no_shape_of_a_captured_step(models, size):
    found = []
    for first in (2, 13):
        decoder = make_decoder(models["llama"], make_graph=Remembered)
        decoder.max_rows = size
        decoder.decode(models["llama"], turn_batch(dict(enumerate(random_prompts(2)[:first])), cohort=0))
        with Rows(models["llama"]) as shapes:
            decoder.decode(models["llama"], turn_batch(dict(enumerate(random_prompts(4)[:2])), cohort=1))
        assert decoder._graphs.is_usable
        found.append({rows for rows, width in shapes[1:] if width == 1})
    assert found == [{2}, {2}] if size is None else [{2, 4}, {2, 4}]


def test_stop_texts_and_ranks_in_step_keep_the_same(models):
    model, tokenizer = models["mistral"], load_tokenizer(QUICKSTART / "model", trust_remote_code=False)
    prompts = dict(enumerate(random_prompts(3)))
    free, _ = anew(model, turn_batch(prompts, cohort=0))
    stop = StopStrings([tokenizer.decode(free[0])[2:4], tokenizer.decode(free[2])[1]], tokenizer)
    counts, all_answers = [], []
    for any_rank in (None, lambda flag: True):
        decoder = make_decoder(model, stop=stop)
        playing = prompts
        for turn in range(3):
            batch = turn_batch(playing, cohort=0)
            with Rows(model) as shapes:
                answers = decoder.decode(model, batch, any_rank=any_rank, num_prefills=3).tokens
            counts.append(shapes[0])
            assert sum(width > 1 for _, width in shapes[1:]) == 0, "one forward before the first token"
            assert answers == anew(model, batch, stop=stop)[0]
            all_answers.append(answers)
            playing = next_prompts(playing, answers, turn=turn)
    # How a context is cut into forwards decides the last bits, so it must not depend on who waits for whom.
    assert counts[:3] == counts[3:]
    assert all_answers[:3] == all_answers[3:]
    assert min(map(len, all_answers[0])) < TOKENS


def test_what_all_prompts_begin_with_is_computed_once_and_only_taken_where_it_is(models):
    model, starts = models["llama"], random_prompts(8, num_prompts=5, prefix_length=LEAST_PREFIX)
    prefix = starts[0][:LEAST_PREFIX]
    decoder = make_decoder(model, prefix=prefix)
    prompts = dict(enumerate(starts))
    answers = decoder.decode(model, turn_batch(prompts, cohort=0)).tokens
    assert answers == anew(model, turn_batch(prompts, cohort=0))[0]
    assert decoder.num_prefilled_tokens == sum(map(len, starts)) - 4 * LEAST_PREFIX
    decoder.kept.forget(0)
    for changed in ([1, *starts[0]], starts[0][:3]):
        prompts[3] = changed
        batch = turn_batch(prompts, cohort=0)
        assert decoder.decode(model, batch).tokens == anew(model, batch)[0]
        decoder.kept.forget()


def test_an_idle_batch_makes_as_many_forwards_and_leaves_what_is_kept(models):
    model = models["qwen2"]
    decoder, prompts = make_decoder(model), dict(enumerate(random_prompts(2)))
    answers = decoder.decode(model, turn_batch(prompts, cohort=0)).tokens
    with Rows(model) as shapes:
        idle = turn_batch(dict(enumerate(random_prompts(6))), cohort=IDLE_COHORT)
        decoder.decode(model, idle, any_rank=lambda flag: True)
    assert [width > 1 for _, width in shapes] == [True] + [False] * (TOKENS - 1)
    prompts = next_prompts(prompts, answers, turn=0)
    before = decoder.num_prefilled_tokens
    batch = turn_batch(prompts, cohort=0)
    assert decoder.decode(model, batch).tokens == anew(model, batch)[0]
    assert decoder.num_prefilled_tokens - before < sum(batch.lengths) / 2


def test_an_episode_may_go_on_from_any_of_several_rows(models):
    model, starts = models["qwen2"], random_prompts(2, num_prompts=5)
    batch = replace(turn_batch(dict(enumerate(starts)), cohort=0), rows=(0, 1, 0, 1, 0))
    decoder = make_decoder(model)
    answers = decoder.decode(model, batch).tokens
    assert answers == anew(model, turn_batch(dict(enumerate(starts)), cohort=0))[0]
    # Two go on from one row, in other places; one begins as another episode did, which is not looked at.
    sources = [4, 2, 3, 4, 0]
    later = [starts[row] + answers[row] + [5, row + 2] for row in sources]
    batch = replace(turn_batch(dict(enumerate(later)), cohort=0), rows=(0, 0, 1, 0, 1))
    before = decoder.num_prefilled_tokens
    found = decoder.decode(model, batch).tokens
    assert found == anew(model, turn_batch(dict(enumerate(later)), cohort=0))[0]
    other = max(common(later[4], starts[row] + answers[row]) for row in (1, 3))
    assert decoder.num_prefilled_tokens - before == 4 * 3 + len(later[4]) - other


def test_rows_that_are_not_finite_are_not_kept(models):
    model = models["llama"]
    decoder, prompts = make_decoder(model), dict(enumerate(random_prompts(4, num_prompts=6)))

    def spoil(module, args, states):
        states[2] = float("nan")  # a row of the first forward
        return states

    handle = model.model.layers[0].register_forward_hook(spoil)
    completions = decoder.decode(model, turn_batch(prompts, cohort=0))
    handle.remove()
    assert not completions.is_finite
    finite = [row for row, is_finite in enumerate(completions.are_finite) if is_finite]
    assert finite
    prompts = next_prompts({row: prompts[row] for row in range(6)}, completions.tokens, turn=0)
    batch = turn_batch(prompts, cohort=0)
    completions = decoder.decode(model, batch)
    assert completions.is_finite
    assert completions.tokens == anew(model, batch)[0]


def test_a_cache_of_more_than_keys_and_values_is_computed_anew(models, monkeypatch):
    monkeypatch.setattr(decoders, "make_slab", lambda config: None)
    model, prompts = models["llama"], dict(enumerate(random_prompts(2)))
    decoder = make_decoder(model)
    for turn in range(3):
        batch, before = turn_batch(prompts, cohort=0), decoder.num_prefilled_tokens
        with Rows(model) as shapes:
            answers = decoder.decode(model, batch, any_rank=lambda flag: True, num_prefills=2).tokens
        assert [width > 1 for _, width in shapes] == [True] + [False] * (TOKENS - 1)
        assert decoder.num_prefilled_tokens - before == sum(batch.lengths)
        assert answers == anew(model, batch)[0]
        prompts = next_prompts(prompts, answers, turn=turn)


# The engine.


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("run")
    path = tiny_model(tmp_path / "model", tied=True, seed=3)
    with open_session(make_config(tmp_path, model=path, run_dir=tmp_path / "run")) as session:
        yield session


NONE = PromptBatch([], [], None, 1, [])


@pytest.fixture
def engine(session):
    engine = TransformersEngine(
        backend=session.backend,
        weights=session.weights,
        mesh=session.mesh,
        tokenizer=load_tokenizer(session.config.model.path, trust_remote_code=False),
        settings=RolloutConfig(max_new_tokens=TOKENS, gather="member", micro_batch_size=4),
        seed=0,
        timer=session.timer,
    )
    engine.begin(0)
    return engine


def test_other_weights_never_see_what_earlier_ones_have_computed(engine):
    prompts = dict(enumerate(random_prompts(1)))
    members = [Perturbation(0, 0, 0.3), Perturbation(0, 1, 0.3)]
    engine.load(members[:1])
    answers = engine.generate(turn_batch(prompts, cohort=0), prompts=NONE).tokens
    later = turn_batch(next_prompts(prompts, answers, turn=0), cohort=0)
    found = []
    for load in (lambda: engine.load(members[1:]), engine.load_centre):
        load()
        before = engine.num_prefilled_tokens
        found.append(engine.generate(later, prompts=NONE).tokens)
        assert engine.num_prefilled_tokens - before == sum(later.lengths)
        idle = turn_batch(prompts_of(later), cohort=IDLE_COHORT)
        assert engine.generate(idle, prompts=NONE).tokens == found[-1]
    assert found[0] != found[1]


def test_what_is_kept_counts_and_what_finds_no_memory_is_computed_anew(engine, session, monkeypatch, caplog):
    prompts = dict(enumerate(random_prompts(1)))
    batch = turn_batch(prompts, cohort=0)
    rows, width = batch.input_ids.shape
    plain = engine.bytes_for(replace(batch, cohort=None))
    engine.expect_cohorts(3, size=rows, max_context=60)
    of_one = cache_bytes(
        session.backend.sharded_model.config, rows=rows, length=width + TOKENS, dtype=torch.float32
    )
    beyond = engine.bytes_for(batch) - plain - 3 * of_one
    assert beyond * (width + TOKENS) == TOKENS * of_one, "the cache itself has room for one more answer"
    assert engine.fits(batch, prompts=NONE)
    engine.load_centre()
    for cohort in range(1, 6):
        engine.generate(turn_batch(prompts, cohort=cohort), prompts=NONE)
    assert sorted(engine._decoder.kept._cohorts) == [3, 4, 5]
    engine.load_centre()
    answers = engine.generate(batch, prompts=NONE).tokens
    (kept,) = engine._decoder.kept._cohorts.values()
    held = sum(keys.nbytes + values.nbytes for keys, values in kept.layers)
    assert 0.5 * of_one < held <= of_one
    prompts = next_prompts(prompts, answers, turn=0)
    batch = turn_batch(prompts, cohort=0)
    wanted = engine.generate(batch, prompts=NONE).tokens
    # A decoding that runs out of memory is done again without what is kept.
    decode, calls = engine._decoder.decode, []

    def runs_out(*arguments, **keywords):
        calls.append(bool(engine._decoder.kept))
        if calls[-1]:
            raise torch.OutOfMemoryError("out of memory")
        return decode(*arguments, **keywords)

    monkeypatch.setattr(engine._decoder, "decode", runs_out)
    assert engine.generate(batch, prompts=NONE).tokens == wanted
    assert calls == [True, False]
    assert engine.generate(batch, prompts=NONE).tokens == wanted
    assert calls == [True, False, False]
    assert caplog.text.count("too little memory to keep the keys and values") == 1
    # With nothing kept, there is nothing to give up.
    monkeypatch.setattr(engine._decoder, "decode", lambda *_, **__: runs_out_always())
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(batch, prompts=NONE)


def runs_out_always():
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("way", ["by the formula", "by trying", "on another rank"])
def test_a_turn_without_the_memory_to_be_kept_is_answered_all_the_same(models, monkeypatch, caplog, way):
    model, prompts = models["qwen2"], dict(enumerate(random_prompts(1)))
    decoder, is_split = make_decoder(model), way == "on another rank"
    if way == "by the formula":
        monkeypatch.setattr(cohorts, "free_bytes", lambda device: 10_000)
    if way == "by trying":
        monkeypatch.setattr(cohorts.SlabCache, "copied", lambda *_, **__: runs_out_always())
    for turn in range(2):
        batch, before = turn_batch(prompts, cohort=0), decoder.num_prefilled_tokens
        any_rank = (lambda flag: True) if is_split else None
        answers = decoder.decode(model, batch, any_rank=any_rank, is_split=is_split).tokens
        assert decoder.num_prefilled_tokens - before == sum(batch.lengths)
        assert not decoder.kept
        assert answers == anew(model, batch)[0]
        prompts = next_prompts(prompts, answers, turn=turn)
    assert caplog.text.count("too little memory to keep the keys and values") == 1


def test_episodes_of_these_tests_end_at_different_turns():
    assert {sum(lives(episode, turn) for turn in range(NUM_TURNS)) for episode in range(11)} == {1, 2, 4}
