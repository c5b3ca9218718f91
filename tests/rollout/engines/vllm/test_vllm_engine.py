"""vLLM answers and scores as the plain model does, with members written into its weights."""

from dataclasses import replace

import pytest
import torch

from shardes.errors import UserError
from shardes.es.update import Perturbation
from shardes.rollout.batching import compose_likelihood_batches
from shardes.rollout.build import make_evaluator
from shardes.rollout.prompts import PromptBatch
from shardes.session import open_session
from shardes.tasks.loading import load_task
from tests.helpers.models import make_config
from tests.helpers.vllm_models import vllm_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

MEMBERS = [Perturbation(0, 3, 0.05), Perturbation(1, 1, -0.05)]
PAIRS = [([5, 9, 3], [7, 2]), ([4, 8, 2, 6, 11, 3], [9]), ([30, 31], [17, 25, 22, 3])]
SETTINGS = {"max_new_tokens": 12, "micro_batch_size": 4}


def evaluator_of(session, **changes):
    """An evaluator of a session by other settings."""
    config = session.config.model_copy(
        update={"rollout": session.config.rollout.model_copy(update=SETTINGS | changes)}
    )
    return make_evaluator(replace(session, config=config), load_task(config.task))[0]


def answers_of(evaluator, *, load, batches=None):
    """Tokens of all answers by prompt and sample, and whether all logits were finite."""
    engine, scorer = evaluator.engine, evaluator._parts["scorer"]
    prompts = evaluator.prepare(scorer.task.train, iteration=0)
    evaluator.begin(prompts)
    load(engine)
    found, is_finite = {}, True
    for batch in prompts.micro_batches if batches is None else batches(prompts.micro_batches):
        completions = engine.generate(batch, prompts=prompts)
        found |= dict(zip(batch.rows, completions.tokens, strict=True))
        is_finite &= completions.is_finite
    return found, is_finite


def scores_of(evaluator, *, load):
    engine = evaluator.engine
    batches = compose_likelihood_batches(
        [prompt for prompt, _ in PAIRS],
        [completion for _, completion in PAIRS],
        micro_batch_size=2,
        pad_id=0,
    )
    evaluator.begin(PromptBatch([], [], evaluator._parts["scorer"], 1, batches))
    load(engine)
    found = {}
    for batch in batches:
        found |= dict(zip(batch.rows, engine.log_likelihood(batch), strict=True))
    return torch.cat([found[i] for i in range(len(PAIRS))])


def loads():
    yield lambda engine: engine.load_centre()
    for member in MEMBERS:
        yield lambda engine, member=member: engine.load([member])


