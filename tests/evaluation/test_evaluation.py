"""Evaluating models and runs: `shardes evaluate`, several held-out sets, the best weights, failed rewards."""

import json
import os

import numpy as np
import pytest
import yaml

from shardes.config.loading import load_config
from shardes.errors import UserError
from shardes.evaluation.summary import estimate, summarise
from shardes.rollout.aggregate import Evaluation
from shardes.runs.journal import History, read_journal
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import make_config, tiny_model, tree, write_problems
from tests.helpers.ranks import run_ranks

HELPERS = "tests/helpers/rewards.py"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_estimate_is_the_mean_and_what_other_problems_might_have_given():
    same = estimate([2.0] * 6, samples_per_problem=2)
    assert (same.mean, same.low, same.high) == (2.0, 2.0, 2.0)
    none = estimate([None] * 4, samples_per_problem=2)
    assert (none.mean, none.low, none.high) == (None, None, None)
    partial = estimate([1.0, None, None, None, 4.0, 7.0], samples_per_problem=2)
    assert partial.mean == 4.0
    values = list(np.random.default_rng(1).normal(3.0, 2.0, size=400))
    found = estimate(values, samples_per_problem=1)
    assert found == estimate(values, samples_per_problem=1)
    assert found.mean == pytest.approx(np.mean(values))
    error = np.std(values) / 20
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.3 * error)


def test_answers_to_one_problem_are_not_independent():
    values = list(np.random.default_rng(1).normal(size=100))
    repeated = [value for value in values for _ in range(16)]
    one, many = estimate(values, samples_per_problem=1), estimate(repeated, samples_per_problem=16)
    assert (many.low, many.high) == pytest.approx((one.low, one.high))
    assert estimate(repeated, samples_per_problem=1).high < one.high


