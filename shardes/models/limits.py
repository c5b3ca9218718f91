"""Limits of time, memory and size for building a model, which goes by files that may be damaged or hostile.

transformers and the models' own code loop as often, and allocate as much, as config.json says, and raise all
kinds of exceptions for values that they do not expect.
"""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.nn.modules.module import register_module_parameter_registration_hook

from shardes.errors import UserError
from shardes.utils.limits import limit_address_space
from shardes.utils.messages import one_line

# The largest published models have ten thousand, or ten times that if each expert has its own.
MOST_PARAMETERS = 1_000_000
# Memory for a model of any size: parameters have real storage for a moment, of which nothing is touched.
MOST_BYTES = 2**38
_CPU_SECONDS = 60.0


class _TooMuchError(BaseException):
    """A limit was reached; no ``except Exception`` on the way may swallow it."""


@contextlib.contextmanager
def limited(
    what: str, *, most_parameters: int = MOST_PARAMETERS, most_bytes: int = MOST_BYTES
) -> Iterator[None]:
    """Turn any exception of the block into one message, and end a block that takes too much.

    Args:
        what: What failed, with the key and the file, for the message.
        most_parameters: Number of parameters that modules may get in the block.
        most_bytes: Memory that the process may take in the block.

    Raises:
        UserError: The block raised, or took more processor time, memory or parameters than it may.
    """
    try:
        with _limited_memory(most_bytes), _limited_time(), _limited_parameters(most_parameters):
            yield
    except UserError:
        raise
    except _TooMuchError as error:
        raise UserError(f"{what}: {error}") from None
    except MemoryError:
        raise UserError(f"{what}: it takes too much memory") from None
    except Exception as error:
        told = one_line(error)
        if "can't allocate memory" in told:
            raise UserError(f"{what}: it takes too much memory: {told.rpartition(': ')[2]}") from None
        is_foreign = "trust_remote_code" in told or "does not recognize this architecture" in told
        hint = "; a model with code of its own needs model.trust_remote_code: true" if is_foreign else ""
        raise UserError(f"{what}: {type(error).__name__}: {told}{hint}") from error


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """End the block after a minute of processor time; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _TooMuchError(f"it is not done after {_CPU_SECONDS:.0f} seconds of processor time")

    before = signal.signal(signal.SIGVTALRM, end)
    # It rings again, should something swallow the first.
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _limited_memory(most_bytes: int) -> Iterator[None]:
    """Let the process grow by so much in the block, where the system tells how large it is."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError):
        limit_address_space(most_bytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def _limited_parameters(most: int) -> Iterator[None]:
    """End the block once modules have got more than ``most`` parameters."""
    count = 0

    def add(module: Any, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise _TooMuchError(f"it would have more than {most} parameters, far more than the files have")

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()
