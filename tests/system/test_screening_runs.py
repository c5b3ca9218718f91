"""Runs that screen problems and take the best of several answers: whole, and cut off anywhere."""

import json
import math
import shutil

import numpy as np
import pytest

from shardes.config.task import ScreeningConfig
from shardes.es.objective import expected_maximum
from shardes.es.shaping import shape
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.tasks.sampler import draw_batch
from shardes.tasks.screening import Screening
from shardes.trainer import make_training_loop
from tests.helpers.inprocess import call
from tests.helpers.models import make_config, tiny_model
from tests.helpers.runs import journal_of, steady_metrics

PLAIN = {
    "task__reward": "tests/helpers/rewards.py:spread_on_some",
    "task__batch_size": None,
    "task__screening": {"keep_fraction": 0.3},
    "task__heldout_data": None,
    "es__iterations": 4,
}
# With everything that a weight or a place among the problems goes through.
ALL_OPTIONS = PLAIN | {
    "task__batch_size": 9,
    "task__screening": {"keep_fraction": 0.3, "importance_weights": True},
    "task__objective": "pass@2",
    "rollout__temperature": 1.0,
    "rollout__samples_per_prompt": 3,
    "es__shaping": "per_prompt",
    "es__prompts_per_member": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model", tied=True)


def train(root, model, *, name="run", **changes):
    config = make_config(root, model=model, run_dir=root / name, **changes)
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()


def of_type(journal, kind):
    return [record for record in journal if record["type"] == kind]


def places_of(member):
    """The places, among the iteration's problems, of those that a member answered."""
    return range(len(member["by_problem"])) if member["problems"] is None else member["problems"]


def rewards_by_place(members):
    """What each problem of an iteration earned, by its place among those that were asked."""
    found = {}
    for member in members:
        for place, reward in zip(places_of(member), member["by_problem"], strict=True):
            found.setdefault(place, []).append(reward)
    return found


def test_fewer_problems_are_asked_where_members_earn_the_same(tmp_path, model):
    train(tmp_path, model, **PLAIN)
    journal, lines = journal_of(tmp_path / "run"), steady_metrics(tmp_path / "run")
    updates, agreed = of_type(journal, "update"), {}
    for iteration, (line, update) in enumerate(zip(lines, updates, strict=False)):
        members = [m for m in of_type(journal, "member") if m["iteration"] == iteration]
        # All 11 problems are drawn, and of those on which all agreed the last time, 3 in 10 are asked.
        num_asked = 11 - len(agreed) + math.ceil(len(agreed) * 3 / 10)
        assert {len(member["by_problem"]) for member in members} == {num_asked}
        assert (line["num_problems"], line["num_left_out"]) == (num_asked, 11 - num_asked)
        told = [len(set(rewards)) > 1 for _, rewards in sorted(rewards_by_place(members).items())]
        record = update["screening"]
        rows = sorted(record["informative"] + [row for _, numbers in record["agreed"] for row in numbers])
        assert [row in record["informative"] for row in rows] == told
        assert line["informative_prompts"] == sum(told) / num_asked
        agreed = {row: value for row, value in agreed.items() if row not in rows}
        agreed |= {row: value for value, numbers in record["agreed"] for row in numbers}
    assert [line["num_problems"] for line in lines[:-1]] == [11, 6, 6, 6], "8 of 11 can tell nobody apart"
    assert [line["informative_prompts"] for line in lines[:-1]] == [3 / 11, 0.5, 0.5, 0.5]
    tokens = [line["num_tokens"] for line in lines[:-1]]
    assert max(tokens[1:]) < 0.7 * tokens[0]


def test_weights_go_into_members_rewards_and_into_the_update(tmp_path, model):
    train(tmp_path, model, **ALL_OPTIONS)
    journal = journal_of(tmp_path / "run")
    screening = Screening(ScreeningConfig(**ALL_OPTIONS["task__screening"]), seed=0)
    for iteration, update in enumerate(of_type(journal, "update")):
        members = [m for m in of_type(journal, "member") if m["iteration"] == iteration]
        drawn = draw_batch(11, batch_size=9, sampling="random", seed=0, iteration=iteration)
        weights = screening.choose(drawn, iteration=iteration).weights
        for member in members:
            values = member["by_problem"]
            shares = [1.0 if weights is None else weights[place] for place in places_of(member)]
            wanted = sum(w * v for w, v in zip(shares, values, strict=True)) / sum(shares)
            assert member["reward"] == pytest.approx(wanted, rel=1e-12)
        shaped = shape(
            [member["reward"] for member in members],
            how="per_prompt",
            table=[dict(zip(places_of(m), m["by_problem"], strict=True)) for m in members],
            weights=None if weights is None else dict(enumerate(weights)),
        )
        assert update["coefficients"] == [float(np.float32(0.1 / len(members) * z)) for z in shaped]
        screening.resume([update])
    assert sum(update["screening"]["num_left_out"] for update in of_type(journal, "update")) > 3


def test_a_run_without_screening_counts_informative_problems_too(tmp_path, model):
    train(tmp_path, model, **PLAIN | {"task__screening": None, "es__iterations": 2})
    lines = steady_metrics(tmp_path / "run")
    assert [line["informative_prompts"] for line in lines[:-1]] == [3 / 11, 3 / 11]
    assert "num_left_out" not in lines[0]
    assert "screening" not in of_type(journal_of(tmp_path / "run"), "update")[0]


def test_leaving_out_what_tells_nobody_apart_changes_no_shaped_reward(tmp_path, model):
    """Members earn the same on problems that are left out, so what the others say decides, as it would."""
    train(tmp_path, model, name="all", **PLAIN | {"task__screening": None, "es__iterations": 2})
    train(tmp_path, model, name="screened", **PLAIN | {"es__iterations": 2})
    for iteration in range(2):
        found = [of_type(journal_of(tmp_path / name), "update")[iteration] for name in ("all", "screened")]
        wanted, coefficients = (update["coefficients"] for update in found)
        assert coefficients == pytest.approx(wanted, rel=1e-5), "but for the 1e-8 beside the deviation"


@pytest.mark.parametrize("options", [PLAIN, ALL_OPTIONS], ids=["plain", "all options"])
def test_a_run_cut_off_anywhere_asks_what_it_would_have_asked(tmp_path, model, options):
    train(tmp_path, model, name="whole", **options)
    wanted = journal_of(tmp_path / "whole")
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    kinds = [record["type"] for record in wanted]
    # After the second update; in the middle of the members that follow; at the end of the third iteration.
    second = [place for place, kind in enumerate(kinds) if kind == "update"][1]
    for kept in (second + 1, second + 4, second + 2 * (second // 2)):
        run_dir = tmp_path / f"cut{kept}"
        shutil.copytree(tmp_path / "whole", run_dir)
        (run_dir / "journal.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
        train(tmp_path, model, name=run_dir.name, **options)
        assert journal_of(run_dir) == wanted
        assert steady_metrics(run_dir) == steady_metrics(tmp_path / "whole")
    assert sum(record["screening"]["num_left_out"] for record in of_type(wanted, "update")) > 0
    verified = call("shardes", "verify", tmp_path / "whole")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_member_earns_the_objective_and_evaluations_report_both(tmp_path, model):
    options = {
        "task__objective": "pass@2",
        "rollout__temperature": 1.0,
        "rollout__samples_per_prompt": 3,
        "task__batch_size": 1,
        "log__samples_every": 1,
        "es__iterations": 1,
    }
    train(tmp_path, model, **options)
    journal = journal_of(tmp_path / "run")
    header, evaluation = journal[0], of_type(journal, "evaluation")[0]
    assert header["settings"]["task.objective"] == "pass@2"
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    rewards = [sample["reward"] for sample in samples if sample.get("member") == 0]
    assert len(rewards) == 3
    member = of_type(journal, "member")[0]
    assert member["reward"] == expected_maximum(rewards, k=2) > math.fsum(rewards) / 3
    line = steady_metrics(tmp_path / "run")[0]
    assert line["heldout_reward"] == evaluation["reward"]
    assert line["heldout_objective"] == evaluation["objective"] > evaluation["reward"]
    result = call(
        *("shardes", "evaluate", "--model", tmp_path / "run@0", "--trust-remote-code"),
        *("--out", tmp_path / "answers.jsonl"),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["sets"]["heldout"]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    rewards = [answer["reward"] for answer in answers]
    best = [expected_maximum(rewards[first : first + 3], k=2) for first in range(0, len(rewards), 3)]
    assert found["objective"]["mean"] == pytest.approx(math.fsum(best) / len(best))
    assert found["mean@3"]["mean"] == pytest.approx(math.fsum(rewards) / len(rewards))
    assert evaluation["objective"] == pytest.approx(found["objective"]["mean"])
