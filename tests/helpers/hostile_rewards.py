"""Rewards that do what rewards should not; light, because worker processes import them.

An answer is a list of commands, carried out one after the other by the reward of the whole batch; what is no
command counts as its length.
"""

import asyncio
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path


def find_connection():
    """The worker's socket to its pool."""
    return next(o for o in gc.get_objects() if isinstance(o, socket.socket) and o.fileno() >= 0)


def obey(completions, **columns):
    values = []
    for text in completions:
        command, _, argument = text.partition(":")
        match command:
            case "hang":
                while True:
                    pass
            case "sleep":
                time.sleep(float(argument))
            case "exit":
                os._exit(int(argument))
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "raise":
                raise LookupError(argument)
            case "fill":
                values.append(len(bytearray(int(argument))))
                continue
            case "deafen":  # no signal but SIGKILL ends it
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                time.sleep(1000)
            case "kill template":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(1000)
            case "child":  # and leaves it behind
                process = subprocess.Popen(["sleep", "1000"])
                Path(argument).write_text(str(process.pid))
                time.sleep(1000)
            case "forge":
                connection = find_connection()
                payload = argument.encode()
                connection.sendall(struct.pack("!Q", len(payload)) + payload)
                time.sleep(1000)
            case "half a message":
                connection = find_connection()
                connection.sendall(struct.pack("!Q", 1000) + b"[")
                time.sleep(1000)
            case "print":
                sys.stdout.write(argument)
                sys.stdout.flush()
        values.append(float(len(text)))
    return values


def pid(completions, **columns):
    """The process that judges."""
    return [float(os.getpid())] * len(completions)


def meet(completions, **columns):
    """A call of several answers waits for one of a single answer; each says how many it had."""
    path = Path(completions[0])
    if len(completions) == 1:
        path.touch()
    while not path.exists():
        time.sleep(0.01)
    return [float(len(completions))] * len(completions)


async def obey_later(completions, **columns):
    await asyncio.sleep(0)
    return obey(completions)


def length(completions, **columns):
    return [float(len(text)) for text in completions]