KINDS = {
    "greedy": {},
    "stop": {"stop": ["7", "12"]},
    "stop later": {"stop": ["77", "</answer>"], "micro_batch_size": 32},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm")
    # Words that the tokenizer knows, so that stop texts are met; two tokens end an answer.
    vllm_model(path / "small", architecture="qwen2", vocab_size=32, eos_token_id=[1, 20], seed=4)
    vllm_model(path / "large", architecture="llama", max_position_embeddings=14, seed=3)
    return path


def config_of(root, model, **changes):
    changes = {"run_dir": root / "run", "task__reward_workers": 0, "parallel__backend": "single"} | changes
    return make_config(root, model=root / model, **changes)


@pytest.fixture(scope="module")
def wanted(root):
    """Of the plain models, before vLLM is imported."""
    found = {}
    for model in ("small", "large"):
        with open_session(config_of(root, model)) as session:
            for kind, changes in KINDS.items():
                evaluator = evaluator_of(session, **changes)
                found[model, kind] = [answers_of(evaluator, load=load) for load in loads()]
            found[model, "scores"] = [scores_of(evaluator_of(session), load=load) for load in loads()]
    return found


@pytest.fixture(scope="module", params=["small", "large"])
def session(request, root, wanted):
    config = config_of(root, request.param, parallel__backend="vllm", rollout__kv_cache_gib=0.05)
    with open_session(config) as session:
        yield session


@pytest.fixture
def model(session):
    return session.config.model.path.name


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_the_plain_models(session, model, wanted, kind):
    evaluator = evaluator_of(session, **KINDS[kind])
    found = [answers_of(evaluator, load=load) for load in loads()]
    assert found == wanted[model, kind]
    assert found[0] != found[1] != found[2]
    lengths = {len(tokens) for answers, _ in found for tokens in answers.values()}
    assert len(lengths) > 2, "answers end in different places"
    if model == "small" and kind != "greedy":
        assert found != wanted[model, "greedy"], "the texts were met"


def test_all_requests_are_in_flight_at_once_and_answers_do_not_depend_on_it(session, model, wanted):
    evaluator = evaluator_of(session)

    def load(engine):
        engine.load([MEMBERS[0]])

    def expected(batches):
        evaluator.engine.expect(batches)
        assert evaluator.engine._requests.num_in_flight == sum(len(batch.rows) for batch in batches)
        return batches

    assert answers_of(evaluator, load=load, batches=expected) == wanted[model, "greedy"][1]
    assert (
        answers_of(evaluator, load=load, batches=lambda batches: batches[::-1])
        == (wanted[model, "greedy"][1])
    )


def test_scores_are_the_plain_models(session, model, wanted):
    evaluator = evaluator_of(session)
    for load, scores in zip(loads(), wanted[model, "scores"], strict=True):
        found = scores_of(evaluator, load=load)
        assert (found.dtype, found.shape) == (torch.float32, scores.shape)
        torch.testing.assert_close(found, scores, rtol=1e-5, atol=1e-5)


def test_a_members_cache_is_not_read_by_the_next(session, model, wanted):
    """The prompts begin alike for longer than a block; and requests that nobody waits for are dropped."""
    evaluator = evaluator_of(session)
    prefix = [3 + i % 20 for i in range(300)]
    requests = evaluator.engine._requests
    parameters = {"temperature": 0.0, "max_tokens": 4}
    if model != "small":
        pytest.skip("it has 14 positions")

    def tokens_after(load):
        load(evaluator.engine)
        found = [requests.add([*prefix, last], parameters) for last in (4, 9)]
        requests.finish(found)
        return [request.tokens for request in found]

    by_load = [tokens_after(load) for load in loads()]
    left = requests.add(prefix, parameters)
    again = [tokens_after(load) for load in reversed(list(loads()))]
    assert again[::-1] == by_load
    assert by_load[0] != by_load[1]
    assert (left.tokens, requests.num_in_flight) == ([], 0)


def test_drawn_answers_depend_on_the_prompt_and_the_sample_alone(session, model):
    changes = {"temperature": 0.8, "samples_per_prompt": 3, "top_p": 0.95, "top_k": 20}
    evaluator = evaluator_of(session, **changes)

    def load(engine):
        engine.load_centre()

    first, _ = answers_of(evaluator, load=load)
    assert len({tuple(tokens) for tokens in first.values()}) > len(first) // 2
    backwards, _ = answers_of(evaluator, load=load, batches=lambda batches: batches[::-1])
    assert backwards == first
    alone, _ = answers_of(evaluator_of(session, **changes, micro_batch_size=1), load=load)
    assert alone == first
    # All members have the same random numbers, so that a member that hardly differs says nearly the same.
    near, _ = answers_of(evaluator, load=lambda engine: engine.load([Perturbation(0, 0, 1e-6)]))
    assert sum(near[row] == first[row] for row in first) >= len(first) - 2
    prompts = evaluator.prepare(evaluator._parts["scorer"].task.train, iteration=1)
    evaluator.engine.load_centre()
    batch = prompts.micro_batches[0]
    later = evaluator.engine.generate(batch, prompts=prompts).tokens
    assert later != [first[row] for row in batch.rows], "another iteration draws other numbers"


def test_weights_that_are_not_finite_are_noticed_and_forgotten(session, model, wanted):
    evaluator = evaluator_of(session)
    shard = next(shard for shard in session.backend.shards if shard.name == "model.norm.weight")

    def load(engine):
        engine.load_centre()
        shard.local.fill_(float("nan"))

    assert answers_of(evaluator, load=load)[1] is False
    assert not scores_of(evaluator, load=load).isfinite().any()
    assert answers_of(evaluator, load=next(loads())) == wanted[model, "greedy"][0]


def test_prompts_that_the_engine_cannot_take_are_refused(session, model):
    requests = evaluator_of(session).engine._requests
    limit, vocabulary = (512, 32) if model == "small" else (14, 1003)
    with pytest.raises(UserError, match=f"a prompt of {limit} tokens .* but the engine has {limit}"):
        requests.add([2] * limit, {"temperature": 0.0, "max_tokens": 1})
    with pytest.raises(UserError, match=f"has the token {vocabulary}, but the model has {vocabulary}"):
        requests.add([2, vocabulary], {"temperature": 0.0, "max_tokens": 1})


def test_several_members_in_a_forward_are_refused(session):
    with pytest.raises(UserError, match=r"rollout.members_per_forward: got 4; .* set it to 1"):
        evaluator_of(session, members_per_forward=4)


def test_the_threads_and_the_version_are_what_they_were(session):
    assert torch.get_num_threads() == 1
    facts = evaluator_of(session).engine.facts
    assert (facts["dtype"], facts["tensor_parallel_size"], facts["device"]) == ("float32", 1, "cpu")
    assert tuple(map(int, facts["version"].split(".")[:2])) >= (0, 32)
