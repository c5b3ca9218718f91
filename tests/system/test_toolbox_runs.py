"""The options of the algorithm in whole runs: sharded, interrupted, replayed, measured."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shardes.models.checkpoint import Checkpoint
from shardes.noise import Region
from shardes.runs.snapshot import find_snapshots, snapshot_path
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from shardes.weights.export_view import gather_centre
from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import make_config, tiny_model, tree
from tests.helpers.runs import journal_of, run_cases, steady_metrics

PAIRS = {
    "es__optimizer": "adam",
    "es__alpha": 0.01,
    "es__antithetic": True,
    "es__noise_reuse": 2,
    "es__weight_decay": 0.5,
    "es__decay_towards": "base",
    "log__instruments_every": 1,
    "log__kl_every": 1,
    "eval__every": 0,
}
BY_PROMPT = {
    "es__optimizer": "momentum",
    "es__shaping": "per_prompt",
    "es__prompts_per_member": 5,
    "es__population": {0: 4, 1: 6},
    "es__max_update_norm": 3.0,
    "model__dtype": "bfloat16",
    "weights__master": "model",
    "log__instruments_every": 1,
    "eval__every": 0,
}
RACING = {
    "es__racing": {"rounds": 3, "keep": 0.4},
    "es__population": 6,
    "rollout__micro_batch_size": 3,
    "rollout__temperature": 0.7,
    "eval__every": 0,
}
RACING_TOGETHER = RACING | {"es__noise": "low_rank", "rollout__members_per_forward": 2}
# All that a problem's weight or its place among those that are asked goes through.
SCREENED = {
    "task__reward": "tests/helpers/rewards.py:spread_on_some",
    "task__screening": {"keep_fraction": 0.3, "importance_weights": True},
    "task__objective": "pass@2",
    "rollout__temperature": 1.0,
    "rollout__samples_per_prompt": 3,
    "es__shaping": "per_prompt",
    "es__prompts_per_member": 4,
    "eval__every": 0,
}
# What depends on the iterations before, and not on the weights alone.
AGAIN = {
    "es__member_reuse": 0.5,
    "es__step_rule": "reliability",
    "es__antithetic": True,
    "es__max_update_norm": 3.0,
    "log__instruments_every": 1,
    "eval__every": 0,
}
OPTIONS = (PAIRS, BY_PROMPT, SCREENED, AGAIN, RACING, RACING_TOGETHER)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model", tied=True)


def train(root, model, *, name="run", **changes):
    """Trains in this process; returns the weights as loaded from the masters."""
    config = make_config(root, model=model, run_dir=root / name, **changes)
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
        return {
            shard.name: gather_centre(session.weights, shard).flatten().clone()
            for shard in session.backend.shards
        }


def portions_of(run_dir):
    """What each member earned by each portion; when that was known depends on the clock."""
    return {
        (record["iteration"], record["round"], record["member"]): record["part"]
        for record in journal_of(run_dir)
        if record["type"] == "portion"
    }


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_options_give_the_same_bytes_and_metrics_however_they_are_sharded(tmp_path, model):
    oracle = [tree(tmp_path, model=model, run_dir=tmp_path / f"one{i}", **o) for i, o in enumerate(OPTIONS)]
    begun = tree(tmp_path, model=model, run_dir=tmp_path / "run4", **SCREENED, es__iterations=2)
    wanted = run_cases(tmp_path, "oracle", [*oracle, begun], 1)
    # One rank has died in the second iteration, after the first of its members; two ranks go on.
    journal = tmp_path / "run4" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-5]))
    assert [record["type"] for record in journal_of(tmp_path / "run4")][-2:] == ["weights", "member"]
    assert steady_metrics(tmp_path / "one4")[0]["num_answers_saved"] > 0
    cases = [
        (0, {"parallel__backend": "zero3", "rollout__gather": "layer"}),
        (1, {"parallel__backend": "fsdp", "rollout__gather": "iteration"}),
        (1, {"parallel__backend": "zero3", "rollout__gather": "member"}),
        (0, {"parallel__backend": "single", "weights__master_device": "cpu"}),
        (2, {"parallel__backend": "fsdp", "rollout__gather": "iteration"}),
        (2, {"parallel__backend": "zero3", "rollout__gather": "layer"}),
        (3, {"parallel__backend": "fsdp", "rollout__gather": "iteration"}),
        (4, {"parallel__backend": "zero3", "rollout__gather": "layer"}),
        (4, {"parallel__backend": "fsdp", "rollout__gather": "iteration"}),
        (5, {"parallel__backend": "zero3", "rollout__gather": "layer"}),
    ]
    trees = [
        tree(
            tmp_path,
            model=model,
            run_dir=tmp_path / f"run{i}",
            **OPTIONS[kind],
            **changes,
        )
        for i, (kind, changes) in enumerate(cases)
    ]
    found = run_cases(tmp_path, "cases", trees, 2)
    for i, (kind, changes) in enumerate(cases):
        assert found[i] == wanted[kind], changes
        assert steady_metrics(tmp_path / f"run{i}") == steady_metrics(tmp_path / f"one{kind}"), changes
        assert portions_of(tmp_path / f"run{i}") == portions_of(tmp_path / f"one{kind}"), changes
    assert sum(line.get("num_left_out", 0) for line in steady_metrics(tmp_path / "one2")) > 0


@pytest.mark.parametrize("options", [PAIRS, BY_PROMPT, AGAIN], ids=["pairs", "by prompt", "again"])
def test_a_run_goes_on_from_a_snapshot_with_what_the_optimizer_keeps(tmp_path, model, options, caplog):
    wanted = train(tmp_path, model, name="whole", **options, es__iterations=5)
    train(tmp_path, model, **options, es__iterations=3, run__snapshot_every=2)
    assert find_snapshots(tmp_path / "run") == [2]
    found = train(tmp_path, model, **options, es__iterations=5, run__snapshot_every=2)
    assert same(found, wanted)
    assert "damaged" not in caplog.text, "it was used"
    assert steady_metrics(tmp_path / "run") == steady_metrics(tmp_path / "whole")


def test_a_snapshot_whose_optimizer_states_are_damaged_is_passed_over(tmp_path, model, caplog):
    wanted = train(tmp_path, model, name="whole", **PAIRS, es__iterations=4)
    train(tmp_path, model, **PAIRS, es__iterations=3, run__snapshot_every=2)
    path = snapshot_path(tmp_path / "run", 2) / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # the last tensor is one of the second moments
    path.write_bytes(data)
    found = train(tmp_path, model, **PAIRS, es__iterations=4, run__snapshot_every=2)
    assert "its optimizer states have the digest" in caplog.text
    assert same(found, wanted)


@pytest.mark.parametrize("options", [BY_PROMPT, AGAIN], ids=["by prompt", "again"])
def test_an_interrupted_iteration_goes_on_from_what_the_journal_knows(tmp_path, model, options):
    wanted = train(tmp_path, model, name="whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    lines = (tmp_path / "run" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line)["type"] == "member")
    (tmp_path / "run" / "journal.jsonl").write_bytes(b"".join(lines[: last - 2]))
    found = train(tmp_path, model, **options)
    assert same(found, wanted)
    records = journal_of(tmp_path / "run")
    assert records == journal_of(tmp_path / "whole")
    if options is AGAIN:
        updates = [record for record in records if record["type"] == "update"]
        assert records[0]["update_version"] == 3
        assert [any(record.get("reused", ())) for record in updates] == [False, True, True]
        assert all(0 < record["alpha"] < 0.1 for record in updates), "shorter than what was asked for"


@pytest.mark.parametrize("options", [PAIRS, AGAIN], ids=["pairs", "again"])
def test_a_run_is_verified_and_any_iteration_of_it_exported(tmp_path, model, options):
    train(tmp_path, model, name="short", **options, es__iterations=2)
    train(tmp_path, model, **options, es__iterations=4, run__snapshot_every=3)
    assert call("shardes", "export", tmp_path / "run", tmp_path / "two", "--iteration", 2).returncode == 0
    assert call("shardes", "export", tmp_path / "short", tmp_path / "all").returncode == 0
    assert fingerprint(tmp_path / "two") == fingerprint(tmp_path / "all")
    verified = call("shardes", "verify", tmp_path / "run")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_what_is_measured_of_updates_is_what_they_did(tmp_path, model):
    changes = {"es__noise_reuse": 2, "es__alpha": 0.5, "log__instruments_every": 1, "es__iterations": 2}
    first = train(tmp_path, model, name="one", **changes | {"es__iterations": 1})
    second = train(tmp_path, model, **changes)
    checkpoint, base = Checkpoint(model), {}
    for name, values in first.items():
        base[name] = torch.empty(values.numel())
        region = Region(0, values.numel(), 0, values.numel())
        checkpoint.read(name, region=region, out=base[name])

    def distance(a, b):
        return math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a))

    lines = steady_metrics(tmp_path / "run")
    assert lines[0]["update_norm"] == pytest.approx(distance(first, base), rel=1e-5)
    assert lines[0]["base_distance"] == pytest.approx(distance(first, base), rel=1e-5)
    assert lines[1]["base_distance"] == pytest.approx(distance(second, base), rel=1e-5)
    assert lines[0]["update_cosine"] == pytest.approx(1, abs=1e-5)
    assert lines[0]["update_norm_ratio"] == pytest.approx(1, abs=1e-5)
    assert lines[0]["update_cosine_to_last"] is None
    # The second update has the first one's directions, so the angle is that between the coefficients.
    a, b = (
        np.array(record["coefficients"])
        for record in journal_of(tmp_path / "run")
        if record["type"] == "update"
    )
    wanted = a @ b / math.sqrt((a @ a) * (b @ b))
    assert lines[1]["update_cosine_to_last"] == pytest.approx(wanted, abs=0.03)
    num_elements = sum(values.numel() for values in base.values())
    assert lines[0]["perturbation_norm"] == pytest.approx(0.05 * math.sqrt(num_elements))
    assert 1 <= lines[0]["effective_population"] <= 4
    assert 0 <= lines[0]["agreed_prompts"] <= 1
    assert lines[0]["reward_snr"] > 0


def test_narrow_masters_lose_some_of_an_update(tmp_path, model):
    changes = {"model__dtype": "bfloat16", "weights__master": "model", "es__alpha": 1e-4}
    train(tmp_path, model, **changes, log__instruments_every=1, es__iterations=1)
    (line,) = [line for line in steady_metrics(tmp_path / "run") if "update_norm" in line]
    # Steps far below the spacing of bfloat16 arrive as a few long ones: longer in all, in other directions.
    assert line["update_norm_ratio"] > 1.2
    assert line["update_cosine"] < 0.9


def test_measuring_changes_nothing(tmp_path, model):
    assert same(
        train(tmp_path, model, name="measured", log__instruments_every=1, es__noise="rademacher"),
        train(tmp_path, model, name="unmeasured", log__instruments_every=0, es__noise="rademacher"),
    )
    keys = {key for line in steady_metrics(tmp_path / "unmeasured") for key in line}
    assert not {"update_norm", "base_distance", "reward_reliability", "reuse_exponent"} & keys
    lines = journal_of(tmp_path / "unmeasured")
    assert lines[0]["update_version"] == 2
    assert not any({"reused", "shaped"} & line.keys() for line in lines), "as journals have been"


def log_likelihood(model_dir, pairs):
    """Over all answers, by transformers alone."""
    model, total = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), 0.0
    for prompt, answer in pairs:
        with torch.no_grad():
            scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        total += sum(float(scores[place, token]) for place, token in zip(places, answer, strict=True))
    return total


def test_the_divergence_from_the_base_model_is_that_of_its_answers_likelihoods(tmp_path, model):
    changes = {"es__iterations": 4, "es__alpha": 0.3, "log__kl_every": 3, "log__kl_prompts": 6}
    train(tmp_path, model, **changes)
    (probe,) = (record for record in journal_of(tmp_path / "run") if record["type"] == "probe")
    assert len(probe["pairs"]) == 6
    assert len({tuple(answer) for _, answer in probe["pairs"]}) > 3
    lines = {line["iteration"]: line.get("kl_to_base") for line in steady_metrics(tmp_path / "run")}
    assert lines.keys() == {0, 1, 2, 3, 4}
    assert (lines[0], lines[1], lines[2]) == (0.0, None, None)
    assert call("shardes", "export", tmp_path / "run", tmp_path / "out").returncode == 0
    num_tokens = sum(len(answer) for _, answer in probe["pairs"])
    before, after = (log_likelihood(path, probe["pairs"]) for path in (model, tmp_path / "out"))
    assert lines[4] == pytest.approx((before - after) / num_tokens, rel=1e-4)
    assert lines[4] > 0.01


def test_the_divergence_can_be_asked_for_later(tmp_path, model):
    changes = {"log__kl_every": 1, "log__kl_prompts": 6}
    wanted = train(tmp_path, model, name="whole", **changes)
    train(tmp_path, model, es__iterations=2)
    assert same(train(tmp_path, model, **changes), wanted)
    lines, wanted = (
        [line.get("kl_to_base") for line in steady_metrics(tmp_path / name)] for name in ("run", "whole")
    )
    assert lines == [None, None, *wanted[2:]]


@pytest.mark.parametrize(
    ("options", "snapshot_every"), [(PAIRS, 0), (PAIRS, 1), (BY_PROMPT, 0), (BY_PROMPT, 1), (AGAIN, 0)]
)
def test_what_a_kill_left_unmeasured_is_measured_again(tmp_path, model, options, snapshot_every):
    changes = options | {"es__iterations": 4, "run__snapshot_every": snapshot_every, "run__keep_snapshots": 5}
    train(tmp_path, model, name="whole", **changes)
    wanted = steady_metrics(tmp_path / "whole")
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    updates = [i for i, line in enumerate(lines) if json.loads(line)["type"] == "update"]
    assert len(updates) == 4
    for number, last in enumerate(updates, start=1):
        run_dir = tmp_path / f"cut{number}"
        shutil.copytree(tmp_path / "whole", run_dir)
        # After the update's record, before that of the weights; metrics and snapshots come later still.
        (run_dir / "journal.jsonl").write_bytes(b"".join(lines[: last + 1]))
        metrics = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run_dir / "metrics.jsonl").write_bytes(b"".join(metrics[: number - 1]))
        for iteration in find_snapshots(run_dir):
            if iteration >= number:
                shutil.rmtree(snapshot_path(run_dir, iteration))
        train(tmp_path, model, name=run_dir.name, **changes)
        assert steady_metrics(run_dir) == wanted
