"""A journal as a table, for people."""

from collections.abc import Iterator
from typing import Any

from shardes.runs.journal import History
from shardes.runs.metrics import heldout_metrics, iteration_metrics, num_trained

_COLUMNS = {
    "iteration": "iteration",
    "members": "judged",
    "reward_mean": "mean",
    "reward_std": "std",
    "reward_min": "min",
    "reward_max": "max",
    "heldout_reward": "held-out",
    "sigma": "sigma",
    "alpha": "alpha",
    "weights_digest": "weights after it",
}


def report(history: History) -> Iterator[str]:
    """Yield the lines of the table: the run, one line an iteration, and the iteration that has begun.

    Args:
        history: Content of a journal, with a header.
    """
    header = history.header
    assert header is not None, "an empty journal has nothing to tell"
    settings = header["settings"]
    model = header["config"]["model"]
    commit = f", commit {model['revision']}" if model.get("revision") else ""
    yield f"base model   {model['path']}{commit}, weights digest {header['base_weights_digest']}"
    yield f"trained      {len(header['parameters'])} parameters of {num_trained(header)} elements"
    yield (
        f"noise        {settings.get('es.noise')}, version {header['noise_version']}, "
        f"seed {settings.get('es.seed')}, population {settings.get('es.population')}"
    )
    yield f"written by   shardes {header['shardes_version']}, journal version {header['journal_version']}"
    for record in history.engines:
        engine = dict(record["engine"])
        shown = ", ".join([engine.pop("name"), *(f"{key} {value}" for key, value in engine.items())])
        yield f"engine       {shown}" + (
            f", from iteration {record['iteration']} on" * bool(record["iteration"])
        )
    yield ""
    lines = [iteration_metrics(history, iteration) for iteration in range(len(history.updates))]
    rows = [[_shown(key, line) for key in _COLUMNS] for line in lines]
    if rows:
        yield from _aligned([list(_COLUMNS.values()), *rows])
        yield ""
    yield from _pending(history)


def _pending(history: History) -> Iterator[str]:
    """Yield what is known of the iteration that has not ended."""
    done = len(history.updates)
    yield f"{done} iterations are done"
    if "heldout_reward" in (metrics := heldout_metrics(history, done)):
        yield f"held-out reward after them: {_number(metrics['heldout_reward'])}"
    if members := history.members.get(done):
        yield f"iteration {done} has begun: {len(members)} of its members are known"


def _shown(key: str, line: dict[str, Any]) -> str:
    if key == "members":
        return f"{line['num_members'] - line['num_excluded_members']}/{line['num_members']}"
    return _number(line.get(key))


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
