"""Logging: every line names its rank; ranks other than 0 log warnings only."""

import logging
import os
import sys

from tqdm import tqdm


class _AboveTheBar(logging.Handler):
    """Handler that writes records to standard error without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def configure_logging() -> None:
    """Set up the root logger for this rank."""
    rank = int(os.environ.get("RANK", "0"))
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("shardes").setLevel(logging.INFO if rank == 0 else logging.WARNING)


_CODES = (*range(32), *range(127, 160), *range(0xD800, 0xE000))  # surrogates cannot even be written
_CONTROLS = {code: "\ufffd" for code in _CODES if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """Return a text without characters that would do something to a terminal besides being shown."""
    return text.translate(_CONTROLS)


def tell_user(text: str) -> None:
    """Print a message on standard error, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
