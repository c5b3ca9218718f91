"""`shardes compare`: coverage, what is gained and lost, divergence and other sets, against a base."""

import contextlib
import itertools
import json
import math
import re
import weakref
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardes.evaluation.comparing import compare_results
from shardes.evaluation.comparison_table import comparison_lines
from shardes.evaluation.coverage import gained_and_lost, numbers_to_draw, pass_at_k
from shardes.evaluation.drawing import Drawing
from shardes.evaluation.measuring import BaseAnswers, ModelResult, SetResult, _difference
from shardes.evaluation.summary import ratio_estimate
from shardes.session import open_session
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree, write_problems
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize("num_answers", [1, 4, 7])
def test_pass_at_k_is_the_share_of_all_subsets_that_have_a_pass(num_answers):
    for num_passes in range(num_answers + 1):
        answers = [place < num_passes for place in range(num_answers)]
        for k in range(1, num_answers + 1):
            subsets = list(itertools.combinations(answers, k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(num_answers, num_passes, k) == pytest.approx(share, abs=1e-15)


def test_pass_at_k_is_exact_for_many_answers_and_wants_enough_of_them():
    product = math.prod(1 - 64 / i for i in range(1000 - 3 + 1, 1001))
    assert pass_at_k(1000, 3, 64) == pytest.approx(1 - product, rel=1e-12)
    for numbers in ((3, 1, 4), (3, 4, 2), (3, 1, 0)):
        with pytest.raises(ValueError, match="wanted"):
            pass_at_k(*numbers)
    assert numbers_to_draw(0) == []
    assert numbers_to_draw(6) == [1, 2, 4]
    assert numbers_to_draw(128) == numbers_to_draw(500) == [1, 2, 4, 8, 16, 32, 64, 128]


def result(name, solved, *, rows=None, divergences=None, sets=None, **drawn):
    rows = list(range(len(solved))) if rows is None else rows
    rewards = [None if value is None else float(value) for value in solved]
    lengths = [4 + row for row in rows]
    main = SetResult(rows, rewards, solved, lengths, **drawn)
    return ModelResult(name, None, {"heldout": main} | (sets or {}), divergences)


def compared(*results, num_answers=0):
    drawing = Drawing(num_answers, 1.0, seed=3)
    return compare_results(results, drawing=drawing, pass_reward=1.0)


def test_what_is_gained_and_lost_is_counted_by_problem():
    before = [True, True, False, False, None, True]
    after = [True, False, True, False, True, None]
    assert gained_and_lost(before, after) == ([2], [1])
    found = compared(result("base", before), result("run", after))["models"][1]["sets"]["heldout"]
    assert (found["gained"]["rows"], found["lost"]["rows"]) == ([2], [1])
    assert found["gained"]["share"]["mean"] == found["lost"]["share"]["mean"] == 0.25
    assert found["solved"]["mean"] == 0.6
    assert found["solved_change"]["mean"] == 0.0


def test_problems_are_paired_by_row_where_a_model_cannot_be_asked_all():
    base = result("base", [True, False, True, False])
    run = result("run", [True, True], rows=[1, 3])
    found = compared(base, run)["models"][1]["sets"]["heldout"]
    assert found["num_problems"] == 2
    assert found["gained"]["rows"] == [1, 3]
    assert found["reward_change"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["tokens_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_the_intervals_of_changes_are_of_pairs_and_always_the_same():
    """Problems differ much more than the models do, which an interval without pairs would be full of."""
    random = np.random.default_rng(4)
    hard = random.random(400) < 0.5
    flips = random.random(400) < 0.2
    base, run = result("base", list(map(bool, hard))), result("run", list(map(bool, hard | flips)))
    found = compared(base, run)["models"][1]["sets"]["heldout"]
    change = found["solved_change"]
    differences = (hard | flips).astype(float) - hard
    assert change["mean"] == pytest.approx(differences.mean())
    error = differences.std() / 20
    assert change["low"] == pytest.approx(change["mean"] - 1.96 * error, abs=0.3 * error)
    assert change["high"] == pytest.approx(change["mean"] + 1.96 * error, abs=0.3 * error)
    unpaired = math.hypot(hard.std(), (hard | flips).std()) / 20
    assert change["high"] - change["low"] < 0.6 * 2 * 1.96 * unpaired
    assert compared(base, run) == compared(base, run)


def test_coverage_and_divergence_by_hand():
    base = result(
        "base", [False] * 3, num_answers=[4, 4, 4], num_passes=[1, 0, 4], drawn_rewards=[0.25, 0, 1]
    )
    run = result(
        "run",
        [False] * 3,
        num_answers=[4, 4, 2],
        num_passes=[2, 1, 0],
        drawn_rewards=[0.5, 0.25, 0.0],
        divergences=[(3.0, 2), (1.0, 6)],
    )
    report = compared(base, run, num_answers=4)
    first, second = (model["sets"]["heldout"] for model in report["models"])
    assert first["pass@1"]["mean"] == pytest.approx(5 / 12)
    assert first["pass@2"]["mean"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert first["pass@4"]["mean"] == pytest.approx(2 / 3)
    assert second["pass@2"]["mean"] == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)
    assert second["pass@4"]["mean"] == 1.0  # of the two problems that have as many answers
    assert second["pass@4_change"]["mean"] == 0.5
    kl = report["models"][1]["kl"]
    assert kl["mean"] == 0.5
    assert kl == vars(ratio_estimate([3.0, 1.0], [2, 6]))
    assert kl["low"] == pytest.approx(1 / 6)
    assert kl["high"] == 1.5
    text = "\n".join(comparison_lines(report))
    assert "| model | pass@1 | pass@2 | pass@4 |" in text
    assert "0.5000 [0.1667, 1.5000]" in text
    assert "No model has solved a problem" in text


HELPERS = "tests/helpers/rewards.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a random model, with a second set that is judged by likelihood."""
    root = tmp_path_factory.mktemp("run")
    model = tiny_model(root / "model", tied=True)
    choices = root / "choices.jsonl"
    rows = [{"prompt": f"{i}+", "choices": ["7", "3"], "label": i % 2} for i in range(5)]
    choices.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "es__iterations": 2,
        "es__alpha": 0.15,
        "eval__every": 0,
        "eval__pass_reward": 0.6,
        "eval__sets": {"choices": {"name": "multiple_choice", "data": str(choices)}},
        "task__heldout_data": str(write_problems(root / "heldout.jsonl", num_problems=7)),
        "log__kl_every": 2,
        "log__kl_prompts": 7,
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(tree(root, model=model, run_dir=root / "run", **changes)))
    done = call("train", "--config", path)
    assert done.returncode == 0, done.stderr
    return root


def compare(*arguments):
    done = call("shardes", "compare", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report(run):
    """The base, the run, the run's own base, and the run's export."""
    assert call("shardes", "export", run / "run", run / "exported").returncode == 0
    names = [run / "model", run / "run", f"{run}/run@0", run / "exported"]
    files = ["--json", run / "out" / "report.json", "--plot", run / "out" / "picture.png"]
    previous = []

    @contextlib.contextmanager
    def opened(config, **job):
        assert all(each() is None for each in previous), "one model at a time"
        with open_session(config, **job) as session:
            previous.append(weakref.ref(session.backend))
            yield session

    with mock.patch("shardes.session.open_session", opened):
        printed = compare(*names, "--config", run / "config.yaml", "--num-samples", 8, *files)
    assert len(previous) == 4
    found = json.loads((run / "out" / "report.json").read_text())
    assert printed.rstrip("\n").split("\n") == comparison_lines(found)
    return found


def test_a_run_is_compared_with_its_base_and_an_export_is_like_the_run(report, run):
    assert report["main_set"] == "heldout"
    base, trained, start, exported = report["models"]
    assert [model["iteration"] for model in report["models"]] == [None, 2, 0, None]
    assert trained["sets"] == exported["sets"]
    assert trained["kl"] == exported["kl"]
    assert trained["kl"]["low"] <= trained["kl"]["mean"] <= trained["kl"]["high"]
    assert start["kl"] == base["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    for name, found in start["sets"].items():
        assert found["problems"] == base["sets"][name]["problems"]
        assert found["reward_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert found["gained"]["rows"] == found["lost"]["rows"] == []
    before, after = base["sets"]["heldout"]["problems"], trained["sets"]["heldout"]["problems"]
    assert before != after
    pairs = list(zip(before, after, strict=True))
    found = trained["sets"]["heldout"]
    assert found["gained"]["rows"] == [b["row"] for a, b in pairs if b["solved"] and not a["solved"]]
    assert found["lost"]["rows"] == [b["row"] for a, b in pairs if a["solved"] and not b["solved"]]
    assert found["gained"]["rows"] or found["lost"]["rows"]
    assert found["pass@1"]["mean"] == pytest.approx(np.mean([b["num_passes"] / 8 for b in after]))
    assert found["pass@8"]["mean"] == pytest.approx(np.mean([b["num_passes"] > 0 for b in after]))
    assert 0 < found["pass@1"]["mean"] < found["pass@8"]["mean"]
    choices = trained["sets"]["choices"]
    assert choices["num_problems"] == 5
    assert "pass@1" not in choices
    assert choices["tokens"]["mean"] is None
    assert (run / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_rewards_are_those_of_evaluate_and_lengths_those_of_its_answers(report, run, tmp_path):
    config, out = run / "config.yaml", tmp_path / "answers.jsonl"
    done = call("shardes", "evaluate", "--model", run / "run", "--config", config, "--out", out)
    assert done.returncode == 0, done.stderr
    sets = json.loads(done.stdout)["sets"]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    trained = report["models"][1]["sets"]
    for name, summary in sets.items():
        assert trained[name]["reward"] == summary["mean@1"]
    problems = trained["heldout"]["problems"]
    assert [p["tokens"] for p in problems] == [len(a["token_ids"]) for a in answers if a["set"] == "heldout"]
    assert [p["solved"] for p in problems] == [a["reward"] >= 0.6 for a in answers if a["set"] == "heldout"]
    # Drawn answers, too.
    drawn = ["rollout.samples_per_prompt=8", "rollout.temperature=1", "eval.sets={}"]
    done = call("shardes", "evaluate", "--model", run / "run", "--config", config, *drawn)
    summary = json.loads(done.stdout)["sets"]["heldout"]
    for k in (1, 8):
        assert trained["heldout"][f"pass@{k}"] == pytest.approx(summary[f"pass@{k}"])
    assert trained["heldout"]["sampled_reward"]["mean"] == pytest.approx(summary["mean@8"]["mean"])


def test_the_divergence_is_what_transformers_computes_and_what_the_run_has_recorded(report, run):
    """The run's own probe asks the same prompts with the same random numbers."""
    records = [json.loads(line) for line in (run / "run" / "journal.jsonl").read_text().splitlines()]
    (probe,) = (record for record in records if record["type"] == "probe")
    *_, recorded = (record["kl"] for record in records if record["type"] == "kl")
    models = [AutoModelForCausalLM.from_pretrained(run / name) for name in ("model", "exported")]
    nats = []
    for prompt, answer in probe["pairs"]:
        totals = []
        for model in models:
            with torch.no_grad():
                scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            totals.append(sum(scores[i, t].item() for i, t in zip(places, answer, strict=True)))
        nats.append(totals[0] - totals[1])
    tokens = [len(answer) for _, answer in probe["pairs"]]
    kl = report["models"][1]["kl"]
    assert kl["mean"] == pytest.approx(recorded, rel=1e-9)
    assert kl["mean"] == pytest.approx(sum(nats) / sum(tokens), rel=1e-4)
    assert kl == pytest.approx(vars(ratio_estimate(nats, tokens)), rel=1e-3)


def test_another_tokenizer_leaves_out_the_divergence_alone(run, tmp_path):
    other = tiny_model(tmp_path / "other", tied=False, architecture="llama", seed=5)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    arguments = ["--num-samples", 0, "--json", tmp_path / "report.json", "--trust-remote-code"]
    printed = compare(run / "model", f"{run}/run@1", other, "rollout.temperature=0.5", *arguments)
    base, trained, foreign = json.loads((tmp_path / "report.json").read_text())["models"]
    assert trained["kl"]["mean"] is not None
    assert foreign["kl"] is None
    assert "its tokenizer has other tokens than the base's" in foreign["no_kl"]
    assert "no KL: its tokenizer has other tokens" in printed
    assert foreign["sets"]["heldout"]["num_problems"] == 7
    assert not any(name.startswith("pass@") for name in base["sets"]["heldout"])
    # Without --config, a run's own reward runs only if the person says so.
    done = call("shardes", "compare", run / "model", run / "run")
    assert done.returncode == 2
    assert re.search(r"it asks for what takes your consent.*task\.reward", done.stderr, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ([[5], [36]], ""),
        ([[5], [37]], "it has 37 tokens, and the base has answered with number 37"),
        ([[5] * 60, [6] * 5], "it was made for 64 tokens, and prompt and answer of the base have 65"),
    ],
)
def test_the_divergence_is_left_out_where_a_model_cannot_be_asked(run, pair, words):
    model = SimpleNamespace(path=run / "model", directory=run / "model", trust_remote_code=False)
    session = SimpleNamespace(config=SimpleNamespace(model=model))
    assert _difference(session, BaseAnswers("tokens", {3: pair}, [-1.0]), "tokens") == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}/model"], "give at least one model to compare with BASE"),
        (["{run}/model", "{run}/model"], "--config: give the YAML file that says what is asked"),
        (["{run}/model", "nowhere@2"], "nowhere@2: neither a model directory"),
        (
            ["{run}/model", "{run}/run@9", "--config", "{run}/config.yaml"],
            "run@9: the run has 2 iterations",
        ),
        (["{run}/model", "{run}/run", "es.sigam=1", "--config", "{run}/config.yaml"], "sigam"),
        (["{run}/model", "{run}/run", "--config", "{run}/config.yaml", "--plot", "a.gif"], "got the suffix"),
        (["{run}/model", "{run}/run", "--config", "{run}/config.yaml", "--json", "{run}"], "give a file"),
        (["{run}/model", "{run}/run", "--num-samples=-1"], "--num-samples"),
    ],
)
def test_mistakes_are_answered_before_a_model_is_loaded(run, monkeypatch, arguments, words):
    monkeypatch.setattr("shardes.session.open_session", None)
    done = call("shardes", "compare", *(each.format(run=run) for each in arguments))
    assert done.returncode == 2
    assert words.format(run=run) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("player", ["environment", pytest.param("harness", marks=pytest.mark.exhaustive)])
def test_episodes_are_compared_without_a_divergence(tmp_path, player):
    if player == "harness":
        pytest.importorskip("openai")
    model = tiny_model(tmp_path / "model", tied=True)
    changes = {
        f"task__{player}": f"tests/helpers/games.py:{'talk' if player == 'harness' else 'Count'}",
        "task__reward": None,
        "task__data": "range:0:6",
        "task__heldout_data": "range:6:11",
        "task__batch_size": 4,
        "rollout__max_context": 60,
        "es__iterations": 1,
        "eval__every": 0,
        "eval__pass_reward": 0.05,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / "run", **changes)))
    assert call("train", "--config", path).returncode == 0
    out, answers = tmp_path / "report.json", tmp_path / "answers.jsonl"
    names = [model, tmp_path / "run", f"{tmp_path}/run@0"]
    printed = compare(*names, "es.seed=9", "--config", path, "--num-samples", 2, "--json", out)
    assert "no KL: the problems are episodes" in printed
    base, trained, start = json.loads(out.read_text())["models"]
    # The seed is that of the draws, and not of the run's noise.
    assert start["sets"]["heldout"]["problems"] == base["sets"]["heldout"]["problems"]
    assert trained["kl"] is None
    found = trained["sets"]["heldout"]
    done = call("shardes", "evaluate", "--model", tmp_path / "run", "--config", path, "--out", answers)
    summary = json.loads(done.stdout)["sets"]["heldout"]
    assert found["reward"] == summary["mean@1"]
    assert found["tokens"]["mean"] * 5 == pytest.approx(summary["num_tokens"])
    assert found["tokens"]["mean"] > 6  # the most of one turn
    assert {problem["num_samples"] for problem in found["problems"]} == {2}
    assert found["pass@2"]["mean"] >= found["pass@1"]["mean"] > 0
    # Two answers that are drawn are hardly ever the greedy one.
    assert all(abs(each["sampled_reward"] - each["reward"]) > 1e-9 for each in found["problems"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", pytest.param("zero3", marks=pytest.mark.exhaustive)])
def test_two_ranks_find_what_one_finds(report, run, tmp_path, backend):
    arguments = ["launch/compare.py", run / "model", run / "run"]
    arguments += ["--config", run / "config.yaml", "--num-samples", 8, "--json", tmp_path / "report.json"]
    run_ranks([*arguments, f"parallel.backend={backend}"], world_size=2, log_dir=tmp_path / "logs")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == report | {"models": report["models"][:2]}
