"""Tasks judged by likelihood: the numbers against a model called by hand, and training on them."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.es.update import Perturbation
from shardes.models.build import load_tokenizer
from shardes.rollout.aggregate import PartialResult
from shardes.rollout.choices import ChoiceSet, make_choice_set
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.likelihood import LogLikelihoodAccumulator
from shardes.session import open_session
from shardes.tasks.base import ChatTemplate, Choices, Task
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from tests.helpers.evaluators import evaluate_member, make_evaluator_of
from tests.helpers.models import make_config, tiny_model

# Prompts and completions of different lengths and numbers; the tokenizer has one token a character.
ROWS = [
    {
        "prompt": f"{i}" + "+7" * ((5 * i) % 4) + "=",
        "choices": ["3", "14+2", "9*9"][: 2 + i % 2],
        "gold": i % 2,
    }
    for i in range(9)
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "m", tied=True)


@pytest.fixture
def session(model_dir, tmp_path):
    with open_session(make_config(tmp_path, model=model_dir, run_dir=tmp_path / "run")) as session:
        yield session


def evaluated(
    session, metric, *, rows=ROWS, mode="member", group=None, choices=None, prompt=None, member=None
):
    choices = choices or (lambda row: Choices(row["choices"], row["gold"]))
    prompt = prompt or (lambda row: row["prompt"])
    task = Task("t", rows, [], prompt, choices=choices, metric=metric)
    evaluator = make_evaluator_of(session, task, gather=mode, max_new_tokens=1, micro_batch_size=4)
    prompts, group = evaluator.prepare(rows, iteration=0), group or session.mesh.world
    if member is not None:
        return evaluate_member(evaluator, prompts, member, group=group)
    return evaluator.evaluate_centre(prompts, group=group)


def log_likelihoods(model_dir, prompt, completion):
    """Of the tokens of a completion, each looked up in the logits of a forward of its own."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = load_tokenizer(model_dir, trust_remote_code=False)
    start = tokenizer(prompt)["input_ids"]
    ids = start + tokenizer(completion)["input_ids"]
    values = []
    for place in range(len(start), len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:place]])).logits[0, -1]
        values.append(float(logits.log_softmax(dim=-1)[ids[place]]))
    return values


@pytest.mark.parametrize("mode", ["member", "layer"])
def test_the_three_numbers_are_those_of_a_model_called_by_hand(session, model_dir, mode):
    found = {
        metric: evaluated(session, metric, mode=mode)
        for metric in ("accuracy", "cross_entropy", "log_likelihood")
    }
    components = found["accuracy"].components
    for row, problem in enumerate(ROWS):
        parts = [log_likelihoods(model_dir, problem["prompt"], text) for text in problem["choices"]]
        sums, gold = [math.fsum(part) for part in parts], problem["gold"]
        loss = math.log(math.fsum(math.exp(value) for value in sums)) - sums[gold]
        assert components["accuracy"][row] == float(max(sums) == sums[gold])
        assert components["cross_entropy"][row] == pytest.approx(loss, rel=1e-5)
        assert components["log_likelihood"][row] == pytest.approx(sums[gold] / len(parts[gold]), rel=1e-5)
    assert 0 < sum(components["accuracy"]) < len(ROWS)
    for metric, sign in (("accuracy", 1), ("cross_entropy", -1), ("log_likelihood", 1)):
        assert found[metric].components == components
        assert found[metric].rewards == [sign * value for value in components[metric]]
        assert found[metric].num_failures == 0
        assert found[metric].num_tokens == sum(len(text) for row in ROWS for text in row["choices"])
        assert found[metric].is_finite


def test_samples_are_the_likeliest_completions(session, model_dir):
    samples = evaluated(session, "accuracy").samples
    assert list(samples) == [0, 1, 2, 3]
    for row, sample in samples.items():
        texts = ROWS[row]["choices"]
        sums = [math.fsum(log_likelihoods(model_dir, ROWS[row]["prompt"], text)) for text in texts]
        assert sample.prompt == ROWS[row]["prompt"]
        assert sample.completion == texts[sums.index(max(sums))]
        assert sample.reward == float(sums.index(max(sums)) == ROWS[row]["gold"])


class Part(Group):
    """One of several ranks, which gets what the ranks before it had."""

    def gather_json(self, value):
        object.__setattr__(self, "store", [*(self.store or []), json.loads(json.dumps(value))])
        return self.store


def test_ranks_that_share_the_pairs_find_the_numbers_of_one(session):
    whole = evaluated(session, "cross_entropy")
    for world_size in (2, 3, 7):
        parts = None
        for rank in range(world_size):
            group = Part(rank, world_size, torch.device("cpu"), store=parts)
            last = evaluated(session, "cross_entropy", group=group)
            parts = group.store
        assert last.rewards == whole.rewards
        assert last.components == whole.components
        assert last.num_tokens == whole.num_tokens


