"""What is not a finite number never reaches the weights, and what says nothing does not move them."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from shardes.config.loading import parse_config
from shardes.errors import UserError
from shardes.es.member import mean_and_deviation
from shardes.es.shaping import shape
from shardes.es.update import Update
from shardes.noise import GAUSSIAN, Rademacher
from shardes.noise.kinds.gaussian import normals
from shardes.rollout.evaluator import Evaluator
from shardes.runs.journal import read_journal
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from shardes.weights.snapshot_view import owned_tensors
from shardes.weights.update_stats import UpdateStats
from tests.helpers.models import make_config, tiny_model
from tests.helpers.noise_oracle import ELEMENTWISE

POPULATION = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


@pytest.fixture
def configured(tmp_path, model):
    def make(name="run", **changes):
        keys = {"es__iterations": 2, "eval__every": 0} | changes
        return make_config(tmp_path, model=model, run_dir=tmp_path / name, **keys)

    return make


def train(config):
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
        return session.digest()


def history_of(config):
    return read_journal(config.run.dir / "journal.jsonl")[0]


def metrics_of(config):
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def spoiled(monkeypatch):
    """Makes the logits of some evaluations, by number, look as if they were not finite."""
    collect, calls = Evaluator.collect, []

    def spoil(*numbers):
        def spoiling(self, in_flight, **arguments):
            [[found]] = collect(self, in_flight, **arguments)
            calls.append(found)
            return [[replace(found, is_finite=len(calls) - 1 not in numbers)]]

        monkeypatch.setattr(Evaluator, "collect", spoiling)
        calls.clear()

    return spoil


def test_a_member_whose_logits_are_not_finite_is_excluded_and_counted(configured, spoiled):
    config = configured(es__iterations=1)
    spoiled(2)
    train(config)
    history, (line, _) = history_of(config), metrics_of(config)
    assert [history.members[0][n]["is_finite"] for n in range(POPULATION)] == [True, True, False, True]
    assert history.members[0][2]["reward"] is None
    assert (line["num_nonfinite_members"], line["num_excluded_members"]) == (1, 1)
    coefficients = history.updates[0]["coefficients"]
    assert coefficients[2] == 0
    rewards = [history.members[0][n]["reward"] for n in range(POPULATION)]
    shaped = shape(rewards, how="zscore")
    assert coefficients == [
        float(np.float32(config.es.alpha_at(config.es.sigma) / POPULATION * value)) for value in shaped
    ]
    assert any(coefficients)


def test_too_few_members_end_the_run_which_goes_on_when_that_is_mended(configured, spoiled):
    undisturbed = train(configured("undisturbed"))
    config = configured(es__min_valid_fraction=0.75)
    spoiled(POPULATION + 0, POPULATION + 3)
    with pytest.raises(UserError) as caught:
        train(config)
    message = str(caught.value)
    assert "2 of the 4 members of iteration 1 could be judged; wanted at least 3" in message
    assert "es.min_valid_fraction" in message
    assert "es.sigma: 2 had logits that are not finite" in message
    assert "task.reward" not in message
    assert len(history_of(config).updates) == 1
    spoiled()
    assert train(config) == undisturbed
    # What was known was not evaluated again.
    records = [json.loads(line) for line in (config.run.dir / "journal.jsonl").read_text().splitlines()]
    members = [r["member"] for r in records if r["type"] == "member" and r["iteration"] == 1]
    assert members == [0, 1, 2, 3, 0, 3]


def test_just_enough_members_are_enough(configured, spoiled):
    spoiled(0, 1)
    train(configured(es__iterations=1, es__min_valid_fraction=0.5))
    spoiled(0, 1, 2)
    train(configured("fewer", es__iterations=1, es__min_valid_fraction=0.0))
    spoiled(0, 1, 2, 3)
    with pytest.raises(
        UserError, match="0 of the 4 members of iteration 0 could be judged; wanted at least 1"
    ):
        train(configured("none", es__iterations=1, es__min_valid_fraction=0.0))


def test_failed_rewards_and_logits_are_told_apart(configured, spoiled, tmp_path):
    (tmp_path / "reward.py").write_text(
        "calls = []\n"
        "def score(prompts, completions, **columns):\n"
        "    calls.append(0)\n"
        "    if len(calls) > 3:\n"
        "        raise ValueError('nothing')\n"
        "    return [1.0] * len(prompts)\n"
    )
    spoiled(0)
    with pytest.raises(UserError) as caught:
        train(configured(task__reward=f"{tmp_path}/reward.py:score"))
    message = str(caught.value)
    assert "0 of the 4 members" in message
    assert (
        "task.reward: 3 had no answer that could be scored; the first failure was ValueError: nothing"
        in message
    )
    assert "es.sigma: 1 had logits that are not finite" in message


def test_a_centre_whose_logits_are_not_finite_is_told(configured, spoiled, caplog):
    config = configured(es__iterations=1, eval__every=1)
    spoiled(0)
    train(config)
    assert "the logits of the centre are not finite" in caplog.text
    assert history_of(config).evaluations[0]["reward"] is None
    assert history_of(config).evaluations[1]["reward"] is not None


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7.3e9])
def test_equal_rewards_skip_the_update_and_say_so(configured, tmp_path, caplog, reward):
    (tmp_path / "reward.py").write_text(
        f"def score(prompts, completions, **c): return [{reward!r}] * len(prompts)"
    )
    config = configured(task__reward=f"{tmp_path}/reward.py:score", es__iterations=1)
    with caplog.at_level(logging.WARNING):
        digest = train(config)
    assert "all members earned the same, so there is nothing to learn from them" in caplog.text
    assert history_of(config).updates[0]["coefficients"] == [0.0] * POPULATION
    assert digest == history_of(config).header["base_weights_digest"] == history_of(config).digests[1]
    assert metrics_of(config)[0]["reward_std"] == 0


def test_a_skipped_update_touches_no_element(configured):
    with open_session(configured()) as session:
        *_, master = next(iter(owned_tensors(session.weights)))
        master[0] = -0.0  # adding 0 to it would give 0.0
        before = session.digest()
        session.weights.update(Update(0, [0.0, -0.0]))
        assert session.digest() == before


def test_a_skipped_update_touches_no_element_when_it_is_to_be_measured(configured):
    with open_session(configured()) as session:
        *_, master = next(iter(owned_tensors(session.weights)))
        master[0] = -0.0
        before = session.digest()
        session.weights.update(Update(0, [0.0, -0.0]), stats=UpdateStats(torch.device("cpu")))
        assert session.digest() == before


def test_a_skipped_update_has_no_measures(configured, tmp_path):
    (tmp_path / "reward.py").write_text("def score(prompts, completions, **c): return [0.5] * len(prompts)")
    config = configured(
        task__reward=f"{tmp_path}/reward.py:score", es__iterations=1, log__instruments_every=1
    )
    train(config)
    assert not {"update_norm", "base_distance"} & metrics_of(config)[0].keys()


def test_the_deviation_of_equal_numbers_is_0():
    for reward in (0.1, 1 / 3, 1e-300, 9e99):
        for count in (1, 3, 10, 30):
            assert mean_and_deviation([reward] * count) == (reward, 0.0)


@pytest.mark.parametrize(
    ("dtype", "master", "alpha"),
    [
        ("float16", "float32", 3e4),
        ("float16", "model", 3e4),
        ("bfloat16", "model", 1e38),
        ("float32", "float32", 1e38),
    ],
)
def test_an_update_that_could_overflow_is_refused_before_anything_is_recorded(
    configured, dtype, master, alpha
):
    config = configured(model__dtype=dtype, weights__master=master, es__alpha=alpha)
    with pytest.raises(
        UserError, match=r"es\.alpha: the update of iteration 0 could make a weight too large"
    ):
        train(config)
    history = history_of(config)
    assert history.updates == []
    assert len(history.members[0]) == POPULATION, "what is known is kept"


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_could_overflow_is_a_bound(configured, kind):
    with open_session(configured(es__noise=kind.name)) as session:
        weights = session.weights
        largest = max(master.abs().max().item() for *_, master in owned_tensors(weights))
        room = (torch.finfo(torch.float32).max - largest) / kind.largest
        assert not weights.could_overflow(Update(0, [room * 0.49, -room * 0.49]))
        assert weights.could_overflow(Update(0, [room * 0.51, -room * 0.51]))
        assert weights.could_overflow(Update(0, [float("inf")]))
        assert weights.could_overflow(Update(0, [float("nan")]))
        *_, master = next(iter(owned_tensors(weights)))
        for value in (float("nan"), float("inf"), float("-inf")):
            kept = master[1].item()
            master[1] = value
            assert weights.could_overflow(Update(0, [0.0]))
            master[1] = kept
        assert not weights.could_overflow(Update(0, [0.0]))


def test_no_eps_is_larger_than_its_kind_says():
    # The largest radius comes from the smallest uniform number, the largest sign is 1.
    words = normals(seed=0, iteration=0, direction=0, param_id=0, start=0, length=1 << 16)
    assert abs(words).max() < GAUSSIAN.largest
    assert 6.6604371 < GAUSSIAN.largest < 6.7  # docs/noise.md
    assert Rademacher().largest == 1


def test_too_large_a_fraction_is_refused(configured):
    with pytest.raises(UserError, match=r"es\.min_valid_fraction"):
        parse_config(
            {**configured().model_dump(mode="json"), "es": {"iterations": 1, "min_valid_fraction": 2}},
            source="test",
        )
