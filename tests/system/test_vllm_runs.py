"""Whole runs with vLLM: the bytes of one process, killed and resumed, verified and exported without vLLM."""

import json
import shutil
import signal
import time

import pytest
import yaml

from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import tree
from tests.helpers.ranks import ROOT, Ranks, run_ranks
from tests.helpers.runs import journal_of, run_cases, steady_metrics
from tests.helpers.vllm_models import vllm_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

CHANGES = {
    "rollout__stop": ["7"],
    "rollout__max_new_tokens": 8,
    "es__antithetic": True,
    "es__iterations": 3,
    "log__instruments_every": 1,
}
VLLM = {"parallel__backend": "vllm", "rollout__kv_cache_gib": 0.05}
CHOICES = {
    "task__name": "multiple_choice",
    "task__metric": "accuracy",
    "task__reward": None,
    "task__batch_size": None,
}


ADAPTERS = {
    "es__noise": "low_rank",
    "es__rank": 2,
    "es__trainable": [r".*_proj\.weight"],
    "rollout__members_per_forward": 3,
}
DRAWN = {
    "rollout__temperature": 0.7,
    "rollout__samples_per_prompt": 2,
    "log__kl_every": 1,
    "log__kl_prompts": 4,
    "log__samples_every": 1,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    vllm_model(root / "model", architecture="qwen2", vocab_size=32, seed=4)
    rows = [{"prompt": f"{n}+", "choices": ["1", "2", f"{n} 3"], "label": "2"} for n in range(10)]
    (root / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def tree_of(root, name, **changes):
    return tree(root, model=root / "model", run_dir=root / name, **(CHANGES | changes))


@pytest.fixture(scope="module")
def runs(root):
    """Fingerprints of exports by name, all of the same run; and of a likelihood task."""
    choices = CHOICES | {"task__data": root / "choices.jsonl", "task__heldout_data": root / "choices.jsonl"}
    trees = {
        "single": tree_of(root, "single"),
        "single-choices": tree_of(root, "single-choices", **choices),
        "single-adapters": tree_of(root, "single-adapters", **ADAPTERS),
        "one": tree_of(root, "one", **VLLM),
        "one-choices": tree_of(root, "one-choices", **VLLM, **choices),
        "one-drawn": tree_of(root, "one-drawn", **VLLM, **DRAWN),
    }
    found = dict(zip(trees, run_cases(root, "alone", list(trees.values()), 1), strict=True))
    trees = {
        "split": tree_of(root, "split", **VLLM),
        "replicas": tree_of(root, "replicas", **VLLM, parallel__shard_size=1),
        "split-adapters": tree_of(root, "split-adapters", **VLLM, **ADAPTERS),
    }
    return found | dict(zip(trees, run_cases(root, "together", list(trees.values()), 2), strict=True))


def test_runs_are_those_of_one_process(root, runs):
    steady = steady_metrics(root / "single")
    assert len({line["reward_mean"] for line in steady if "reward_mean" in line}) == 3
    for name in ("one", "split", "replicas"):
        assert steady_metrics(root / name) == steady, name
        assert runs[name] == runs["single"], name
    # Likelihoods agree to rounding, and rewards are compared by them.
    keys = ("iteration", "reward_mean", "reward_std", "heldout_reward", "weights_digest")
    found, wanted = (steady_metrics(root / name) for name in ("one-choices", "single-choices"))
    assert [[line.get(key) for key in keys] for line in found] == [
        [line.get(key) for key in keys] for line in wanted
    ]
    assert runs["one-choices"] == runs["single-choices"] != runs["single"]


def test_members_in_adapters_of_split_layers_have_the_bytes_of_members_in_a_forward(root, runs):
    """Answers are of other kernels, but in float32 they are the same; updates know only rewards."""
    found, wanted = (steady_metrics(root / name) for name in ("split-adapters", "single-adapters"))
    assert len({line["reward_mean"] for line in wanted if "reward_mean" in line}) == 3
    assert found == wanted
    assert runs["split-adapters"] == runs["single-adapters"] != runs["single"]


def test_the_header_says_what_answered(root, runs):
    for name, size in (("one", 1), ("split", 2), ("replicas", 1)):
        header = journal_of(root / name)[0]
        engine = header["engine"]
        assert (engine["name"], engine["dtype"], engine["tensor_parallel_size"]) == ("vllm", "float32", size)
        assert header["is_exact"] is False


def test_answers_are_drawn_kept_and_compared_with_the_base_models(root, runs):
    lines = steady_metrics(root / "one-drawn")
    assert lines[0]["kl_to_base"] == pytest.approx(0.0, abs=1e-6), "nothing has moved yet"
    assert lines[1]["kl_to_base"] > 0.1
    members = [line for line in journal_of(root / "one-drawn") if line["type"] == "member"]
    assert len(members) == 12
    assert {len(line["by_problem"]) for line in members} == {9}
    assert len({line["reward"] for line in members}) > 6
    samples = [json.loads(line) for line in (root / "one-drawn" / "samples.jsonl").read_text().splitlines()]
    assert {sample["iteration"] for sample in samples} == {0, 1, 2, 3}
    answers = {sample["completion"] for sample in samples}
    assert len(answers) > len(samples) // 2


@pytest.mark.parametrize("backend", ["single", "zero3"])
def test_a_journal_is_replayed_without_vllm(root, runs, backend):
    if backend == "zero3":
        command = ["-m", "shardes", "verify", root / "split", "--backend", backend]
        output = run_ranks(command, world_size=2, log_dir=root / "verify-logs")
    else:
        result = call("shardes", "verify", root / "split", "--export", root / "together-export0")
        assert result.returncode == 0, result.stderr
        output = result.stdout
    assert "3 iterations replayed" in output
    assert "all is as it should be" in output


def test_a_run_goes_on_with_the_same_engine_alone_unless_asked(root, runs):
    shutil.copytree(root / "one", root / "other")
    config = root / "other.yaml"
    changes = {"es__iterations": 4, "parallel__backend": "single"}
    config.write_text(yaml.safe_dump(tree_of(root, "other", **changes)))
    result = call("train", "--config", config)
    assert result.returncode == 2
    assert 'name: the run has "vllm", this job "transformers"' in result.stderr
    assert "run.resume_engine=any" in result.stderr
    result = call("train", "--config", config, "run.resume_engine=any")
    assert result.returncode == 0, result.stderr
    (change,) = [line for line in journal_of(root / "other") if line["type"] == "engine"]
    assert change["iteration"] == 3
    output = call("shardes", "journal", root / "other").stdout
    assert "engine       vllm, " in output
    assert "tensor_parallel_size 1, version 0." in output
    assert "engine       transformers, from iteration 3 on" in output
    assert call("shardes", "verify", root / "other").returncode == 0


def test_commands_work_with_vllm(root, runs):
    """Export, evaluate, a dry run and the plan, in this process."""
    result = call(
        "shardes", "export", root / "one", root / "exported", "--backend", "vllm", "--iteration", "3"
    )
    assert result.returncode == 0, result.stderr
    assert fingerprint(root / "exported") == runs["single"]
    config = root / "commands.yaml"
    config.write_text(yaml.safe_dump(tree_of(root, "commands", **VLLM)))
    outputs = {}
    for backend in ("single", "vllm"):
        keys = [f"parallel.backend={backend}"] + ["rollout.kv_cache_gib=null"] * (backend == "single")
        result = call("shardes", "evaluate", "--model", root / "one", "--config", config, *keys)
        assert result.returncode == 0, result.stderr
        outputs[backend] = result.stdout
    assert outputs["single"] == outputs["vllm"]
    result = call("train", "--config", config, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "dry run    one member, 2 prompts: reward" in result.stdout
    result = call("shardes", "plan", "--config", config, "--world-size", "2")
    assert result.returncode == 0, result.stderr
    assert "2 with vllm" in result.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rollout.kv_cache_gib=0.00001"], "no place in the cache of rollout.kv_cache_gib: 1e-05"),
        (["rollout.vllm={max_model_len: 9}"], "need 10 positions, but the engine has 9"),
    ],
)
def test_a_cache_and_positions_that_are_too_few_are_refused(root, changes, message):
    config = root / "short.yaml"
    config.write_text(yaml.safe_dump(tree_of(root, "short", **VLLM)))
    result = call("train", "--config", config, *changes)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_killed_rank_ends_the_job_and_the_same_command_gives_the_same_bytes(root, runs):
    config = root / "killed.yaml"
    config.write_text(yaml.safe_dump(tree_of(root, "killed", **VLLM)))
    command = [ROOT / "launch" / "train.py", "--config", config]
    journal = root / "killed" / "journal.jsonl"
    with Ranks(command, world_size=2, log_dir=root / "killed-logs") as ranks:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (journal.exists() and b'"update"' in journal.read_bytes()):
            time.sleep(0.005)
        ranks.processes[1].kill()
        statuses = ranks.wait(60)
    assert statuses[1] == -9
    assert statuses[0] != 0 or len(journal_of(root / "killed")) == len(journal_of(root / "split"))
    run_ranks(command, world_size=2, log_dir=root / "again-logs")
    assert steady_metrics(root / "killed") == steady_metrics(root / "split")
    digests = [
        {line["iteration"]: line["digest"] for line in journal_of(root / name) if line["type"] == "weights"}
        for name in ("killed", "split")
    ]
    assert digests[0] == digests[1]


def test_a_rank_that_hangs_ends_the_job_with_the_reason(root):
    config = root / "hanging.yaml"
    # Long answers, so that it is in a step that the other rank waits.
    changes = {"parallel__timeout_seconds": 10, "es__alpha": 1e-6, "rollout__max_new_tokens": 300}
    changes |= {"es__iterations": 10_000, "eval__every": 0, "rollout__stop": ["no such text"]}
    config.write_text(yaml.safe_dump(tree_of(root, "hanging", **VLLM, **changes)))
    journal = root / "hanging" / "journal.jsonl"
    with Ranks([ROOT / "launch" / "train.py", "--config", config], world_size=2, log_dir=root / "h") as ranks:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (journal.exists() and b'"member"' in journal.read_bytes()):
            time.sleep(0.05)
        time.sleep(0.2)
        ranks.processes[1].send_signal(signal.SIGSTOP)
        assert ranks.processes[0].wait(60) not in (0, None)
        assert "parallel.timeout_seconds" in ranks.output() or "Timed out" in ranks.output()
