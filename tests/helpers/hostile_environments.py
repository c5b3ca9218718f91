"""Environments that do what environments should not; light, because worker processes import them.

What a completion asks for is done in ``step``, and a row's ``do`` in ``reset``.
"""

import asyncio
import gc
import json
import os
import random
import signal
import struct
import sys
import threading
import time
from pathlib import Path

CLOSED = []


def find_connection():
    """The worker's socket to its pool."""
    return next(o for o in gc.get_objects() if type(o).__name__ == "_Worker")._connection


class Hostile:
    def __init__(self, scale=1.0):
        self.scale = scale
        self.num_turns = 0

    def reset(self, start, do="", **row):
        random.seed(start)
        self.start = start
        self.memory = b""
        self.last_wish = ""
        return self.obey(do) or f"begin {start}"

    def step(self, completion):
        self.num_turns += 1
        given = self.obey(completion)
        if given is not None:
            return given
        said = f"turn {self.num_turns} of {self.start}: {random.random()}"
        return said, self.scale * random.random() + len(completion), self.num_turns >= 10

    @property
    def numbers(self):
        return {"turns": self.num_turns}

    def close(self):
        CLOSED.append(self.start)
        self.obey(self.last_wish)

    def obey(self, text):
        command, _, argument = text.partition(":")
        match command:
            case "hang":
                while True:
                    pass
            case "sleep":
                time.sleep(float(argument))
            case "exit":
                os._exit(int(argument))
            case "exit alone":  # until somebody has made the file
                if not Path(argument).exists():
                    Path(argument).write_text("")
                    os._exit(5)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "leave":
                sys.exit(argument)
            case "interrupt":
                raise KeyboardInterrupt
            case "raise":
                raise LookupError(argument)
            case "fork":
                os.fork()
            case "fork and hang":
                if os.fork() == 0:
                    time.sleep(1000)
            case "fork and wait":
                os.wait() if os.fork() else None
            case "close all":
                os.closerange(3, 1000)
            case "close all and hang":
                os.closerange(3, 1000)
                time.sleep(1000)
            case "close output":
                os.close(1)
            case "fill":
                bytearray(int(argument))
            case "keep":
                self.memory += bytes(int(argument))
            case "when closed":
                self.last_wish = argument
            case "print":
                sys.stdout.write(f"{argument}\n")
            case "return":
                return eval(argument)
            case "deep":
                inner: dict = {}
                for _ in range(int(argument)):
                    inner = {"a": inner}
                return [{"role": "user", "content": "", "x": inner}], 0.0, False
            case "alarm":
                signal.setitimer(signal.ITIMER_REAL, 0.05)
            case "thread":
                threading.Timer(float(argument), os._exit, [7]).start()
            case "forge":
                connection = find_connection()
                payload = argument.encode()
                connection.sendall(struct.pack("!Q", len(payload)) + payload)
            case "enter":
                os.chdir(argument)
                os.environ["ENTERED"] = argument
            case "where":
                return f"{Path.cwd()} {os.environ.get('ENTERED')}", 0.0, False
            case "pid":
                return str(os.getpid()), 0.0, False
            case "draw":
                return str(random.SystemRandom().random()), 0.0, False
            case "run a loop":
                asyncio.run(asyncio.sleep(0))
        return None


class Waiting(Hostile):
    """The same with coroutines; ``wait`` waits, and lets others go on."""

    async def step(self, completion):
        command, _, argument = completion.partition(":")
        if command == "wait":
            await asyncio.sleep(float(argument))
        if command == "wait for ever":
            await asyncio.Event().wait()
        return super().step(completion)


class Keen:
    def __init__(self, scale=1.0):
        self.scale = scale

    def reset(self, a, b=2):
        return f"{a} {b}"

    def step(self, completion, message=None):
        return json.dumps(message), self.scale, False

    def finish(self):
        return 7.5


class Any:
    def reset(self, **row):
        return json.dumps(row)

    def step(self, completion):
        return "", 0.0, True


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def make(scale=1.0):
    return Keen(scale)


class NoStep:
    def reset(self):
        return ""


class NoReset:
    def step(self, completion):
        return "", 0.0, True


class ByPosition:
    def reset(self, row, /):
        return ""

    def step(self, completion):
        return "", 0.0, True


def broken():
    raise RuntimeError("no such thing")


def shapeless():
    return NoReset()


NUMBER = 3
