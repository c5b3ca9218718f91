"""Copies of the runs in tests/fixtures, commands on them, and what their journals say."""

import functools
import json
import shutil

import yaml

from shardes.runs.journal import _seal
from tests.fixtures.make_fixtures import hashes_of
from tests.helpers.inprocess import call
from tests.helpers.ranks import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "e070420"


@functools.cache
def has_new_words():
    return "--max-shard-size" in call("shardes", "export", "--help").stdout


def in_new_words(tree):
    """Rename the keys of a user's file, if this code knows their new names."""
    if not has_new_words():
        return
    mode, members = tree["rollout"].pop("mode"), tree["rollout"].pop("members_per_forward")
    tree["rollout"] |= {"gather": "iteration", "members_per_forward": members if mode == "batched" else 1}
    tree["es"]["alpha_schedule"] = tree["es"].pop("schedule")
    if "log" in tree:
        tree["log"]["report_to"] = tree["log"].pop("to")


def changed_file(name, tmp_path, change):
    """Return a copy of the user's file in which a function has changed the tree."""
    tree = yaml.safe_load((FIXTURES / name / "user.yaml").read_text())
    change(tree)
    (tmp_path / "user.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "user.yaml"


def install(name, tmp_path, *, root=FIXTURES):
    """Return a copy of the run directory as the kill left it, with this machine's paths."""
    run_dir = shutil.copytree(root / name / "run", tmp_path / "run")
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("{REPOSITORY}", str(ROOT)))
    return run_dir


def reseal(path, change):
    """Change each record of a journal by a function, and seal all of them anew."""
    link, lines = "", []
    for line in path.read_bytes().splitlines():
        record = json.loads(line)
        del record["checksum"]
        change(record)
        sealed, link = _seal(record, link)
        lines.append(sealed + b"\n")
    path.write_bytes(b"".join(lines))


def succeed(*arguments):
    result = call(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def train(name, run_dir, *overrides, config=None):
    config = config or FIXTURES / name / "user.yaml"
    succeed("train", "--config", config, f"run.dir={run_dir}", *overrides)


def export(run_dir, out, *arguments):
    succeed("shardes", "export", run_dir, out, *arguments)
    return hashes_of(out)


def assert_verified(run_dir, num_iterations, *arguments):
    found = succeed("shardes", "verify", run_dir, *arguments)
    assert f"{num_iterations} iterations replayed, {num_iterations + 1} digests compared" in found


def expected(name):
    return json.loads((FIXTURES / name / "expected.json").read_text())


def records_of(journal, kind):
    return [record for record in map(json.loads, journal.read_text().splitlines()) if record["type"] == kind]


def digests_of(journal):
    return {str(record["iteration"]): record["digest"] for record in records_of(journal, "weights")}


def rewards_of(journal):
    """Return rewards by iteration and member, of which each must be there once."""
    records = records_of(journal, "member")
    rewards = {(record["iteration"], record["member"]): record["reward"] for record in records}
    assert len(rewards) == len(records)
    return rewards


def contents(run_dir):
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
