"""A process that has imported the heavy libraries once, and forks ranks: a rank then starts in milliseconds.

Importing torch, transformers and deepspeed costs a rank eight seconds of a core, more than what it tests.
Forks are processes like any other; only their imports are inherited.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tools.gpu_check.processes import PRELOADED, become, preload

# What a rank needs; it imports by itself what is not installed or not listed.
NEEDED = ("shardes.export.writer", *PRELOADED, "tests.helpers.preload_vllm")


class Rank:
    """A forked process, with the part of ``subprocess.Popen`` that tests use."""

    def __init__(self, nursery, pid):
        self._nursery = nursery
        self.pid = pid
        self.returncode = None

    def poll(self):
        if self.returncode is None:
            self.returncode = self._nursery.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout=None):
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"rank process {self.pid}", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def kill_group(self):
        """Kills it and what it started."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its session yet, so it has started nothing
                self.kill()


class Nursery:
    """Talks to the process that forks; it ends with this one.

    Args:
        env: The environment that its imports see.
        cwd: Where it and its forks start.
    """

    def __init__(self, *, env, cwd):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.nursery"],
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(self.close)

    def start(self, arguments, *, env, log):
        """Runs a Python script in a fork, in a session of its own."""
        return Rank(self, self.ask({"start": [str(a) for a in arguments], "env": env, "log": str(log)}))

    def ask(self, request):
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait(10)


def main():
    # The libraries may print; what they print is nobody's answer.
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    preload(NEEDED)
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                become_rank(request)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def become_rank(request):
    """In the fork: runs the program as the interpreter would have, and ends."""
    words = request["start"]
    if words[0] != "-m":
        sys.path[0] = str(Path(words[0]).parent.absolute())
    become(words, env=request["env"], log=Path(request["log"]), is_leader=True)


if __name__ == "__main__":
    main()
