"""Ranks that raise, hang, die, disagree or are told to stop: the job ends as a whole and loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import ROOT, environment, free_port, run_command

SCRIPTS = Path(sys.executable).parent
FAREWELL = "nothing is lost: resume with the same command"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


def write_config(root, model, **changes):
    root.mkdir(parents=True, exist_ok=True)
    path = root / "config.yaml"
    settings = {"es__iterations": 6} | changes
    path.write_text(yaml.safe_dump(tree(root, model=model, run_dir=root / "run", **settings)))
    return path


def finish(config, run_dir, *overrides):
    """Goes on in one process; returns what the run ends with."""
    result = call("train", "--config", config, f"run.dir={run_dir}", "parallel.backend=single", *overrides)
    assert result.returncode == 0, result.stderr
    export = run_dir.with_name(f"{run_dir.name}-export")
    assert call("shardes", "export", run_dir, export).returncode == 0
    return fingerprint(export)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model):
    """What a run of six iterations ends with that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed")
    return finish(write_config(root, model), root / "run")


# Kind, on which rank, at which call, changes, exit statuses, what is said once and last.
FAULTS = {
    # Members are handed out, so no rank is in a collective with the one that fails.
    "raise-members": ("raise", 1, 5, {}, [1, 1], r"rank 1 failed:(?s:.*)ArithmeticError: this rank has"),
    "raise-rank-0": ("raise", 0, 5, {}, [1, 1], r"rank 0 failed:(?s:.*)ArithmeticError: this rank has"),
    # All ranks of a replica share each member's prompts, and are in collectives with the one that fails.
    "raise-prompts": (
        *("raise", 1, 5, {"rollout__gather": "member", "parallel__backend": "fsdp"}),
        *([1, 1], r"rank 1 failed:(?s:.*)ArithmeticError: this rank has miscounted"),
    ),
    "die": ("die", 1, 5, {}, [1, -9], r"rank\(s\) 1 ended without a word"),
    "die-rank-0": ("die", 0, 5, {}, [-9, 1], r"rank\(s\) 0 ended without a word"),
    "hang": (
        *("hang", 1, 5, {"parallel__timeout_seconds": 3, "eval__every": 0}),
        *([1, 1], r"no member's result for 3 s \(parallel\.timeout_seconds\), and 1 of 2 groups"),
    ),
    "hang-prompts": (
        *(
            "hang",
            1,
            5,
            {"parallel__timeout_seconds": 3, "rollout__gather": "member", "parallel__backend": "fsdp"},
        ),
        *([1, 1], r"rank 0 failed:(?s:.*)timed out waiting for another rank \(parallel\.timeout_seconds\)"),
    ),
    "freeze": (
        *("freeze", 1, 5, {"parallel__timeout_seconds": 3, "rollout__gather": "layer"}),
        *([1, 1], r"rank\(s\) 1 gave no sign of life for \d s \(parallel\.timeout_seconds: 3\)"),
    ),
    "freeze-rank-0": (
        *("freeze", 0, 5, {"parallel__timeout_seconds": 3, "rollout__gather": "iteration"}),
        *([1, 1], r"rank\(s\) 0 gave no sign of life for \d s \(parallel\.timeout_seconds: 3\)"),
    ),
    "interrupt": ("interrupt", 1, 5, {}, [130, 130], "interrupted; go on with the same command"),
    "prompts": (
        *("prompts", 1, 2, {}, [1, 1]),
        r"the ranks of the job disagree(?s:.*)prompts: \w{16} on rank\(s\) 0, \w{16} on rank\(s\) 1\.",
    ),
    "corrupt": (
        *("corrupt", 1, 1, {}, [1, 1]),
        r"replicas hold different weights(?s:.*)\w{16} in replica 0, \w{16} in replica 1",
    ),
    "corrupt-later": (
        *("corrupt", 1, 1, {"run__check_every": 4}, [1, 1]),
        r"replicas hold different weights(?s:.*)\w{16} in replica 0, \w{16} in replica 1",
    ),
    "stop": ("stop", 1, 5, {}, [0, 0], f"stopped by SIGUSR1; {FAREWELL}"),
    "stop-prompts": (
        *("stop", 1, 5, {"rollout__gather": "member", "parallel__backend": "fsdp"}),
        *([0, 0], f"stopped by SIGUSR1; {FAREWELL}"),
    ),
    "slow-stop": ("slow_stop", 1, 5, {"run__stop_seconds": 1}, [0, 0], f"stopped by SIGTERM; {FAREWELL}"),
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory, model):
    """All cases, run by one process; by name, the directory and what was found."""
    root = tmp_path_factory.mktemp("faults")
    cases = []
    for name, (kind, rank, number, changes, *_) in FAULTS.items():
        config = write_config(root / name, model, **({"parallel__timeout_seconds": 600} | changes))
        fault = {"kind": kind, "rank": rank, "call": number}
        cases.append({"config": str(config), "world_size": 2, "fault": fault})
    config = write_config(root / "seeds", model)
    cases.append(
        {
            "config": str(config),
            "world_size": 2,
            "fault": None,
            "overrides": {"1": ["es.seed=1", "eval.every=1"]},
        }
    )
    path = root / "cases.json"
    path.write_text(json.dumps(cases))
    script = [sys.executable, "-m", "tests.helpers.fault_cases", path]
    result = run_command(script, timeout_seconds=280)
    assert result.returncode == 0, result.stderr
    found = json.loads(path.with_name("cases.json.found").read_text())
    return {name: (root / name, each) for name, each in zip([*FAULTS, "seeds"], found, strict=True)}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FAULTS)