def test_a_summary_counts_passes_by_answer_and_by_problem():
    found = Evaluation(
        rewards=[1.1, 0.1, 0.9, None, None, None, 1.0, None],
        has_failed=[False, False, False, True, False, False, False, True],
        components={"answer": [1.0, 0.0, 0.0, None, None, None, 1.0, None]},
        num_tokens=77,
    )

    def means(**arguments):
        summary = summarise(found, samples_per_problem=2, **arguments)
        return {
            key: value["mean"]
            for key, value in summary.items()
            if isinstance(value, dict) and "mean" in value
        } | {key: value for key, value in summary.items() if not isinstance(value, dict)}

    assert means(pass_reward=1.0, on_error="exclude") == {
        "mean@2": pytest.approx((1.1 + 0.1 + 0.9 + 1.0) / 4),
        "pass@1": 2 / 6,  # a failed reward is no pass, and one that does not apply is not asked
        "pass@2": 2 / 3,
        "num_problems": 4,
        "samples_per_prompt": 2,
        "num_failures": 2,
        "num_excluded": 4,
        "num_tokens": 77,
    }
    worst = means(pass_reward=0.1, on_error="worst")
    assert worst["mean@2"] == pytest.approx((1.1 + 0.1 + 0.9 + 0.1 + 1.0 + 0.1) / 6)
    assert worst["pass@1"] == 4 / 6
    assert worst["num_excluded"] == 2
    assert "pass@1" not in means(pass_reward=None, on_error="exclude")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four iterations with two held-out sets that keeps its best weights."""
    root = tmp_path_factory.mktemp("run")
    model = tiny_model(root / "model", tied=True)
    choices = root / "choices.jsonl"
    rows = [{"prompt": f"{i}+", "choices": ["7", "3"], "label": i % 2} for i in range(6)]
    choices.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = write_problems(root / "lengths.jsonl", num_problems=5)
    parts = [{"path": f"{HELPERS}:spread", "weight": 2.0}, {"path": f"{HELPERS}:spread", "label": "again"}]
    changes = {
        "es__iterations": 4,
        "es__seed": 1,
        "task__batch_size": None,
        "eval__every": 1,
        "eval__save_best": True,
        "eval__sets": {
            "choices": {"name": "multiple_choice", "data": str(choices)},
            "lengths": {"reward": "tests/helpers/hostile_rewards.py:length", "data": str(lengths)},
        },
        "task__reward": None,
        "task__rewards": parts,
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(tree(root, model=model, run_dir=root / "run", **changes)))
    result = call("train", "--config", path)
    assert result.returncode == 0, result.stderr
    return path


def run_dir_of(path):
    return load_config(path, []).run.dir


def test_every_held_out_set_is_in_the_metrics_by_its_name(run):
    lines = lines_of(run_dir_of(run) / "metrics.jsonl")
    assert len(lines) == 5
    for line in lines:
        sets = line["heldout_sets"]
        assert list(sets) == ["choices", "lengths"]
        assert sets["choices"]["components"].keys() == {"accuracy", "cross_entropy", "log_likelihood"}
        assert sets["choices"]["reward"] == -sets["choices"]["components"]["cross_entropy"]
        assert sets["lengths"]["reward"] == sets["lengths"]["components"]["length"] > 0
        assert sets["lengths"]["num_failures"] == 0
        parts = line["heldout_components"]
        assert parts["spread"] == parts["again"] == pytest.approx(line["heldout_reward"] / 3)
    for line in lines[:-1]:
        assert line["components"]["spread"] == pytest.approx(line["reward_mean"] / 3)
    assert len({line["heldout_sets"]["choices"]["reward"] for line in lines}) > 1
    samples = lines_of(run_dir_of(run) / "samples.jsonl")
    assert {sample.get("set") for sample in samples} == {None, "choices", "lengths"}


def test_the_best_weights_are_kept_and_can_be_exported_by_that_name(run, tmp_path):
    run_dir = run_dir_of(run)
    rewards = [line["heldout_reward"] for line in lines_of(run_dir / "metrics.jsonl")]
    best = rewards.index(max(rewards))
    assert 0 < best < 4
    for name, iteration in (("best", "best"), ("number", best), ("last", "4")):
        result = call("shardes", "export", run_dir, tmp_path / name, "--iteration", iteration)
        assert result.returncode == 0, result.stderr
    assert fingerprint(run_dir / "best") == fingerprint(tmp_path / "best") == fingerprint(tmp_path / "number")
    assert fingerprint(tmp_path / "last") != fingerprint(tmp_path / "best")


def test_what_was_not_exported_before_a_crash_is_exported_after_it(run, tmp_path):
    config = load_config(run, [f"run.dir={tmp_path / 'run'}", "es.iterations=1"])
    task = load_task(config.task)
    with open_session(config) as session:
        trainer = make_training_loop(session, task)
        trainer._centre._save_if_best = lambda iteration, reward: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert not (tmp_path / "run" / "best").exists()
    with open_session(config) as session:
        make_training_loop(session, task).train()
    rewards = [line["heldout_reward"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    best = rewards.index(max(rewards))
    result = call("shardes", "export", tmp_path / "run", tmp_path / "out", "--iteration", best)
    assert result.returncode == 0, result.stderr
    assert fingerprint(tmp_path / "run" / "best") == fingerprint(tmp_path / "out")


def evaluated(*arguments):
    result = call("shardes", "evaluate", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("iteration", [0, 2, 4])
def test_a_run_at_an_iteration_earns_what_training_saw(run, tmp_path, iteration):
    out = tmp_path / "answers" / "all.jsonl"
    found = evaluated("--model", f"{run_dir_of(run)}@{iteration}", "--config", run, "--out", out)
    line = lines_of(run_dir_of(run) / "metrics.jsonl")[iteration]
    assert found["iteration"] == iteration
    assert list(found["sets"]) == ["heldout", "choices", "lengths"]
    for name, wanted in {"heldout": {"reward": line["heldout_reward"]}, **line["heldout_sets"]}.items():
        summary = found["sets"][name]
        assert summary["mean@1"]["mean"] == pytest.approx(wanted["reward"], rel=1e-12)
        assert summary["mean@1"]["low"] <= summary["mean@1"]["mean"] <= summary["mean@1"]["high"]
        for part, value in wanted.get("components", line["heldout_components"]).items():
            assert summary["components"][part]["mean"] == pytest.approx(value, rel=1e-12)
    answers = lines_of(out)
    assert [(a["set"], a["row"], a["sample"]) for a in answers] == [
        (name, row, 0)
        for name, size in (("heldout", 11), ("choices", 6), ("lengths", 5))
        for row in range(size)
    ]
    rewards = [answer["reward"] for answer in answers if answer["set"] == "heldout"]
    assert sum(rewards) / 11 == pytest.approx(line["heldout_reward"], rel=1e-12)
    assert all(a["components"]["spread"] * 3 == pytest.approx(a["reward"]) for a in answers[:11])
    assert all(len(a["completion"]) == a["reward"] for a in answers[-5:])


def test_a_run_brings_its_own_configuration_and_an_exported_model_earns_the_same(run, tmp_path):
    run_dir = run_dir_of(run)
    whole = evaluated("--model", run_dir, "rollout.samples_per_prompt=1", "--trust-remote-code")
    assert whole["iteration"] == 4
    assert call("shardes", "export", run_dir, tmp_path / "model").returncode == 0
    exported = evaluated("--model", tmp_path / "model", "--config", run)
    assert exported["sets"] == whole["sets"]
    best = evaluated("--model", f"{run_dir}@best", "--config", run)
    rewards = [line["heldout_reward"] for line in lines_of(run_dir / "metrics.jsonl")]
    assert best["iteration"] == rewards.index(max(rewards))


def test_several_samples_a_prompt_are_drawn_and_counted(run, tmp_path):
    out = tmp_path / "out.jsonl"
    drawn = [
        "rollout.samples_per_prompt=3",
        "rollout.temperature=1.0",
        "eval.pass_reward=1.5",
        "eval.sets={}",
    ]
    arguments = ["--model", run_dir_of(run), "--config", run, *drawn, "--out", out]
    found = evaluated(*arguments)
    summary, answers = found["sets"]["heldout"], lines_of(out)
    assert [(a["row"], a["sample"]) for a in answers] == [(i, k) for i in range(11) for k in range(3)]
    passes = np.array([a["reward"] >= 1.5 for a in answers]).reshape(11, 3)
    assert summary["pass@1"]["mean"] == pytest.approx(passes.mean())
    assert summary["pass@3"]["mean"] == pytest.approx(passes.any(axis=1).mean())
    assert summary["mean@3"]["mean"] == pytest.approx(np.mean([a["reward"] for a in answers]))
    assert 0 < passes.mean() < 1
    assert evaluated(*arguments) == found


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "neither a model directory (with config.json) nor a run directory"),
        ("{run}@9", "the run has 4 iterations; give at most that, or best"),
        ("{run}@x", "wanted a number of iterations, or best"),
        ("{model}@2", "neither a model directory"),
    ],
)
def test_a_model_that_is_not_there_is_refused(run, model, words):
    config = load_config(run, [])
    name = model.format(run=config.run.dir, model=config.model.path)
    result = call("shardes", "evaluate", "--model", name, "--config", run)
    assert result.returncode == 2
    assert f"--model {name}: " in result.stderr
    assert words in result.stderr


def test_a_model_directory_needs_a_configuration(run):
    result = call("shardes", "evaluate", "--model", load_config(run, []).model.path)
    assert result.returncode == 2
    assert "--config: give the YAML file" in result.stderr


def test_the_best_iteration_is_the_first_of_those_with_the_highest_reward(tmp_path):
    history = History()
    with pytest.raises(UserError, match="no held-out evaluation"):
        history.iteration_of("best", key="--iteration best")
    for iteration, reward in enumerate([0.5, None, 0.75, 0.75, 0.25]):
        history.evaluations[iteration] = {"reward": reward}
    assert history.iteration_of("best", key="") == 2
    assert history.best_reward(before=2) == 0.5
    assert history.best_reward(before=0) is None


def train(root, model, **changes):
    config = make_config(root, model=model, run_dir=root / "run", es__iterations=2, eval__every=0, **changes)
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
    return lines_of(root / "run" / "metrics.jsonl"), read_journal(root / "run" / "journal.jsonl")[0]


def test_worst_counts_the_least_of_the_iteration_for_failures(tmp_path):
    model = tiny_model(tmp_path / "model", tied=True)
    changes = {"task__reward": f"{HELPERS}:fragile", "task__on_reward_error": "worst"}
    lines, history = train(tmp_path, model, **changes)
    for line in lines[:-1]:
        members = history.members[line["iteration"]].values()
        least = min(record["least"] for record in members)
        rewards = [
            (record["reward"] * record["num_scored"] + least * record["num_failures"]) / 9
            for record in members
        ]
        assert all(record["num_scored"] + record["num_failures"] == 9 for record in members)
        assert sum(record["num_failures"] for record in members) == line["num_reward_failures"] > 0
        assert line["reward_mean"] == pytest.approx(np.mean(rewards))
        assert line["reward_std"] == pytest.approx(np.std(rewards))
        z = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-8)
        order = list(history.members[line["iteration"]])
        wanted = [0.1 / 4 * z[order.index(member)] for member in range(4)]
        assert history.updates[line["iteration"]]["coefficients"] == pytest.approx(wanted, rel=1e-5)


def test_a_run_in_which_a_member_was_known_before_ends_alike(tmp_path):
    """Killed after some members: what these earned, and what their failures count, is in the journal."""
    model = tiny_model(tmp_path / "model", tied=True)
    changes = {"task__reward": f"{HELPERS}:fragile", "task__on_reward_error": "worst"}
    wanted, history = train(tmp_path, model, **changes)
    journal = (tmp_path / "run" / "journal.jsonl").read_bytes().split(b"\n")
    first = next(i for i, line in enumerate(journal) if b'"type":"update"' in line)
    second = next(i for i, line in enumerate(journal) if i > first and b'"type":"member"' in line)
    os.truncate(tmp_path / "run" / "journal.jsonl", len(b"\n".join(journal[: second + 2])) + 1)
    found, again = train(tmp_path, model, **changes)
    assert again.updates == history.updates
    assert found[-1]["weights_digest"] == wanted[-1]["weights_digest"]


HOSTILE = """import os, time
def score(prompts, completions, **columns):
    for text in completions:
        if len(text) == 3: os._exit(1)
        if len(text) == 5: time.sleep(1000)
    return [float(len(text)) for text in completions]
