"""The parts of a check, and what a part finds."""

import importlib
import importlib.util
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Directory of the repository: the parts start its scripts and read its configurations.
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """Part of a check.

    Attributes:
        name: Name in the report and on the command line.
        module: Module of this package; its function ``run`` takes a ``Context``.
        seconds: Time limit on GPUs.
        summary: Description of it, for people.
        needs: Packages without which it is skipped.
        fewest_seconds: Time without which it is not begun.
    """

    name: str
    module: str
    seconds: float
    summary: str
    needs: Sequence[str] = ("pydantic", "transformers", "accelerate", "numba")
    fewest_seconds: float = 10.0

    def missing(self) -> list[str]:
        """Return the packages that the part needs and that are not installed."""
        return [name for name in self.needs if not is_installed(name)]


def is_installed(package: str) -> bool:
    """Return True if a package can be imported; nothing is imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


@dataclass
class Context:
    """What a part is told, and where it writes its findings.

    Findings are written after each, so that what a part had found is not lost when its time is over.

    Attributes:
        is_rehearsal: True on a CPU with small sizes.
        num_ranks: Number of ranks, each with a GPU of its own; 1 on a single one.
        folder: Directory for files that nobody needs afterwards.
        out: File of the findings.
        deadline: Time of ``time.monotonic()`` at which the part is ended.
        values: Figures by name: numbers, or texts.
        checks: True or False by name: what was seen to be right or wrong.
        failures: Message by name of a section that raised an exception.
        skipped: Reason by name of a section that could not be tried.
    """

    is_rehearsal: bool
    num_ranks: int
    folder: Path
    out: Path
    deadline: float
    values: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Seconds until the part is ended."""
        return self.deadline - time.monotonic()

    def record(self, **values: Any) -> None:
        """Record figures."""
        self.values |= values
        self.save()

    def check(self, name: str, is_right: bool, *, detail: str = "") -> None:
        """Record if something was right; print what is known about it if it was wrong."""
        self.checks[name] = bool(is_right)
        print(f"{'right' if is_right else 'WRONG'}: {name}{'' if is_right or not detail else ': ' + detail}")
        self.save()

    def skip(self, name: str, reason: str) -> None:
        """Record that a section cannot be tried."""
        self.skipped[name] = reason
        print(f"skipped: {name}: {reason}")
        self.save()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Record an exception of the block instead of raising it, so that the part goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures[name] = f"{type(error).__name__}: {str(error).strip()[:500]}"
            self.save()

    def save(self) -> None:
        """Write all findings."""
        found = {name: getattr(self, name) for name in ("values", "checks", "failures", "skipped")}
        draft = self.out.with_suffix(".draft")
        draft.write_text(json.dumps(found))
        draft.replace(self.out)


def run_part(part: Part, context: Context) -> None:
    """Run a part in this process."""
    context.save()
    with context.section(part.name):
        importlib.import_module(f"gpu_check.{part.module}").run(context)
