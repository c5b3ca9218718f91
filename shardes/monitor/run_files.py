"""Shared by the views of a run: refusing damaged files, and naming what is trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardes.errors import UserError

# Keys of the section task that say what earns rewards, the first of which is the task's name.
_KINDS = ("name", "environment", "harness", "reward")


@contextmanager
def refusing_damage(run_dir: Path) -> Iterator[None]:
    """Turn the exceptions of code that meets damaged records into one message.

    Raises:
        UserError: The files of the run are damaged.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"RUN_DIR {run_dir}: its files are damaged ({type(error).__name__}: {error}); shardes journal "
            f"{run_dir} says where"
        ) from None


def task_name_of(config: Mapping[str, Any]) -> str:
    """Return the name of the task of a configuration, as a tree of dictionaries."""
    task = config.get("task", {})
    return str(next((task[key] for key in _KINDS if task.get(key)), "several rewards"))
