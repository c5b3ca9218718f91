"""Members in vLLM's adapter slots answer and score as their weights do, side by side in one engine."""

from functools import partial

import pytest
import torch

from shardes.backends.vllm.adapters import adapter_arguments
from shardes.errors import UserError
from shardes.es.update import Perturbation
from shardes.models.build import skeleton_of
from shardes.rollout.batching import compose_likelihood_batches
from shardes.rollout.build import make_evaluator
from shardes.rollout.engines.vllm.adapter_slots import AdapterSlots
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.weights.master import Weights
from tests.helpers.models import make_config
from tests.helpers.vllm_models import vllm_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

MEMBERS = [Perturbation(0, 3, 0.05), Perturbation(1, 1, -0.05), Perturbation(0, 0, 0.05)]
PAIRS = [([5, 9, 3], [7, 2]), ([4, 8, 2, 6, 11, 3], [9]), ([30, 31], [17, 25, 22, 3])]
LOW_RANK = {
    "es__noise": "low_rank",
    "es__rank": 2,
    "es__trainable": [r".*_proj\.weight"],
    "rollout__max_new_tokens": 12,
}
MODELS = {
    # The same matrices in one, two and three slots of a layer; and a fused one that fills a layer.
    "llama": {"vocab_size": 32, "seed": 4},
    "phi3": {"vocab_size": 32, "seed": 5, "max_position_embeddings": 64},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    for name, changes in MODELS.items():
        vllm_model(path / name, architecture=name, **changes)
    return path


def config_of(root, model, **changes):
    changes = {"run_dir": root / "run", "task__reward_workers": 0} | LOW_RANK | changes
    return make_config(root, model=root / model, **changes)


def parts_of(session):
    evaluator = make_evaluator(session, load_task(session.config.task))[0]
    return evaluator, evaluator.engine


def answers_of(evaluator):
    """Tokens by prompt, of each member in turn, of what is loaded; and if their logits were finite."""
    prompts = evaluator.prepare(evaluator._parts["scorer"].task.train, iteration=0)
    engine = evaluator.engine
    engine.expect(prompts.micro_batches)
    found, finite = {}, []
    for batch in prompts.micro_batches:
        completions = engine.generate(batch, prompts=prompts)
        count = len(completions.tokens) // len(batch.rows)
        for place, row in enumerate(batch.rows):
            found[row] = completions.tokens[place * count : (place + 1) * count]
        finite.append([all(completions.are_finite[member::count]) for member in range(count)])
    by_member = [list(answers) for answers in zip(*(found[row] for row in sorted(found)), strict=True)]
    return by_member, [all(of_batches) for of_batches in zip(*finite, strict=True)]


def scores_of(evaluator, count):
    """Log-likelihoods of all completions, one tensor for each member."""
    batches = compose_likelihood_batches(*zip(*PAIRS, strict=True), micro_batch_size=2, pad_id=0)
    evaluator.engine.begin(0)
    found = [[None] * len(PAIRS) for _ in range(count)]

    def read():
        for batch in batches:
            scores = evaluator.engine.log_likelihood(batch)
            for i, row in enumerate(batch.rows):
                for member in range(count):
                    found[member][row] = scores[i * count + member]
        return [torch.cat(of_member) for of_member in found]

    return read


@pytest.fixture(scope="module")
def wanted(root):
    """Answers and scores by model: of the centre, and of each member by its weights."""
    found = {}
    for model in MODELS:
        with open_session(config_of(root, model, parallel__backend="single")) as session:
            evaluator, engine = parts_of(session)
            prompts = evaluator.prepare(evaluator._parts["scorer"].task.train, iteration=0)
            evaluator.begin(prompts)
            found[model] = []
            for load in (engine.load_centre, *(partial(engine.load, [m]) for m in MEMBERS)):
                load()
                (answers,), _ = answers_of(evaluator)
                read = scores_of(evaluator, 1)
                load()
                found[model].append((answers, read()[0]))
    return found


@pytest.fixture(scope="module", params=MODELS)
def session(request, root, wanted):
    changes = {"parallel__backend": "vllm", "rollout__kv_cache_gib": 0.05, "rollout__members_per_forward": 3}
    with open_session(config_of(root, request.param, **changes)) as session:
        yield session


@pytest.fixture(scope="module")
def evaluator(session):
    return parts_of(session)[0]


def test_members_side_by_side_answer_as_each_by_itself(session, evaluator, wanted):
    of_model = wanted[session.config.model.path.name]
    prompts = evaluator.prepare(evaluator._parts["scorer"].task.train, iteration=0)
    evaluator.begin(prompts)
    for chosen in ([0, 1, 2], [2, 0], [1]):
        evaluator.engine.load([MEMBERS[i] for i in chosen])
        answers, finite = answers_of(evaluator)
        assert answers == [of_model[1 + i][0] for i in chosen], chosen
        assert finite == [True] * len(chosen)
    evaluator.engine.load_centre()
    answers, _ = answers_of(evaluator)
    assert answers == [of_model[0][0]]
    assert len({str(answers) for answers, _ in of_model}) == 4, "all of them differ"


def test_members_side_by_side_score_as_each_by_itself(session, evaluator, wanted):
    of_model = wanted[session.config.model.path.name]
    read = scores_of(evaluator, 3)
    evaluator.engine.load(MEMBERS)
    for found, (_, scores) in zip(read(), of_model[1:], strict=True):
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)
        assert (found - of_model[0][1]).abs().max() > 0.01, "the noise changes them by more than that"


def test_adapters_are_compared_with_weights(session, evaluator):
    engine = evaluator.engine
    engine.check(sigma=0.05)
    places, kept = engine._slots._places, engine._slots._places[3]
    try:
        places.remove(kept)
        kept.outputs.zero_()
        with pytest.raises(UserError, match=r"rollout.members_per_forward: .* other likelihoods"):
            engine.check(sigma=0.05)
    finally:
        places.insert(3, kept)
    engine.check(sigma=0.05)


def test_logits_that_are_not_finite_are_those_of_one_member(session, evaluator):
    engine = evaluator.engine
    engine.begin(0)
    engine.load(MEMBERS)
    engine._slots._places[0].outputs[1, ..., :2] = float("nan")
    _, finite = answers_of(evaluator)
    assert finite == [True, False, True]
    engine.load(MEMBERS)
    assert answers_of(evaluator)[1] == [True, True, True]


def test_what_adapters_do_not_reach_is_refused_by_name(session):
    weights = Weights(session.backend, seed=0, kind=session.weights.kind, trainable=[".*"])
    with pytest.raises(UserError, match=r"model.embed_tokens.weight.*es.trainable"):
        AdapterSlots(session.backend, weights, count=2)


def test_numbers_that_vllm_has_no_slots_for_are_refused(root):
    skeleton = skeleton_of(config_of(root, "llama"))

    def arguments(**changes):
        changes = {"rollout__members_per_forward": 2, "parallel__backend": "vllm"} | changes
        return adapter_arguments(config_of(root, "llama", **changes), skeleton)

    with pytest.raises(UserError, match=r"members_per_forward: got auto; .* set one"):
        arguments(rollout__members_per_forward="auto")
    with pytest.raises(UserError, match=r"es.rank: got 300; .* at most 256"):
        arguments(es__rank=300)
    assert arguments(es__rank=9)["max_lora_rank"] == 16
    assert "lm_head" not in arguments()["lora_target_modules"]
    assert arguments(rollout__members_per_forward=1) == {}