def test_a_tie_is_no_right_answer():
    choices = [Choices(["a", "b", "c"], gold) for gold in (0, 1, 0, 2)]
    pairs = [([1], [2] * (1 + i % 3)) for i in range(12)]
    problems = ChoiceSet(["p"] * 4, choices, pairs, [0, 3, 6, 9, 12])
    accumulator = LogLikelihoodAccumulator(problems, metric="accuracy", num_samples=2)
    totals = [-1.0, -1.0, -2.0, -2.0, -1.0, -2.0, -1.0, -1.5, -3.0, -1.0, -2.0, -3.0]
    parts = [PartialResult(list(range(first, 12, 2)), totals[first::2], num_tokens=12) for first in (1, 0)]
    found = accumulator.merge(parts)
    assert found.rewards == [0.0, 1.0, 1.0, 0.0]
    assert found.components["log_likelihood"] == [-1.0, -0.5, -1.0, -1.0]
    loss = math.log(2 * math.exp(-1) + math.exp(-2)) + 1
    assert found.components["cross_entropy"][0] == pytest.approx(loss, rel=1e-15)
    assert [sample.completion for sample in found.samples.values()] == ["a", "b"]


def test_a_text_alone_is_judged_by_its_mean_log_likelihood(session, model_dir):
    rows = [{"text": "3+4*2=11"}, {"text": "12"}]
    texts = {"prompt": lambda row: "", "choices": lambda row: Choices([row["text"]], 0)}
    found = evaluated(session, "log_likelihood", rows=rows, **texts)
    # The tokenizer has no token that begins a text, so the first one is given and not scored.
    wanted = [log_likelihoods(model_dir, row["text"][0], row["text"][1:]) for row in rows]
    assert found.rewards == pytest.approx([math.fsum(part) / len(part) for part in wanted], rel=1e-5)
    assert found.num_tokens == 8
    assert found.components["accuracy"] == [1.0, 1.0]


def test_pairs_are_tokenised_and_checked(model_dir):
    tokenizer = load_tokenizer(model_dir, trust_remote_code=False)

    def pairs(prompt, *completions, max_positions=None):
        encoder = PromptEncoder(tokenizer, max_positions=max_positions)
        found = make_choice_set([prompt], [Choices(list(completions), 0)], encoder, chat=ChatTemplate())
        return list(found.pairs)

    ids = {character: tokenizer(character)["input_ids"] for character in "37+"}
    assert pairs("3+", "7", "3") == [(ids["3"] + ids["+"], ids["7"]), (ids["3"] + ids["+"], ids["3"])]
    tokenizer.bos_token = "<eos>" if tokenizer.eos_token is None else tokenizer.eos_token
    assert pairs("", "7") == [([tokenizer.bos_token_id], ids["7"])]
    with pytest.raises(UserError, match=r"the completion '' of the prompt '3\+' has no tokens"):
        pairs("3+", "7", "")
    assert len(pairs("3+", "7", max_positions=3)) == 1
    with pytest.raises(UserError, match=r"have 4 tokens, but the model has 3 positions"):
        pairs("3+", "7+", max_positions=3)


def test_numbers_that_are_not_finite_are_said_to_be(session):
    found = evaluated(session, "cross_entropy", member=Perturbation(0, 0, float("inf")))
    assert not found.is_finite
    assert found.rewards == [None] * len(ROWS)


def test_training_raises_the_metric(tmp_path, model_dir):
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {"name": "multiple_choice", "data": str(data), "heldout_data": str(data)}
    config = make_config(
        tmp_path,
        model=model_dir,
        run_dir=tmp_path / "run",
        task__reward=None,
        task__columns={"label": "gold"},
        task__batch_size=None,
        es__iterations=6,
        es__population=8,
        es__sigma=0.02,
        es__alpha=0.04,
        eval__every=3,
        rollout__micro_batch_size=32,
        **{f"task__{key}": value for key, value in task.items()},
    )
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["heldout_reward"] for line in lines if "heldout_reward" in line]
    assert len(rewards) == 3
    assert rewards[-1] > rewards[0] + 0.1
    for line in lines:
        if "heldout_reward" in line:
            assert line["heldout_components"]["cross_entropy"] == -line["heldout_reward"]
    assert lines[0]["components"].keys() == {"accuracy", "cross_entropy", "log_likelihood"}
    assert lines[0]["components"]["cross_entropy"] == pytest.approx(-lines[0]["reward_mean"])
