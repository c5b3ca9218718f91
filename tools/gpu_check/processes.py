"""Start Python programs as processes that can be ended with all that they started.

On GPUs each is a fresh interpreter. A rehearsal forks: a fork has the imports of this process, which take
longer than anything else that is rehearsed. Where CUDA may have been initialised, forking is not possible.
"""

import contextlib
import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

# What parts import; a fork then has it.
PRELOADED = (
    "shardes.trainer",
    "shardes.cli",
    "shardes.backends.single",
    "shardes.backends.fsdp",
    "shardes.backends.tensor_parallel",
    "shardes.backends.zero3",
    "deepspeed",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
)
# How the names of what launchers set begin.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_", "WORLD_SIZE", "CROSS_", "MASTER_", "TORCHELASTIC", "GROUP_")
_POLL_SECONDS = 0.02


class Process:
    """Process of a Python program.

    Args:
        arguments: Path of a script, or ``-m`` and a module, and its arguments.
        env: Environment.
        log: File that its output is appended to.
        forks: True to fork this process instead of starting an interpreter.
        is_leader: True to make it the leader of a process group, which ``kill_group`` ends.
    """

    def __init__(
        self, arguments: Sequence[Any], *, env: dict[str, str], log: Path, forks: bool, is_leader: bool = True
    ) -> None:
        self.returncode: int | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        words = [str(word) for word in arguments]
        sys.stdout.flush()
        if forks:
            self.pid = os.fork()
            if self.pid == 0:
                become(words, env=env, log=log, is_leader=is_leader)
        else:
            with log.open("ab") as stream:
                self._popen = subprocess.Popen(
                    [sys.executable, *words],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=is_leader,
                )
            self.pid = self._popen.pid

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        if self._popen is not None:
            self.returncode = self._popen.poll()
        elif self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, seconds: float) -> int | None:
        """Wait for the end; return the exit status, or None after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return self.returncode

    def kill(self) -> None:
        """Kill it alone."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def kill_group(self) -> None:
        """Kill it and what it started, if it is the leader of a group, and wait for its end."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.kill()
            self.wait(10)


def become(words: list[str], *, env: dict[str, str], log: Path, is_leader: bool) -> NoReturn:
    """Run a program in this fork as an interpreter would, and end the process.

    Args:
        words: Path of a script, or ``-m`` and a module, and its arguments.
        env: Environment.
        log: File that its output is appended to.
        is_leader: True to make it the leader of a session.
    """
    status = 1
    try:
        if is_leader:
            os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, target in enumerate((nothing, out, out)):
            os.dup2(target, number)
        os.environ.clear()
        os.environ.update(env)
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def preload(names: Sequence[str] = PRELOADED) -> None:
    """Import modules for forks to have; without what is not installed."""
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


class Ranks:
    """Ranks of a job, started without a launcher; they end with the context.

    Args:
        arguments: Program and arguments, the same for all ranks.
        num_ranks: Number of ranks.
        folder: Directory of their logs.
        forks: As of ``Process``.
    """

    def __init__(self, arguments: Sequence[Any], *, num_ranks: int, folder: Path, forks: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = str(_free_port())
        self._logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
        self.processes = []
        kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
        for rank, log in enumerate(self._logs):
            log.unlink(missing_ok=True)
            env = kept | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(num_ranks)}
            # They stay in the group of this process, so that they end with it when its time is over.
            self.processes.append(Process(arguments, env=env, log=log, forks=forks, is_leader=False))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait(10)

    def wait(self, seconds: float, *, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Wait for ranks, or all of them; return their exit statuses, None for those that still run."""
        deadline = time.monotonic() + seconds
        chosen = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in chosen]

    def output(self) -> str:
        """Return what the ranks have printed."""
        texts = [log.read_text(errors="replace") if log.exists() else "" for log in self._logs]
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(texts))


def run_ranks(arguments: Sequence[Any], *, num_ranks: int, folder: Path, forks: bool, seconds: float) -> str:
    """Run a program on some ranks to its end; return what they printed.

    Raises:
        RuntimeError: A rank failed, or did not end in time.
    """
    with Ranks(arguments, num_ranks=num_ranks, folder=folder, forks=forks) as ranks:
        statuses = ranks.wait(seconds)
        output = ranks.output()
    if any(statuses) or None in statuses:
        print(output[-8000:])
        raise RuntimeError(f"exit statuses {statuses} on {num_ranks} ranks: {_last_error(output)}")
    return output


def _last_error(output: str) -> str:
    """Return the last line of an output that names an error."""
    lines = [line.strip() for line in output.splitlines() if "Error" in line]
    return lines[-1][:300] if lines else "no message"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
