"""What the files in launch/ start."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from runpy import run_path

import pytest

from tests.helpers.ranks import ROOT

SCRIPT = ROOT / "launch" / "slurm.sbatch"
# Stand-ins: srun writes down what it was to start and does as SRUN_DOES says; scancel ends it.
STAND_INS = {
    "scontrol": """
        echo "scontrol $*" >> "$CALLS"
        if [ "$1 $2" = "show hostnames" ]; then echo node7; echo node8; fi
    """,
    "scancel": """
        echo "scancel $*" >> "$CALLS"
        kill -TERM "$(cat "$PID")"
    """,
    "srun": """
        echo "$$" > "$PID"
        environment="$TORCH_DISABLE_SHARE_RDZV_TCP_STORE $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
        printf '%s\\n' "$environment" "$@" > "$STARTED.new"
        mv "$STARTED.new" "$STARTED"
        eval "$SRUN_DOES"
    """,
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the script as Slurm's first node would; returns how it ended and what it called."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, body in STAND_INS.items():
        path = bin_dir / name
        path.write_text(f"#!/usr/bin/env bash\n{body}")
        path.chmod(0o755)
    files = {name: str(tmp_path / name.lower()) for name in ("CALLS", "PID", "STARTED")}

    def run(*arguments, srun_does, time_is_up=False):
        for file in files.values():
            Path(file).unlink(missing_ok=True)
        env = {
            "PATH": f"{bin_dir}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SRUN_DOES": srun_does,
        } | files
        process = subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            if time_is_up:
                deadline = time.monotonic() + 20
                while not Path(files["STARTED"]).exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                process.send_signal(signal.SIGUSR1)
            output, _ = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        calls, started = (
            Path(files[name]).read_text().splitlines() if Path(files[name]).exists() else []
            for name in ("CALLS", "STARTED")
        )
        return process.returncode, output, calls, started

    return run


# Like torchrun under a signal: its ranks stop, and it ends with 1.
UNTIL_TERM = "trap 'exit 1' TERM; while :; do sleep 0.05; done"


def test_slurm_starts_torchrun_on_every_node(slurm):
    status, output, calls, started = slurm("--config", "a file.yaml", "es.sigma=0.1", srun_does="exit 0")
    assert status == 0, output
    environment, *arguments = started
    assert environment == "1 270"
    first, script, *given = (
        arguments[: arguments.index("launch/train.py")],
        "launch/train.py",
        *arguments[arguments.index("launch/train.py") + 1 :],
    )
    assert first == [
        *(
            "--kill-on-bad-exit=1",
            "torchrun",
            "--nnodes",
            "2",
            "--nproc-per-node",
            "8",
            "--max-restarts",
            "3",
        ),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:23456", "--rdzv-id", "123456"),
    ]
    # What the user gives comes last, and so counts.
    assert given == ["run.stop_seconds=240", "--config", "a file.yaml", "es.sigma=0.1"]
    assert (ROOT / script).is_file()
    assert calls == ["scontrol show hostnames node[7-8]"]


def test_slurm_stops_and_requeues_when_the_time_is_up(slurm):
    status, output, calls, _ = slurm("--config", "a.yaml", srun_does=UNTIL_TERM, time_is_up=True)
    assert status == 0, output
    assert calls[1:] == ["scancel --signal=TERM 123456", "scontrol requeue 123456"]
    assert "queued again" in output


def test_slurm_does_not_requeue_what_has_finished_or_failed(slurm):
    finishes = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
    status, _, calls, _ = slurm("--config", "a.yaml", srun_does=finishes, time_is_up=True)
    assert (status, calls[1:]) == (0, ["scancel --signal=TERM 123456"])
    status, _, calls, _ = slurm("--config", "a.yaml", srun_does="exit 3")
    assert (status, calls[1:]) == (3, [])
    status, output, calls, started = slurm(srun_does="exit 0")
    assert (status, calls, started) == (2, [], [])
    assert "--config FILE" in output


def test_torchrun_knows_what_it_is_given():
    from torch.distributed.run import get_args_parser

    text = SCRIPT.read_text()
    options = re.search(r"torchrun \\\n(.*?)launch/train\.py", text, re.DOTALL)[1].replace("\\\n", " ")
    found = get_args_parser().parse_args([*shlex.split(options.replace("$", "")), "launch/train.py"])
    assert (found.rdzv_backend, found.max_restarts, found.training_script) == ("c10d", 3, "launch/train.py")


def test_documented_commands_are_of_files_that_exist():
    text = (ROOT / "launch" / "multi-node.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    for block in [*blocks, SCRIPT.read_text(), (ROOT / "launch" / "hostfile").read_text()]:
        for name in re.findall(r"(?:configs|launch)/[\w./-]+\w", block):
            assert (ROOT / name).is_file(), name
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "launch" / target).exists(), target


def test_torchruns_documented_commands_can_be_parsed():
    from torch.distributed.run import get_args_parser

    text = (ROOT / "launch" / "multi-node.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^torchrun (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        found = get_args_parser().parse_args(shlex.split(command, comments=True))
        assert (found.nnodes, found.nproc_per_node, found.training_script) == ("2", "8", "launch/train.py")


def test_accelerates_documented_command_can_be_parsed():
    launch = pytest.importorskip("accelerate.commands.launch")
    text = (ROOT / "launch" / "multi-node.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^accelerate launch (.*)$", text, re.MULTILINE)
    found = launch.launch_command_parser().parse_args(shlex.split(command))
    assert (found.num_machines, found.num_processes, found.training_script) == (2, 16, "launch/train.py")


@pytest.mark.slow
def test_deepspeed_reads_the_hostfile():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert dict(runner.fetch_hostfile(str(ROOT / "launch" / "hostfile"))) == {"node1": 8, "node2": 8}


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        ("train", ["--config", "no.yaml"], "--config no.yaml: cannot be read"),
        ("evaluate", ["--model", "no/model"], "no/model"),
    ],
)
def test_the_scripts_are_the_commands(monkeypatch, capsys, script, arguments, complaint):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run_path(str(ROOT / "launch" / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err
