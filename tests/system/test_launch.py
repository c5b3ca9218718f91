"""What the files in launch/ start."""

import json
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
import yaml

from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import ROOT, environment

SCRIPT = ROOT / "launch" / "slurm.sbatch"
# Stand-ins: srun writes down what it was to start and does as SRUN_DOES says; scancel ends it.
STAND_INS = {
    "scontrol": """
        echo "scontrol $*" >> "$CALLS"
        if [ "$1 $2" = "show hostnames" ]; then echo "$HOST"; echo node8; fi
    """,
    "scancel": """
        echo "scancel $*" >> "$CALLS"
        kill -TERM -- "$(cat "$PID")"
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

    def run(*arguments, srun_does, is_time_up=None, **variables):
        for file in files.values():
            Path(file).unlink(missing_ok=True)
        env = {
            "PATH": f"{bin_dir}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SRUN_DOES": srun_does,
            "HOST": "node7",
        }
        env = environment(**(env | files | variables))
        process = subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            if is_time_up is not None:
                deadline = time.monotonic() + 60
                while not is_time_up() and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                process.send_signal(signal.SIGUSR1)
            output, _ = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                if Path(files["PID"]).exists():  # of a group of its own, perhaps
                    os.kill(int(Path(files["PID"]).read_text()), signal.SIGKILL)
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
    variables, *arguments = started
    assert variables == "1 270"
    first, script, *given = (
        arguments[: arguments.index("launch/train.py")],
        "launch/train.py",
        *arguments[arguments.index("launch/train.py") + 1 :],
    )
    assert first == [
        *(
            "--kill-on-bad-exit=1",
            "--cpu-bind=none",
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


def test_slurm_stops_and_requeues_when_the_time_is_up(slurm, tmp_path):
    status, output, calls, _ = slurm(
        "--config", "a.yaml", srun_does=UNTIL_TERM, is_time_up=(tmp_path / "started").exists
    )
    assert status == 0, output
    assert calls[1:] == ["scancel --signal=TERM 123456", "scontrol requeue 123456"]
    assert "queued again" in output


def test_slurm_does_not_requeue_what_has_finished_or_failed(slurm, tmp_path):
    finishes = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
    status, _, calls, _ = slurm(
        "--config", "a.yaml", srun_does=finishes, is_time_up=(tmp_path / "started").exists
    )
    assert (status, calls[1:]) == (0, ["scancel --signal=TERM 123456"])
    status, _, calls, _ = slurm("--config", "a.yaml", srun_does="exit 3")
    assert (status, calls[1:]) == (3, [])
    status, output, calls, started = slurm(srun_does="exit 0")
    assert (status, calls, started) == (2, [], [])
    assert "--config FILE" in output


@pytest.mark.exhaustive
def test_a_requeued_job_ends_like_an_undisturbed_one(slurm, tmp_path):
    """With a real torchrun and two ranks, all of which get the signal, as those of a step do."""
    model = tiny_model(tmp_path / "m", tied=True)
    in_a_group = 'shift; setsid "$@" & echo "-$!" > "$PID"; wait $!'
    variables = {"HOST": "127.0.0.1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}

    def start(name, **more):
        changes = {"parallel__backend": "fsdp", "es__iterations": 150, "eval__every": 0}
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / name, **changes)))
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return slurm("--config", config, srun_does=in_a_group, PATH=path, **variables, **more)

    metrics = tmp_path / "run" / "metrics.jsonl"
    status, output, calls, _ = start(
        "run", is_time_up=lambda: metrics.exists() and len(metrics.read_bytes()) > 0
    )
    assert status == 0, output
    assert calls[-1] == "scontrol requeue 123456"
    assert output.count("nothing is lost: resume with the same command") == 1, output
    num_done = len(metrics.read_text().splitlines())
    assert 0 < num_done < 150
    for name in ("run", "undisturbed"):
        status, output, calls, _ = start(name)
        assert (status, len(calls)) == (0, 1), output
    last, wanted = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("run", "undisturbed")
    )
    assert last["iteration"] == 150
    assert last["weights_digest"] == wanted["weights_digest"]


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
