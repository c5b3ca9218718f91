"""The errors that end a run on purpose, and the exit status each of them means."""

from typing import ClassVar

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """The user's input cannot be used: one clear message, exit status 2, no traceback.

    The message says what was got, what was wanted, which key or line it concerns, and the remedy.
    """

    exit_status: ClassVar[int] = EXIT_USER_ERROR


class StorageError(Exception):
    """A file cannot be written, for want of room, say: one clear message, exit status 1, no traceback.

    What was recorded before is whole, so the same command goes on once the cause is gone.
    """

    exit_status: ClassVar[int] = EXIT_FAILURE


class JobError(Exception):
    """The ranks of a job do not find each other: one clear message, exit status 1, no traceback."""

    exit_status: ClassVar[int] = EXIT_FAILURE
