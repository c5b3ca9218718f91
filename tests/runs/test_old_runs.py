"""Runs that commit e070420 began go on, and are verified and exported, as by its own code; so do its keys.

Replayed weights have the same bits everywhere. Rewards may not: on another kind of CPU a member may answer
otherwise. So how a run goes on is compared with another only if members earned the same in both.
"""

import json
import re
import shutil
import sys

import pytest

from tests.fixtures.make_fixtures import hashes_of, this_machine
from tests.helpers.inprocess import call
from tests.helpers.old_runs import (
    FIXTURES,
    assert_verified,
    changed_file,
    contents,
    digests_of,
    expected,
    export,
    has_new_words,
    in_new_words,
    install,
    records_of,
    rewards_of,
    succeed,
    train,
)
from tests.helpers.ranks import run_command, run_ranks

pytest.importorskip("tensorboard")  # plain/user.yaml asks for it

DONE, ITERATIONS = 3, 6
# What each run goes on with in one process. An old key may be given on the command line, too.
OVERRIDES = {"plain": ["parallel.backend=single", "rollout.mode=prompts"], "batched": []}
each_run = pytest.mark.parametrize("name", OVERRIDES)


def assert_went_on(name, run_dir):
    """Fail unless the run is at its end, with all that was recorded before, and as its journal says."""
    journal = run_dir / "journal.jsonl"
    assert journal.read_bytes().startswith((FIXTURES / name / "run" / "journal.jsonl").read_bytes())
    assert len(records_of(journal, "update")) == ITERATIONS
    assert_verified(run_dir, ITERATIONS)


def assert_ends_as(journal, other, *, name):
    """Fail unless weights and rewards are the same; skip if rewards differ as on another kind of machine."""
    rewards, others = rewards_of(journal), rewards_of(other)
    assert rewards.keys() == others.keys()
    if rewards != others and this_machine() != expected(name)["made_on"]:
        pytest.skip("members earn something else on this kind of machine")
    assert (rewards, digests_of(journal)) == (others, digests_of(other))


@pytest.fixture(scope="module", params=OVERRIDES)
def continued(request, tmp_path_factory):
    """Return the name of a run, and its directory after it has gone on to the end."""
    run_dir = install(request.param, tmp_path_factory.mktemp(request.param))
    train(request.param, run_dir, *OVERRIDES[request.param])
    return request.param, run_dir


@each_run
def test_what_was_recorded_is_verified_and_exported(name, tmp_path):
    run_dir = install(name, tmp_path)
    before = contents(run_dir)
    assert export(run_dir, tmp_path / "out") == expected(name)["stopped"]
    assert_verified(run_dir, DONE, "--export", tmp_path / "out")
    for option in ["--shard-size", *(["--max-shard-size"] if has_new_words() else [])]:
        assert export(run_dir, tmp_path / option, option, "100KB") == expected(name)["small_files"]
    assert contents(run_dir) == before


@each_run
def test_a_finished_run_is_exported_and_left_as_it_is(name, tmp_path):
    run_dir, finished = install(name, tmp_path), FIXTURES / name / "finished.jsonl"
    shutil.copyfile(finished, run_dir / "journal.jsonl")
    assert digests_of(finished) == expected(name)["digests"]
    assert_verified(run_dir, ITERATIONS)
    assert export(run_dir, tmp_path / "out") == expected(name)["finished"]
    train(name, run_dir, *OVERRIDES[name])
    assert (run_dir / "journal.jsonl").read_bytes() == finished.read_bytes()


def test_a_run_goes_on_to_the_end_that_it_had(continued, tmp_path):
    name, run_dir = continued
    assert_went_on(name, run_dir)
    assert_ends_as(run_dir / "journal.jsonl", FIXTURES / name / "finished.jsonl", name=name)
    assert export(run_dir, tmp_path / "out") == expected(name)["finished"]


def test_a_run_ends_as_one_that_begins_anew(continued, tmp_path):
    (name, run_dir), new = continued, tmp_path / "new"
    train(name, new, "parallel.backend=single", config=changed_file(name, tmp_path, in_new_words))
    assert_ends_as(new / "journal.jsonl", run_dir / "journal.jsonl", name=name)
    assert export(new, tmp_path / "a") == export(run_dir, tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("plain", "es.schedule", "cosine", r'es\.(alpha_)?schedule: the run has "linear"'),
        ("batched", "es.schedule", "linear", r'es\.(alpha_)?schedule: the run has "cosine"'),
        ("batched", "rollout.mode", "members", r"rollout\.members_per_forward: the run has 2"),
    ],
    ids=["linear", "cosine", "batched"],
)
def test_another_value_of_an_old_key_is_refused(name, key, value, message, tmp_path):
    section, key = key.split(".")
    config = changed_file(name, tmp_path, lambda tree: tree[section].update({key: value}))
    run_dir = install(name, tmp_path)
    before = contents(run_dir)
    result = call("train", "--config", config, f"run.dir={run_dir}", "parallel.backend=single")
    assert (result.returncode, result.stderr.count("the run has")) == (2, 1), result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert contents(run_dir) == before


@each_run
def test_a_run_is_looked_at(name, tmp_path):
    run_dir = install(name, tmp_path)
    journal = run_dir / "journal.jsonl"
    assert succeed("shardes", "journal", run_dir, "--json") == journal.read_text()
    table, known = succeed("shardes", "journal", run_dir), len(records_of(journal, "member"))
    population = len(rewards_of(FIXTURES / name / "finished.jsonl")) // ITERATIONS
    assert f"{known - DONE * population} of its members are known" in table
    assert all(digest in table for digest in digests_of(journal).values())
    assert f"{DONE} of {ITERATIONS}" in succeed("shardes", "watch", run_dir, "--once")
    export(run_dir, tmp_path / "out", "--iteration", 2)
    models = [f"{run_dir}@2"], [tmp_path / "out", "--config", FIXTURES / name / "user.yaml"]
    more = ["parallel.backend=single", "--trust-remote-code"]  # for rewards that the run names
    found = [succeed("shardes", "evaluate", "--model", *each, *more) for each in models]
    assert json.loads(found[0])["sets"] == json.loads(found[1])["sets"]
    pytest.importorskip("matplotlib")
    assert "reward.svg" in succeed("shardes", "plot", run_dir, "--out", tmp_path / "reward.svg")


@pytest.mark.slow
@each_run
def test_the_scripts_go_on_with_a_run(name, tmp_path):
    run_dir = install(name, tmp_path)
    command = ["launch/train.py", "--config", FIXTURES / name / "user.yaml", f"run.dir={run_dir}"]
    if name == "plain":
        pytest.importorskip("deepspeed")
        output = run_ranks(command, world_size=2, log_dir=tmp_path / "logs")
    else:
        result = run_command([sys.executable, *command])
        output = result.stdout + result.stderr
        assert result.returncode == 0, output
    if has_new_words():  # the old ones are told of once
        assert output.count("es.schedule") == 1, output
        assert "rollout.mode" in output, output
    for arguments in (["verify", run_dir], ["export", run_dir, tmp_path / "out", "--iteration", DONE]):
        result = run_command([sys.executable, "-m", "shardes", *arguments])
        assert result.returncode == 0, result.stdout + result.stderr
    assert hashes_of(tmp_path / "out") == expected(name)["stopped"]
    assert_went_on(name, run_dir)
    assert_ends_as(run_dir / "journal.jsonl", FIXTURES / name / "finished.jsonl", name=name)
