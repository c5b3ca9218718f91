"""The command line inside the test's own process: what it does without the seconds that a start takes."""

import contextlib
import io
import logging
import sys
from types import SimpleNamespace
from unittest import mock

from shardes.cli import cli, run, train

COMMANDS = {"train": train, "shardes": cli}


def call(name, *arguments):
    """Runs ``train`` or ``shardes`` with arguments; returns its exit status and what it printed."""
    stdout, stderr = io.StringIO(), io.StringIO()
    handlers = list(logging.getLogger().handlers)
    with (
        mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            status = run(COMMANDS[name])
        finally:
            logging.getLogger().handlers = handlers
    return SimpleNamespace(returncode=status, stdout=stdout.getvalue(), stderr=stderr.getvalue())
