"""Whole runs whose members race: nobody stops, some do, and the job is killed in between."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from shardes.config.es import RacingConfig
from shardes.config.loading import parse_config
from shardes.errors import UserError
from shardes.es.racing import estimated, going_on
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from shardes.weights.export_view import gather_centre
from tests.helpers.models import tiny_model, tree
from tests.helpers.old_runs import reseal
from tests.helpers.runs import journal_of, steady_metrics

COMMON = {
    "eval__every": 0,
    "es__iterations": 2,
    "task__reward_workers": 0,
    "es__population": 6,
    "rollout__micro_batch_size": 3,
}
EPISODES = {
    "task__environment": "tests.helpers.games:Count",
    "task__reward": None,
    "task__data": "range:0:7",
    "task__heldout_data": "range:7:10",
    "task__max_turns": 3,
    "rollout__max_context": 15,
}
KINDS = {
    "answers": {},
    "sampled pairs, some failed": {
        "es__antithetic": True,
        "rollout__temperature": 1.0,
        "rollout__samples_per_prompt": 2,
        "task__reward": "tests/helpers/rewards.py:fragile",
        "task__on_reward_error": "worst",
        "es__shaping": "centered_rank",
    },
    "shared forwards": {"es__noise": "low_rank", "rollout__members_per_forward": 2},
    "likelihoods": {
        "task__name": "multiple_choice",
        "task__reward": None,
        "task__metric": "log_likelihood",
        "rollout__micro_batch_size": 5,  # it divides no row's choices, of which there are three
    },
    "episodes": EPISODES,
}
NOBODY_STOPS = {"rounds": 2, "tolerance": 1e-12}
SOME_STOP = {"rounds": 3, "keep": 0.4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model", tied=True)


def train(root, model, *, name, **changes):
    """Trains in this process; returns all weights."""
    if changes.get("task__name") == "multiple_choice":
        common = {"choices": ["2", "31", "4"], "label": 1}
        rows = [{"prompt": f"{i}" + "+7" * (i % 4), **common} for i in range(11)]
        (root / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes |= {"task__data": root / "choices.jsonl", "task__heldout_data": root / "choices.jsonl"}
    config = parse_config(tree(root, model=model, run_dir=root / name, **COMMON | changes), source="test")
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
        shards = session.backend.shards
        return torch.cat([gather_centre(session.weights, shard).flatten().clone() for shard in shards])


def records_of(run_dir, *kinds):
    """The records of some kinds, without what chains them."""
    records = [record for record in journal_of(run_dir) if record["type"] in kinds]
    return [{key: value for key, value in record.items() if key != "checksum"} for record in records]


@pytest.mark.parametrize("kind", KINDS)
def test_a_race_of_which_nobody_stops_is_the_run_without_racing(tmp_path, model, kind):
    wanted = train(tmp_path, model, name="plain", **KINDS[kind])
    found = train(tmp_path, model, name="racing", **KINDS[kind], es__racing=NOBODY_STOPS)
    assert torch.equal(found, wanted)
    assert records_of(tmp_path / "racing", "member") == records_of(tmp_path / "plain", "member")
    for racing, plain in zip(*(steady_metrics(tmp_path / name) for name in ("racing", "plain")), strict=True):
        assert racing.pop("num_answers_saved", 0) == racing.pop("racing_error", 0) == 0
        assert (racing.pop("num_answers", 0) > 0) == ("num_members" in plain)
        assert racing == plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_race_goes_on_wherever_it_was_cut_with_the_same_bytes(tmp_path, model, kind):
    changes = KINDS[kind] | {"es__racing": SOME_STOP, "es__iterations": 1, "log__samples_every": 1}
    if kind == "likelihoods":
        changes["rollout__micro_batch_size"] = 9
    wanted = train(tmp_path, model, name="whole", **changes)
    whole = tmp_path / "whole"
    (first, last) = steady_metrics(whole)
    assert first["num_answers_saved"] > 0
    assert last["weights_digest"] == first["weights_digest"]
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert {(sample["iteration"], sample["member"]) for sample in samples} == {(0, 0)}  # of its first portion
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    kinds = [json.loads(line)["type"] for line in lines]
    answered = [len(record["part"]["indices"]) for record in records_of(whole, "portion")]
    assert sum(answered) == first["num_answers"] < 6 * (sum(answered[:6]) * 3 // 6)
    cuts = [i + 1 for i, record in enumerate(kinds) if record in ("portion", "member")]
    for cut in {cuts[2], cuts[len(cuts) // 2], cuts[-1]} if kind == "answers" else {cuts[len(cuts) // 2]}:
        run_dir = tmp_path / f"cut{cut}"
        shutil.copytree(whole, run_dir)
        (run_dir / "journal.jsonl").write_bytes(b"".join(lines[:cut]))
        assert torch.equal(train(tmp_path, model, name=run_dir.name, **changes), wanted)
        assert (run_dir / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
        assert steady_metrics(run_dir) == steady_metrics(whole)
        again = {json.dumps(record) for record in records_of(run_dir, *kinds) if "config" not in record}
        assert again == {json.dumps(record) for record in records_of(whole, *kinds) if "config" not in record}


def test_an_update_is_of_what_members_are_estimated_to_earn(tmp_path, model):
    """Worked out again from the answers in the journal."""
    train(tmp_path, model, name="run", es__racing=SOME_STOP, es__iterations=1)
    answers = {
        (r["round"], r["member"]): r["part"]["values"] for r in records_of(tmp_path / "run", "portion")
    }
    racing, rewards, earned = list(range(6)), [None] * 6, {m: [] for m in range(6)}
    for number in range(3):
        assert racing == sorted(member for at, member in answers if at == number)
        for member in racing:
            earned[member] += answers[number, member]
        known = {member: math.fsum(earned[member]) / len(earned[member]) for member in racing}
        rewards = estimated(rewards, known, share=number / (number + 1))
        if number < 2:
            racing = going_on(rewards, racing, settings=RacingConfig(**SOME_STOP), antithetic=False)
    assert [len(values) for values in earned.values()].count(9) == 2
    (update,) = records_of(tmp_path / "run", "update")
    wanted = [0.1 / 6 * (reward - np.mean(rewards)) / np.std(rewards) for reward in rewards]
    assert update["coefficients"] == pytest.approx(wanted, rel=1e-5)
    (line, _) = steady_metrics(tmp_path / "run")
    assert line["num_answers"] == sum(map(len, earned.values())) == 6 * 3 + 3 * 3 + 2 * 3
    assert line["num_answers_saved"] == 6 * 9 - line["num_answers"]
    assert line["racing_error"] > 0
    by_member = {record["member"]: record for record in records_of(tmp_path / "run", "member")}
    for member, values in earned.items():
        assert by_member[member]["reward"] == math.fsum(values) / len(values)
        assert sum(value is not None for value in by_member[member]["by_problem"]) == len(values)


def test_what_was_recorded_of_other_answers_is_asked_again(tmp_path, model):
    changes = {"es__racing": SOME_STOP, "es__iterations": 1}
    wanted = train(tmp_path, model, name="run", **changes)
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line)["type"] == "portion")
    path.write_bytes(b"".join(lines[: last + 1]))

    def spoil(record):
        if record["type"] == "portion" and record["member"] == 1:
            record["part"] |= {"has_failed": []}
        if record["type"] == "portion" and record["member"] == 2:
            record["part"]["indices"] = [index + 1 for index in record["part"]["indices"]]

    reseal(path, spoil)
    assert torch.equal(train(tmp_path, model, name="run", **changes), wanted)


def test_rounds_without_a_micro_batch_are_refused_before_anything_is_written(tmp_path, model):
    words = r"es\.racing\.rounds: got 4, .* the 9 answers .* are 3 micro-batches.*at most 2"
    with pytest.raises(UserError, match=words):
        train(tmp_path, model, name="run", es__racing={"rounds": 4})
    assert not (tmp_path / "run").exists()
