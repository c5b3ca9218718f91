"""The commands of launch/multi-node.md and launch/slurm.sbatch, on two hosts with the names that they use."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import yaml

from tests.helpers.exports import fingerprint
from tests.helpers.hosts import Hosts, why_not
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import ROOT, environment


def why_no_names():
    """Why hosts can have no names here; None if they can."""
    try:
        command = ["unshare", "--uts", "bash", "-c", "hostname node1 && hostname -I"]
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"a host cannot be named here: {error}"
    return None


WHY_NOT = why_not() or why_no_names()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
NAMES = ("node1", "node2")


@pytest.fixture
def hosts():
    """Two hosts that know each other by name; ``ip netns exec`` gives each its own /etc/hosts."""
    with Hosts(f"named{os.getpid()}") as hosts, ExitStack() as stack:
        for name in hosts.names:
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder)
            lines = [f"{at} {name}\n" for at, name in zip(hosts.addresses, NAMES, strict=True)]
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        yield hosts


ON_HOST = """#!/usr/bin/env bash
# on N COMMAND...: on host N (from 0), which has a name of its own.
names=({names}); name=${{names[$1]}}; host=node$(($1 + 1)); shift
exec ip netns exec "$name" unshare --uts bash -c 'hostname "$0" && exec "$@"' "$host" "$@"
"""
# What is missing here: remote shells, and Slurm.
STAND_INS = {
    "ssh": """
        while [[ $1 != node? ]]; do shift; done
        number=$((${1#node} - 1)); shift
        exec on $number bash -c "$*"
    """,
    "pdsh": """
        while [ "$1" != -w ]; do shift; done; shift 2
        for number in 0 1; do on $number bash -c "${*//%n/$number}" & done
        wait -n && wait -n
    """,
    "scontrol": 'if [ "$1 $2" = "show hostnames" ]; then echo node1; echo node2; fi',
    # A site may bind each task to a core, which all ranks of the node would share.
    "srun": """
        [[ " $* " = *" --cpu-bind=none "* ]] || exit 77
        while [[ $1 = --* ]]; do shift; done
        for number in 0 1; do on $number "$@" & done
        wait -n && wait -n
    """,
}


@pytest.fixture
def run_on_hosts(hosts, tmp_path):
    """Runs commands on hosts to their ends, the first on the first; returns what was printed."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "on").write_text(ON_HOST.format(names=" ".join(hosts.names)))
    for name, body in STAND_INS.items():
        (bin_dir / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    for path in bin_dir.iterdir():
        path.chmod(0o755)
    path = f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(*commands, **variables):
        with (tmp_path / "log").open("w+") as log, ExitStack() as stack:
            processes = []
            for number, command in enumerate(commands):
                process = subprocess.Popen(
                    [bin_dir / "on", str(number), *command],
                    env=environment(PATH=path, **variables),
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                stack.callback(end_group, process)
                processes.append(process)
            statuses = [process.wait(200) for process in processes]
            log.seek(0)
            output = log.read()
        assert statuses == [0] * len(commands), output
        return output

    return run


def end_group(process):
    """Kills what a command has left running, with those that wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def documented(first_word):
    """The page's commands for two nodes, with the numbers and files of this test in place of theirs."""
    text = (ROOT / "launch" / "multi-node.md").read_text().replace("\\\n", " ")
    found = [
        shlex.split(line, comments=True) for line in re.findall(rf"^{first_word}.*$", text, re.MULTILINE)
    ]
    assert found
    return found


def with_files(command, config):
    """A documented command for one rank a node and a configuration of the test."""
    command = list(command)
    for option, value in (
        ("--nproc-per-node", "1"),
        ("--num_processes", "2"),
        ("--config", str(config)),
    ):
        if option in command:
            command[command.index(option) + 1] = value
    return command


@pytest.fixture
def job(tmp_path):
    """A configuration, and what its run ends as on one process."""
    model = tiny_model(tmp_path / "model", tied=True)
    settings = {"es__iterations": 3, "parallel__backend": "fsdp"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / "run", **settings)))
    return config


def check_result(config, output, *, backend="fsdp"):
    """Both hosts took part, and the weights are those of one process."""
    assert output.count(f"{backend} on 2 rank(s)") == 1, output
    root = config.parent
    alone = [f"run.dir={root / 'alone'}", "parallel.backend=single"]
    assert call("train", "--config", config, *alone).returncode == 0
    for name in ("run", "alone"):
        assert call("shardes", "export", root / name, root / f"{name}-export").returncode == 0
    assert fingerprint(root / "run-export") == fingerprint(root / "alone-export")


@pytest.mark.exhaustive
def test_torchrun_with_numbered_nodes(run_on_hosts, job):
    first = with_files(documented("torchrun")[1], job)
    second = list(first)
    second[second.index("--node-rank") + 1] = "1"
    check_result(job, run_on_hosts(first, second))


def test_slurm_starts_ranks_that_meet(run_on_hosts, job):
    """With the options of the page's first command for torchrun."""
    command = ["bash", "launch/slurm.sbatch", *with_files(documented("sbatch")[0], job)[-2:]]
    of_slurm = {"JOB_ID": "123456", "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "1"}
    check_result(job, run_on_hosts(command, **{f"SLURM_{key}": value for key, value in of_slurm.items()}))


def test_deepspeed_starts_the_other_nodes(run_on_hosts, job, tmp_path):
    text = (ROOT / "launch" / "hostfile").read_text()
    (tmp_path / "hostfile").write_text(text.replace("slots=8", "slots=1"))
    command = with_files(documented("deepspeed")[0], job)
    command[command.index("--hostfile") + 1] = str(tmp_path / "hostfile")
    check_result(job, run_on_hosts([*command, "parallel.backend=zero3"]), backend="zero3")


@pytest.mark.exhaustive
def test_torchrun_where_nodes_meet_by_themselves(run_on_hosts, job):
    command = with_files(documented("torchrun")[0], job)
    check_result(job, run_on_hosts(command, command))


@pytest.mark.exhaustive
def test_accelerate(run_on_hosts, job):
    first = with_files(documented("accelerate")[0], job)
    second = list(first)
    second[second.index("--machine_rank") + 1] = "1"
    check_result(job, run_on_hosts(first, second))


@pytest.mark.exhaustive
def test_evaluation_takes_the_same_launcher(run_on_hosts, job):
    command = with_files(documented("torchrun")[0], job)
    output = run_on_hosts(command, command)
    at = command.index("launch/train.py")
    model = str(job.parent / "run")
    command = [*command[:at], "launch/evaluate.py", "--model", model, *command[at + 1 :]]
    output = run_on_hosts(command, command)
    assert output.count("fsdp on 2 rank(s)") == 1, output