def test_a_job_ends_as_a_whole_says_why_once_and_goes_on_without_loss(faults, undisturbed, name):
    root, found = faults[name]
    *_, statuses, words = FAULTS[name]
    assert found["statuses"] == statuses, found["output"]
    said = [*re.finditer(words, found["output"])]
    # A frozen rank 0 repeats it when it runs again.
    assert len(said) == 1 + (name == "freeze-rank-0"), found["output"]
    assert not re.search(r"\d\d:\d\d:\d\d \[rank", found["output"][said[0].start() :]), "it is said last"
    assert found["output"].count("Traceback") == ("failed" in found["output"]), "of the first failure alone"
    assert finish(root / "config.yaml", root / "run") == undisturbed


@pytest.mark.slow
def test_ranks_with_other_settings_are_refused_before_anything_is_written(faults):
    root, found = faults["seeds"]
    assert found["statuses"] == [1, 1]
    for key in ("es.seed", "eval.every"):
        assert re.search(rf"{key}: \w{{16}} on rank\(s\) 0, \w{{16}} on rank\(s\) 1", found["output"])
    assert "es.sigma" not in found["output"]
    assert not (root / "run").exists()


def start(command, log):
    """A command in a session of its own."""
    path = {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"}  # deepspeed looks for its own commands on the path
    return subprocess.Popen(
        [str(word) for word in command],
        env=environment(**path),
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )


def processes_with(word):
    """The processes whose command line has a word that only this test's have."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(str(word).encode() in part for part in command):
                found.append((int(entry.name), b" ".join(command).decode()))
    return found


def workers_with(word):
    """Those of them that are ranks."""
    ranks = [
        pid for pid, command in processes_with(word) if command.split()[1:3] == ["-u", "launch/train.py"]
    ]
    return sorted(ranks)


def wait_for(condition, log, *, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.02)


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture
def launched(tmp_path):
    """Starts a launcher; whatever it leaves behind is killed at the end."""
    log = tmp_path / "log.txt"

    def launch(words):
        with log.open("ab") as stream:
            return start(words, stream), log

    yield launch
    for pid, _ in processes_with(tmp_path):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_sigterm_to_the_deepspeed_launcher_leaves_no_worker_and_loses_nothing(tmp_path, model, launched):
    pytest.importorskip("deepspeed")
    config = write_config(tmp_path, model, es__iterations=100_000, eval__every=0)
    journal = tmp_path / "run" / "journal.jsonl"
    port = str(free_port())
    deepspeed = [SCRIPTS / "deepspeed", "--num_gpus", "2", "--master_port", port, "launch/train.py"]
    process, log = launched([*deepspeed, "--config", config, "parallel.backend=fsdp"])
    wait_for(lambda: num_lines(journal) > 20 or process.poll() is not None, log)
    assert len(processes_with(tmp_path)) == 4, "two ranks, and the launcher's two processes"
    # The first of these has no handler for the signal, and the second does not notice the first one's end.
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    wait_for(lambda: not processes_with(tmp_path), log, seconds=30)
    output = log.read_text()
    assert output.count(FAREWELL) == 1, output
    assert output.count("exits successfully") == 2, output
    done = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] + 1
    goal = f"es.iterations={done + 2}"
    assert finish(config, tmp_path / "run", goal) == finish(config, tmp_path / "undisturbed", goal)


@pytest.mark.slow
@pytest.mark.exhaustive  # test_two_hosts.py has torchrun's agent do the same
def test_torchrun_goes_on_by_itself_after_a_worker_was_killed(tmp_path, model, launched):
    config = write_config(tmp_path, model, es__iterations=30, eval__every=0)
    journal = tmp_path / "run" / "journal.jsonl"
    torchrun = [SCRIPTS / "torchrun", "--nproc-per-node", "2", "--max-restarts", "1", "launch/train.py"]
    process, log = launched([*torchrun, "--config", config, "parallel.backend=fsdp"])
    wait_for(lambda: num_lines(journal) > 20 or process.poll() is not None, log)
    os.kill(workers_with(tmp_path)[1], signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()
    output = log.read_text()
    assert output.count("rank(s) 1 ended without a word") == 1, output
    assert finish(config, tmp_path / "run") == finish(config, tmp_path / "undisturbed")
