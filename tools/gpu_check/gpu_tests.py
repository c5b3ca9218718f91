"""The tests that are marked ``gpu``."""

from typing import Any

import pytest

from gpu_check.part import ROOT, Context, is_installed


class _Results:
    """Plugin of pytest that records outcomes as tests end."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count the outcome of a test, and record its name if it failed."""
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
            self._context.record(**{f"num_{name}": count for name, count in self._counts.items()})
        if report.outcome == "failed":
            self._context.check(report.nodeid, is_right=False)

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file of tests that cannot be imported."""
        if report.outcome == "failed":
            self._context.skip(report.nodeid, str(report.longrepr).strip().splitlines()[-1][:200])


def run(context: Context) -> None:
    """Run the tests; a rehearsal only those of one file, which are skipped without a GPU."""
    words = ["-m", "gpu", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-rfE"]
    if is_installed("xdist") and not context.is_rehearsal:
        words += ["-n", "4", "--dist", "loadfile"]
    words += [
        str(ROOT / "tests" / "noise" / "gpu" / "test_device.py" if context.is_rehearsal else ROOT / "tests")
    ]
    status = pytest.main([*words, "--rootdir", str(ROOT)], plugins=[_Results(context)])
    context.record(exit_status=int(status))
    if not context.is_rehearsal:
        context.check("GPU tests ran", context.values.get("num_passed", 0) > 0)
