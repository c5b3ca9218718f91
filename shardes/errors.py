"""The errors that end a run on purpose, and the exit status each of them means."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """The user's input cannot be used: one clear message, exit status 2, no traceback.

    The message says what was got, what was wanted, which key or line it concerns, and the remedy.
    """
