"""Answers and conversations of a run, for people to read."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shardes.errors import UserError
from shardes.runs.directory import read_lines
from shardes.utils.paths import path_problem

_INDENT = "    "


def shown_samples(
    run_dir: Path, *, iteration: int | None = None, is_of_members: bool = False, num_samples: int
) -> Iterator[str]:
    """Yield the lines of a page of samples of one iteration.

    Args:
        run_dir: A run directory.
        iteration: Number of updates before the answers; None: the last one that has samples.
        is_of_members: Shows answers of the first member, not of the centre to held-out problems.
        num_samples: Samples that are shown, at most.

    Raises:
        UserError: There is no such directory, or it has no such samples.
    """
    path = run_dir / "samples.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir}: {path} cannot be read (it {path_problem(path)}); give a run directory")
    every = [line for line in read_lines(path) if ("member" in line) == is_of_members]
    whose = "the first member" if is_of_members else "the centre"
    if not every:
        raise UserError(f"{path} has no samples of {whose} yet")
    known = sorted({line["iteration"] for line in every})
    if iteration is not None and iteration not in known:
        raise UserError(
            f"--iteration {iteration}: {path} has no samples of {whose} of it; there are: {_listed(known)}"
        )
    chosen = known[-1] if iteration is None else iteration
    lines = [line for line in every if line["iteration"] == chosen]
    yield f"iteration {chosen}, {whose}: {min(num_samples, len(lines))} of {len(lines)} samples"
    for number, line in enumerate(lines[:num_samples], start=1):
        place = f", {line['set']}" if "set" in line else ""
        reward = "no reward" if line.get("reward") is None else f"reward {line['reward']:.4g}"
        yield ""
        yield f"-- {number}{place}: {reward}"
        for role, text in spoken(line):
            yield f"{role}:"
            yield from (f"{_INDENT}{each}" for each in text.split("\n"))


def spoken(line: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield who says what in a sample: the prompt and its answer, or the messages of a conversation.

    Args:
        line: A line of samples.jsonl.
    """
    for message in line.get("messages") or _exchange(line):
        name = f" ({message['name']})" if message.get("name") else ""
        text = str(message.get("content") or "")
        for call in message.get("tool_calls") or ():
            function = call.get("function", {})
            text += f"\ncalls {function.get('name')} with {function.get('arguments')}"
        if message.get("tool_call_error"):
            text += f"\n[{message['tool_call_error']}]"
        yield f"{message.get('role', '?')}{name}", text.strip("\n")


def _exchange(line: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a prompt and its answer as messages."""
    return [
        {"role": "prompt", "content": line.get("prompt", "")},
        {"role": "answer", "content": line.get("completion", "")},
    ]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[-10:]))
    return shown if len(numbers) <= 10 else f"..., {shown}"
