"""Rewards that do what rewards should not; light, because worker processes import them.

An answer is a list of commands, carried out one after the other by the reward of the whole batch; what is no
command counts as its length.
"""

import asyncio
import builtins
import decimal
import gc
import multiprocessing
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from multiprocessing import shared_memory
from pathlib import Path


def find_connection():
    """The worker's socket to its pool."""
    return next(o for o in gc.get_objects() if isinstance(o, socket.socket) and o.fileno() >= 0)


def request_id():
    """The id of the request that is being answered."""
    frame = sys._getframe()
    while frame.f_code.co_name != "serve_rewards":
        frame = frame.f_back
    return frame.f_locals["number"]


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
                payload = argument.replace("ID", str(request_id())).encode()
                connection.sendall(struct.pack("!Q", len(payload)) + payload)
                time.sleep(1000)
            case "half a message":
                connection = find_connection()
                connection.sendall(struct.pack("!Q", 1000) + b"[")
                time.sleep(1000)
            case "fork":
                values.append(fork_and(argument))
                continue
            case "leave":
                leave_behind(argument)
                if argument == "alarm by a number":
                    values.append(Alarming())
                    continue
            case "semaphores":  # and shared memory, for processes that do not share this one's memory
                semaphore = multiprocessing.get_context("spawn").Semaphore()
                segment = shared_memory.SharedMemory(create=True, size=100)
                LEFT.extend([semaphore, segment])
                names = [f"sem.{semaphore._semlock.name.removeprefix('/')}", segment.name]
                Path(f"{argument}.tmp").write_text("\n".join(names))
                Path(f"{argument}.tmp").rename(argument)
                time.sleep(1000)
            case "flood":
                for _ in range(int(argument) >> 16):
                    os.write(1, (b"x" * 63 + b"\n") * 1024)
            case "print":
                sys.stdout.write(argument)
                sys.stdout.flush()
        values.append(float(len(text)))
    return values


def fork_and(end):
    """Fork a child that ends in some way, without leaving it to os._exit; return its exit status."""
    child = os.fork()
    if child == 0:
        match end:
            case "exit":
                sys.exit(3)
            case "raise":
                raise LookupError("in a child")
            case "linger":
                time.sleep(0.3)
        return 1e9  # comes back to whoever called the reward
    if end == "linger":
        return 6.0
    return float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def leave_behind(what):
    what, _, argument = what.partition("=")
    match what:
        case "alarm":
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        case "raising alarm":
            signal.signal(signal.SIGALRM, raise_timeout)
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        case "pending":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            os.kill(os.getpid(), signal.SIGALRM)
        case "handlers":
            signal.signal(signal.SIGTERM, raise_timeout)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        case "surroundings":
            os.chdir("/")
            os.umask(0o777)
            os.environ["LEFT"] = "behind"
            del os.environ["PATH"]
            sys.setrecursionlimit(50)
            sys.stdout = None
            resource.setrlimit(resource.RLIMIT_NOFILE, (8, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            decimal.getcontext().prec = 2
            sys.set_int_max_str_digits(640)
            socket.setdefaulttimeout(0.01)
        case "guard":  # as programs to run other people's code do it
            builtins.print = os.kill = os.getcwd = os.fchdir = os.listdir = os.fstat = os.umask = None
            signal.setitimer = subprocess.Popen = time.sleep = None
        case "user":
            os.setegid(65534)
        case "memory":
            LEFT.append(bytearray(2**29))
            raise MemoryError("at last")
        case "thread":
            threading.Timer(0.3, os._exit, (5,)).start()
        case "process":
            with Path(argument).open("w") as file:
                subprocess.Popen(["sleep", "1000"], stdin=file)
        case "daemon":
            with Path(argument).open("w"):
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0:
                        time.sleep(1000)
                    os._exit(0)
                os.wait()
        case "files":
            LEFT.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(300))
        case "streams":
            os.dup2(os.open("/dev/null", os.O_RDWR), 2)
        case "no stream":
            sys.stdout.close()


LEFT = []


class Alarming:
    """A number that does something when it is looked at."""

    def item(self):
        leave_behind("alarm")
        return 23.0


def raise_timeout(number, frame):
    raise TimeoutError("an alarm")


def processes(completions, **columns):
    """How many processes this one sees, and whether it can end its grandparent."""
    num_seen = sum(path.name.isdigit() for path in Path("/proc").iterdir())
    assert os.getsid(0) == os.getpid()
    return [float(num_seen)] * len(completions)


def surroundings(completions, **columns):
    """What a call finds when it begins."""
    handlers = [str(signal.getsignal(number)) for number in signal.valid_signals()]
    found = [
        str(Path.cwd()),
        os.umask(0),
        sorted(os.environ.items()),
        handlers,
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        sys.getrecursionlimit(),
        sys.stdout.closed,
        os.fstat(2).st_ino,
        resource.getrlimit(resource.RLIMIT_NOFILE),
        threading.active_count(),
        decimal.getcontext().prec,
        sys.get_int_max_str_digits(),
        socket.getdefaulttimeout(),
        [print, os.kill, os.fchdir, subprocess.Popen, time.sleep],
        os.getegid(),
        len(LEFT),
    ]
    return [float(zlib.crc32(repr(found).encode()))] * len(completions)


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


def number(completions, n, **kwargs):
    return [float(each) for each in n]


def num_columns(completions, **columns):
    return [float(len(columns) - len({"prompts"} & set(columns)))] * len(completions)
