"""Micro-batches, and what an evaluation reports."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from shardes.distributed.group import Group, Mesh
from shardes.es.update import Perturbation
from shardes.models.build import load_tokenizer
from shardes.rollout.batching import compose
from shardes.rollout.build import make_evaluator
from shardes.session import open_session
from shardes.tasks.base import Component, Task
from shardes.tasks.loading import load_task
from tests.helpers.evaluators import evaluate_member, make_evaluator_of, start_member
from tests.helpers.models import make_config, tiny_model
from tests.helpers.rewards import spread
from tests.helpers.tokenizers import CHAT, VOCABULARY, sentence_pieces

PAD = 0

token_lists = st.lists(st.lists(st.integers(1, 36), min_size=1, max_size=9), max_size=20)


@settings(deadline=None)
@given(prompts=token_lists, size=st.integers(1, 7))
def test_micro_batches_hold_every_prompt_once_sorted_by_length_and_padded_on_the_left(prompts, size):
    batches = compose(prompts, micro_batch_size=size, pad_id=PAD, max_new_tokens=6)
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(len(prompts)))
    assert rows == sorted(rows, key=lambda row: (len(prompts[row]), row))
    assert all(len(batch.rows) == size for batch in batches[:-1])
    for batch in batches:
        width = max(len(prompts[row]) for row in batch.rows)
        padded = [[PAD] * (width - len(prompts[row])) + prompts[row] for row in batch.rows]
        masks = [[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in batch.rows]
        assert batch.input_ids.tolist() == padded
        assert batch.attention_mask.tolist() == masks
        assert list(batch.lengths) == [len(prompts[row]) for row in batch.rows]
        assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64


def test_micro_batches_depend_on_nothing_else(monkeypatch):
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    first = compose(prompts, micro_batch_size=2, pad_id=PAD, max_new_tokens=6)
    torch.manual_seed(5)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    for one, other in zip(
        first, compose(prompts, micro_batch_size=2, pad_id=PAD, max_new_tokens=6), strict=True
    ):
        assert one.rows == other.rows
        assert torch.equal(one.input_ids, other.input_ids)
    assert [batch.rows for batch in first] == [(1, 3), (0, 2)]


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen2": tiny_model(root / "qwen2", tied=True, seed=0),
        "llama": tiny_model(root / "llama", tied=False, architecture="llama", seed=1),
    }


ROWS = [{"prompt": f"{i}" + "+7" * ((5 * i) % 4) + "=", "n": i} for i in range(11)]


@pytest.fixture
def session(model_dirs, tmp_path):
    with open_session(make_config(tmp_path, model=model_dirs["qwen2"], run_dir=tmp_path / "run")) as session:
        yield session


def length(completions):
    return [float(len(text)) for text in completions]


LENGTH = Component("length", length, weight=0.0)


def evaluator_of(session, reward, *, mode="member", mesh=None, changes=None, others=()):
    rewards = (Component("own", reward), *others)
    task = Task("test", ROWS, [], lambda row: row["prompt"], rewards)
    settings = {"max_new_tokens": 6, "micro_batch_size": 4, "gather": mode} | (changes or {})
    return make_evaluator_of(session, task, mesh=mesh, **settings)


def evaluated(session, reward, *, group=None, **arguments):
    evaluator = evaluator_of(session, reward, **arguments)
    return evaluator.evaluate_centre(evaluator.prepare(ROWS, iteration=0), group=group or session.mesh.world)


def answers_alone(model_dir):
    """Every prompt answered by transformers on its own, without padding."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = load_tokenizer(model_dir, trust_remote_code=False)
    answers = []
    for row in ROWS:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        output = model.generate(ids, do_sample=False, max_new_tokens=6)
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers, [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


@pytest.mark.parametrize("mode", ["member", "layer"])
def test_every_row_earns_what_its_own_answer_is_worth(session, model_dirs, mode):
    answers, texts = answers_alone(model_dirs["qwen2"])
    seen = {}

    def reward(prompts, completions, n):
        seen.update(zip(n, zip(prompts, completions, strict=True), strict=True))
        return [value + i for value, i in zip(spread(prompts, completions), n, strict=True)]

    evaluation = evaluated(session, reward, mode=mode, others=[LENGTH])
    assert seen == {row["n"]: (row["prompt"], text) for row, text in zip(ROWS, texts, strict=True)}
    assert evaluation.rewards == [value + i for i, value in enumerate(spread(None, texts))]
    assert len(set(texts)) > 3
    assert evaluation.components == {"own": evaluation.rewards, "length": [float(len(t)) for t in texts]}
    assert evaluation.num_tokens == sum(map(len, answers))
    assert evaluation.num_failures == 0
    result = evaluation.result_of(3)
    assert (result.member, result.num_scored, result.num_failures) == (3, 11, 0)
    assert result.reward == math.fsum(evaluation.rewards) / 11
    assert result.least == min(evaluation.rewards)
    assert result.components == {"own": result.reward, "length": sum(map(len, texts)) / 11}


def test_samples_are_the_answers_of_the_first_micro_batch(session, model_dirs):
    answers, texts = answers_alone(model_dirs["qwen2"])
    evaluation = evaluated(session, lambda p, c, n: [None if i == 4 else i / 8 for i in n])
    first = sorted(range(len(ROWS)), key=lambda i: (len(ROWS[i]["prompt"]), i))[:4]
    assert 4 in first
    assert {index: vars(sample) for index, sample in evaluation.samples.items()} == {
        i: {
            "prompt": ROWS[i]["prompt"],
            "completion": texts[i],
            "token_ids": answers[i],
            "reward": None if i == 4 else i / 8,
        }
        for i in first
    }
    evaluator = evaluator_of(session, lambda p, c, n: n)
    prompts = evaluator.prepare(ROWS, iteration=0)
    every = evaluator.evaluate_centre(prompts, group=session.mesh.world, keeps_samples=True).samples
    assert [sample.completion for sample in every.values()] == texts
    assert list(every) == list(range(len(ROWS)))


def test_none_and_failures_stay_with_their_rows(session):
    def reward(prompts, completions, n):
        if 7 in n:
            raise ValueError("seven")
        return [None if i == 2 else float("nan") if i == 5 else float(i) for i in n]

    evaluation = evaluated(session, reward)
    assert evaluation.rewards == [0.0, 1.0, None, 3.0, 4.0, None, 6.0, None, 8.0, 9.0, 10.0]
    assert evaluation.num_failures == 2  # None is an answer, not a failure
    assert [i for i, failed in enumerate(evaluation.has_failed) if failed] == [5, 7]


@dataclass(frozen=True)
class LoneRank(Group):
    """One of several ranks, with nobody to talk to: it knows its own part alone."""

    def gather_json(self, value):
        return [json.loads(json.dumps(value))]


def test_ranks_share_the_micro_batches_without_a_gap_or_an_overlap(session):
    def reward(prompts, completions, n):
        return [i + 1 + value for i, value in zip(n, spread(prompts, completions), strict=True)]

    whole = evaluated(session, reward, others=[LENGTH])
    for world_size in (2, 3, 5):
        groups = [LoneRank(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
        parts = [evaluated(session, reward, group=group, others=[LENGTH]) for group in groups]
        for row, wanted in enumerate(whole.rewards):
            earned = [part.rewards[row] for part in parts]
            assert earned.count(None) == world_size - 1
            assert wanted in earned
        assert sum(part.num_tokens for part in parts) == whole.num_tokens
        assert [part.samples for part in parts] == [whole.samples] + [{}] * (world_size - 1)
        for row in range(len(ROWS)):
            flags = [part.components["length"][row] is not None for part in parts]
            assert flags == [part.rewards[row] is not None for part in parts]


def test_an_evaluation_answers_with_the_weights_of_the_moment(session):
    def reward(prompts, completions, n):
        return spread(prompts, completions)

    evaluator = evaluator_of(session, reward)
    prompts, world = evaluator.prepare(ROWS, iteration=0), session.mesh.world
    first = evaluator.evaluate_centre(prompts, group=world).rewards
    assert evaluate_member(evaluator, prompts, Perturbation(0, 0, 0.2), group=world).rewards != first
    assert evaluator.evaluate_centre(prompts, group=world).rewards == first


def test_a_started_evaluation_does_not_see_later_weights(session):
    evaluator = evaluator_of(session, lambda prompts, completions, n: spread(prompts, completions))
    prompts, world = evaluator.prepare(ROWS, iteration=0), session.mesh.world
    members = [Perturbation(0, direction, 0.2) for direction in range(3)]
    alone = [evaluate_member(evaluator, prompts, member, group=world) for member in members]
    assert len({tuple(evaluation.rewards) for evaluation in alone}) == 3
    started = [start_member(evaluator, prompts, member, group=world) for member in members]
    assert [evaluator.collect(each, group=world)[0][0] for each in started] == alone


def test_samples_of_one_prompt_are_judged_as_rows_of_their_own(session):
    changes = {"samples_per_prompt": 3, "temperature": 1.0}
    seen = []

    def reward(prompts, completions, n):
        seen.extend(zip(n, prompts, completions, strict=True))
        return [100 * i + value for i, value in zip(n, spread(prompts, completions), strict=True)]

    evaluation = evaluated(session, reward, changes=changes)
    assert [int(value // 100) for value in evaluation.rewards] == [i for i in range(11) for _ in range(3)]
    assert sorted(i for i, _, _ in seen) == [i for i in range(11) for _ in range(3)]
    assert all(prompt == ROWS[i]["prompt"] for i, prompt, _ in seen)
    assert len({text for i, _, text in seen if i == 0}) > 1


def test_the_end_tokens_are_those_of_the_generation_config(tmp_path):
    path = tiny_model(tmp_path / "model", tied=True)
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, 3, 17]}))
    answers, _ = answers_alone(path)
    assert {answer[-1] for answer in answers} & {3, 17}
    with open_session(make_config(tmp_path, model=path, run_dir=tmp_path / "run")) as session:
        evaluator, *_ = make_evaluator(session, load_task(session.config.task))
        prompts = evaluator.prepare(ROWS, iteration=0)
        evaluation = evaluator.evaluate_centre(prompts, group=session.mesh.world)
        found = {sample.prompt: sample.token_ids for sample in evaluation.samples.values()}
    wanted = {row["prompt"]: answer for row, answer in zip(ROWS, answers, strict=True)}
    assert found == {prompt: wanted[prompt] for prompt in found}


def test_where_ranks_share_batches_all_answer_the_same_and_the_first_scores(session, monkeypatch):
    """As under tensor parallelism: two replicas of two ranks, each rank played in turn."""
    whole = evaluated(session, lambda p, c, n: spread(p, c))
    monkeypatch.setattr(type(session.backend), "needs_same_batch", True)
    seen = {}
    for rank in range(4):
        world = LoneRank(rank, 4, torch.device("cpu"))
        mesh = Mesh(world, LoneRank(rank % 2, 2, torch.device("cpu")))
        evaluator = evaluator_of(session, lambda p, c, n: spread(p, c), mode="layer", mesh=mesh)
        batches = []
        monkeypatch.setattr(
            evaluator,
            "_forward",
            lambda batch, prompts, forward=evaluator._forward, batches=batches: (
                batches.append(batch.rows) or forward(batch, prompts)
            ),
        )
        prompts = evaluator.prepare(ROWS, iteration=0)
        # A replica has every micro-batch; all ranks together share them by replica.
        for group in (mesh.shard, world):
            seen[rank, group.world_size] = evaluator.evaluate_centre(prompts, group=group), tuple(batches)
            batches.clear()
    for replica in (0, 1):
        for size in (2, 4):
            first, second = seen[2 * replica, size], seen[2 * replica + 1, size]
            assert first[1] == second[1]
            assert second[0].rewards == [None] * len(ROWS)
            assert second[0].samples == {}
        assert seen[2 * replica, 2][0].rewards == whole.rewards
    parts = [seen[rank, 4][0].rewards for rank in (0, 2)]
    assert all((one is None) != (other is None) for one, other in zip(*parts, strict=True))
    assert [one if other is None else other for one, other in zip(*parts, strict=True)] == whole.rewards
    assert [len(seen[rank, 4][1]) for rank in range(4)] == [2, 2, 1, 1]


@pytest.mark.parametrize("skips", [True, False])
def test_rewards_see_what_the_template_opened_and_special_tokens_if_asked(tmp_path, skips):
    template = CHAT.replace("assistant\n", "assistant\n<think>\n")
    model_dir = tiny_model(
        tmp_path / "model", tied=False, architecture="llama", vocab_size=len(VOCABULARY), seed=3
    )
    tokenizer = sentence_pieces(legacy=False, chat_template=template, eos_token="<|im_end|>")
    tokenizer.save_pretrained(model_dir)
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [1, 4, 13]}')
    changes = {"rollout__skip_special_tokens": skips, "rollout__max_new_tokens": 24}
    config = make_config(tmp_path, model=model_dir, run_dir=tmp_path / "run", **changes)
    asked = [[{"role": "user", "content": "the film " * (i % 4)}] for i in range(6)]
    rows = [{"prompt": asked[i // 2] if i % 2 else "the " * i + "film", "n": i} for i in range(12)]
    seen = {}

    def reward(prompts, completions, n):
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        seen.update(zip(n, texts, strict=True))
        return [0.0 for _ in n]

    task = Task("test", rows, [], lambda row: row["prompt"], (Component("own", reward),))
    with open_session(config) as session:
        evaluator, *_ = make_evaluator(session, task)
        evaluator.begin(evaluator.prepare(rows, iteration=0))
        evaluator.evaluate_centre(evaluator.prepare(rows, iteration=0), group=session.mesh.world)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    num_special = 0
    for row in rows:
        prompt, start = row["prompt"], ""
        if isinstance(prompt, str):
            ids = tokenizer(prompt).input_ids
        else:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids, start = tokenizer(text, add_special_tokens=False).input_ids, "<think>\n"
        output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[
            0, len(ids) :
        ].tolist()
        if not skips and output[-1] in (1, 4, 13):
            output.pop()
        assert seen[row["n"]] == start + tokenizer.decode(output, skip_special_tokens=skips)
        num_special += any(token in tokenizer.all_special_ids for token in output[:-1])
    assert num_special > 0, "there was something to leave out"


def test_processes_of_the_environments_of_all_tasks_are_counted_once(tmp_path):
    model_dir = tiny_model(tmp_path / "model", tied=False, seed=3)
    environments = SimpleNamespace(num_kills=3, of=lambda task: None)
    with open_session(make_config(tmp_path, model=model_dir, run_dir=tmp_path / "run")) as session:
        task = load_task(session.config.task)
        evaluator, *_ = make_evaluator(session, task, environments=environments, others={"other": task})
        kills = [evaluator.take_episode_counts()["num_environment_kills"]]
        environments.num_kills = 4
        kills.append(evaluator.take_episode_counts()["num_environment_kills"])
    assert kills == [3, 1]
