"""A short form of tools/soak.py: ranks are killed at random moments and chosen places; no byte changes."""

import re
import sys

import pytest

from tests.helpers.ranks import run_command

SOAK = [sys.executable, "tools/soak.py"]


@pytest.mark.slow
def test_kills_at_any_moment_change_no_byte(tmp_path):
    pytest.importorskip("deepspeed")
    numbers = ["--kills", "10", "--kills-per-run", "10", "--seed", "3"]
    result = run_command([*SOAK, *numbers, "--dir", tmp_path], timeout_seconds=280)
    assert result.returncode == 0, result.stdout + result.stderr
    kills = re.findall(r"^kill \d+: .*, (\d+) lines: ended$", result.stdout, re.MULTILINE)
    assert len(kills) == 10, result.stdout
    assert len(set(kills)) > 4, "they were meant to land at different moments"
    assert re.search(r"^10 kills in \d+ runs, 0 things wrong$", result.stdout, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_that_ends_with_something_else_is_told(tmp_path):
    """So that the soak can fail: every export but the first of the undisturbed run has another bit."""
    code = """
import sys
sys.path.insert(0, "tools")
import soak
original, calls = soak.outcome, iter(range(100))
def outcome(run_dir, export):
    found = original(run_dir, export)
    return found | {"export": found["export"][::-1]} if next(calls) else found
soak.outcome = outcome
sys.exit(soak.main())
"""
    arguments = ["--kills", "1", "--seed", "3", "--backend", "fsdp", "--dir", tmp_path]
    result = run_command([sys.executable, "-c", code, *arguments], timeout_seconds=200)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "export differs" in result.stdout
