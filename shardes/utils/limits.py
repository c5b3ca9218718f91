"""Work on what others wrote, such as a model directory's templates, under limits of time and memory.

A sandbox keeps such a text from reading files, but not from looping for ever or from building gigabytes. So
the work is done in a forked process, which the kernel ends when it takes too long.
"""

import json
import os
import resource
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from shardes.utils.units import shown_bytes

SECONDS = 3
"""Processor time for one item."""
MEMORY_BYTES = 2**30
"""Memory that the work may take beyond what the process has already."""
# How long the process may go without an answer and without using its processor time.
_WAIT_SECONDS = 120.0

_Item = TypeVar("_Item")


class LimitError(Exception):
    """Work on an item went beyond a limit, or ended its process.

    Args:
        index: Index of the item.
        reason: What happened, such as ``takes more than 3 s of processor time``.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


def limited_map(
    function: Callable[[_Item], Any],
    items: Sequence[_Item],
    *,
    seconds: float = SECONDS,
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[Any]:
    """Yield the function's value for each item, computed in a forked process under limits.

    Args:
        function: Returns something that JSON keeps as it is. What it changes stays in the forked process.
        items: Its arguments.
        seconds: Processor time for each item.
        memory_bytes: Memory beyond what this process has.

    Raises:
        LimitError: An item took too much time or memory, or ended the process.
        RuntimeError: The function raised something; the message has the exception.
    """
    if not items:
        return
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _serve(function, items, write_end, seconds=seconds, memory_bytes=memory_bytes)
    os.close(write_end)
    status: int | None = None
    try:
        lines = _lines(read_end)
        for index in range(len(items)):
            try:
                line = next(lines, None)
            except TimeoutError:
                raise LimitError(index, f"gave no answer within {_WAIT_SECONDS:.0f} s") from None
            if line is None:
                status = os.waitpid(pid, 0)[1]
                raise LimitError(index, _ending(status, seconds=seconds))
            kind, value = json.loads(line)
            if kind == "memory":
                raise LimitError(index, f"needs more than {shown_bytes(memory_bytes)} of memory")
            if kind == "error":
                raise RuntimeError(value)
            yield value
    finally:
        os.close(read_end)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _lines(read_end: int) -> Iterator[bytes]:
    """Yield the lines of a pipe.

    Raises:
        TimeoutError: None came for a long time.
    """
    pending = [b""]
    while True:
        if not select.select([read_end], [], [], _WAIT_SECONDS)[0]:
            raise TimeoutError
        data = os.read(read_end, 2**16)
        if not data:
            return
        first, *rest = data.split(b"\n")
        pending.append(first)
        for part in rest:
            yield b"".join(pending)
            pending = [part]


def _ending(status: int, *, seconds: float) -> str:
    """Return what became of the forked process."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"takes more than {seconds:g} s of processor time"
    code = os.waitstatus_to_exitcode(status)
    return f"ended its process ({signal.Signals(-code).name if code < 0 else f'status {code}'})"


def _serve(
    function: Callable[[_Item], Any],
    items: Sequence[_Item],
    write_end: int,
    *,
    seconds: float,
    memory_bytes: int,
) -> NoReturn:
    """Answer in the forked process, and end it without running what its parent has registered for the end."""
    out_of_memory = b'["memory", null]\n'
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent is gone
        limit_address_space(memory_bytes)
        for item in items:
            # Timed by the kernel, because no handler of Python's runs inside one long operation.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                line = json.dumps(["value", function(item)]).encode() + b"\n"
            except MemoryError:
                line = out_of_memory
            except Exception as error:
                line = json.dumps(["error", f"{type(error).__name__}: {error}"]).encode() + b"\n"
            while line:
                line = line[os.write(write_end, line) :]
    finally:
        os._exit(1)


def limit_address_space(num_bytes: int) -> None:
    """Limit this process's address space to what it has now and some bytes; a lower limit stays.

    Raises:
        OSError: The system does not tell how large it is.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + num_bytes
    lower = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *lower]), hard))
