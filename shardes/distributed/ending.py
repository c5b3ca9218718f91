"""The end of a process on behalf of its job: what is told, and with which status."""

import os
import sys
import threading
import traceback

from shardes.errors import EXIT_FAILURE, EXIT_INTERRUPTED, JobError, StorageError, UserError

# How long writing what the output still has may take: whoever reads it may be frozen, too.
_FLUSH_SECONDS = 2.0
_MOST_CHARACTERS = 20_000


def end_process(status: int) -> None:
    """Flush the output and end this process soon, from any thread."""
    flusher = threading.Thread(target=_flush, daemon=True)
    flusher.start()
    flusher.join(_FLUSH_SECONDS)
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def explain(error: BaseException, rank: int) -> tuple[int, str]:
    """Return the exit status of an error, and the message for the user."""
    if isinstance(error, UserError | StorageError | JobError):
        return error.exit_status, f"Error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted; go on with the same command"
    trace = "".join(traceback.format_exception(error))[-_MOST_CHARACTERS:]
    return EXIT_FAILURE, f"rank {rank} failed:\n{trace}"
