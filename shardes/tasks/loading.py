"""From the task section of the configuration to a task: data files, built-in tasks, own rewards."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardes.config import TaskConfig
from shardes.errors import UserError
from shardes.tasks import countdown
from shardes.tasks.base import Prompt, RewardFunction, Row, Task

BUILT_IN = {"countdown": countdown.Countdown("chat"), "countdown_short": countdown.Countdown("short")}


def load_task(config: TaskConfig) -> Task:
    """Reads the data and finds the reward.

    Raises:
        UserError: A file or a row cannot be used, or the reward cannot be imported.
    """
    if config.reward is not None:
        reward = import_reward(config.reward)
        return _with_data(config, config.reward, _prompt_column, reward, check=_check_prompt)
    assert config.name is not None, "the configuration has either a name or a reward"
    built_in = BUILT_IN[config.name]
    return _with_data(config, config.name, built_in.make_prompt, built_in.reward, check=countdown.check_row)


def _with_data(
    config: TaskConfig,
    name: str,
    make_prompt: Callable[[Row], Prompt],
    reward: RewardFunction,
    *,
    check: Callable[[Row, str], None],
) -> Task:
    train = read_rows(config.data, key="task.data", check=check)
    heldout: list[Row] = []
    if config.heldout_data is not None:
        heldout = read_rows(config.heldout_data, key="task.heldout_data", check=check)
    return Task(name, train, heldout, make_prompt, reward)


def read_rows(path: Path, *, key: str, check: Callable[[Row, str], None]) -> list[Row]:
    """The rows of a JSONL file, each checked.

    Args:
        path: The file.
        key: The configuration key that names it, for messages.
        check: Raises ``UserError`` for a row that the task cannot use.

    Raises:
        UserError: The file cannot be read, is empty, or a line cannot be used.
    """
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"{key}: {path} cannot be read ({error.strerror}); give the path of a JSONL file"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{key}: {path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{where}: not JSON ({error}): {line[:80]!r}; every line must be one JSON object"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: got {line[:80]!r}; every line must be one JSON object")
        check(row, where)
        rows.append(row)
    if not rows:
        raise UserError(f"{key}: {path} has no rows; give at least one problem")
    return rows


def _prompt_column(row: Row) -> Prompt:
    return row["prompt"]


def _check_prompt(row: Row, where: str) -> None:
    prompt = row.get("prompt")
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt
    )
    if not prompt or not (isinstance(prompt, str) or is_chat):
        raise UserError(
            f"{where}: prompt is {prompt!r}; wanted a non-empty text, or a list of chat messages "
            'such as [{"role": "user", "content": "..."}]'
        )


def import_reward(reference: str) -> RewardFunction:
    """The function that ``package.module:function`` or ``path/to/file.py:function`` names.

    Raises:
        UserError: There is no such module, file or function, or importing it fails.
    """
    source, _, function_name = reference.rpartition(":")
    try:
        module: Any = _module_of_file(Path(source)) if source.endswith(".py") else _module_of_name(source)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"task.reward: {source} cannot be imported ({type(error).__name__}: {error}); give "
            "package.module:function, or path/to/file.py:function relative to where the command is started"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"task.reward: {source} has no function {function_name!r}")
    return function


def _module_of_name(name: str) -> Any:
    # A script's first import path is its own directory, but a user's module lies where the command starts.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