"""
# The same for all answers but those.
CALM = """def score(prompts, completions, **columns):
    return [float(len(t)) if len(t) not in (3, 5) else float("nan") for t in completions]
"""


def test_a_hostile_reward_does_not_stop_the_run(tmp_path):
    model = tiny_model(tmp_path / "model", tied=True)
    reward = tmp_path / "reward.py"
    reward.write_text(HOSTILE)
    path = tmp_path / "config.yaml"
    changes = {"task__reward": f"{reward}:score", "task__reward_timeout_seconds": 0.5, "es__iterations": 2}
    config = tree(tmp_path, model=model, run_dir=tmp_path / "run", **changes)
    path.write_text(yaml.safe_dump(config))
    result = call("train", "--config", path)
    assert result.returncode == 0, result.stderr
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert all(line["num_reward_failures"] > 0 for line in lines[:-1])
    # The answers that could be scored earn what they earn where nothing hangs.
    reward.write_text(CALM)
    path.write_text(yaml.safe_dump(config | {"run": {"dir": str(tmp_path / "calm")}}))
    assert call("train", "--config", path).returncode == 0
    calm = lines_of(tmp_path / "calm" / "metrics.jsonl")
    assert [line["weights_digest"] for line in calm] == [line["weights_digest"] for line in lines]
    assert [line.get("heldout_reward") for line in calm] == [line.get("heldout_reward") for line in lines]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["layer", "member", "iteration"])
def test_a_hostile_reward_on_two_ranks_leaves_the_weights_of_a_calm_one(tmp_path, mode):
    model = tiny_model(tmp_path / "model", tied=True)
    for name, text in (("hostile", HOSTILE), ("calm", CALM)):
        reward = tmp_path / f"{name}.py"
        reward.write_text(text)
        changes = {"task__reward": f"{reward}:score", "task__reward_timeout_seconds": 0.5, "eval__every": 0}
        changes |= {"parallel__backend": "fsdp", "rollout__gather": mode, "es__iterations": 2}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / name, **changes)))
        run_ranks(
            ["launch/train.py", "--config", path],
            world_size=2 if name == "hostile" else 1,
            log_dir=tmp_path / f"{name}-logs",
        )
    hostile, calm = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("hostile", "calm"))
    assert all(line["num_reward_failures"] > 0 for line in hostile[:-1])
    for one, other in zip(hostile, calm, strict=True):
        assert one["weights_digest"] == other["weights_digest"]
        assert one.get("num_reward_failures") == other.get("num_reward_failures")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_two_ranks_find_what_one_finds(run, tmp_path, backend):
    pytest.importorskip("deepspeed")
    drawn = ["rollout.samples_per_prompt=2", "rollout.temperature=1.0"]
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    model = f"{run_dir_of(run)}@3"
    wanted = evaluated("--model", model, "--config", run, "--out", alone, *drawn)
    arguments = ["launch/evaluate.py", "--model", model, "--config", run, "--out", shared, *drawn]
    output = run_ranks([*arguments, f"parallel.backend={backend}"], world_size=2, log_dir=tmp_path / "logs")
    assert shared.read_bytes() == alone.read_bytes()
    begin = output.index('{\n  "model"')
    assert json.JSONDecoder().raw_decode(output[begin:])[0] == wanted
