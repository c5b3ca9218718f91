"""A view of a run that goes on somewhere, from its files alone; nothing heavy is imported.

Journal and metrics only grow while a job has them, so that what was read once is not read again. A job that
goes on after another cuts off what it does again; then all is read anew.
"""

import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from shardes.config.loading import load_run_config
from shardes.errors import UserError
from shardes.monitor.run_files import refusing_damage, task_name_of
from shardes.utils.logs import printable
from shardes.utils.progress import duration
from shardes.utils.reading import open_regular, parse_json
from shardes.utils.units import shown_number

# Iterations whose mean time is what the next ones are expected to take.
_NUM_TIMED = 20
# After so long without a word, a reader may want to look after the job.
_SILENCE_SECONDS = 300.0
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 60
# Of the journal's records; what members answered to each problem would be too much.
_JOURNAL_KEYS = ("type", "iteration", "member", "reward", "sets", "config")


class _Grown:
    """Whole lines of a file, as it grows.

    Args:
        path: The file.
        keys: Keys that are kept of each line; None: all.

    Attributes:
        lines: Their objects.
    """

    def __init__(self, path: Path, *, keys: tuple[str, ...] | None = None) -> None:
        self._path = path
        self._keys = keys
        self._num_bytes = 0
        self._file_id: int | None = None
        self.lines: list[dict[str, Any]] = []

    def read(self) -> float | None:
        """Read what is new; return when the file was last written, in seconds, or None if there is none."""
        for is_first_try in (True, False):
            try:
                return self._read()
            except FileNotFoundError:
                return None
            except OSError as error:
                raise UserError(f"{self._path} cannot be read: {error.strerror}") from None
            except ValueError as error:
                # What was read may have been cut off and written anew in the meantime.
                self._num_bytes, self.lines = 0, []
                if not is_first_try:
                    raise UserError(f"{self._path}: a line is damaged ({error})") from None
        raise AssertionError("not reached")

    def _read(self) -> float:
        with open_regular(self._path) as file:
            stat = os.fstat(file.fileno())
            if stat.st_size < self._num_bytes or stat.st_ino != self._file_id:
                self._num_bytes, self._file_id, self.lines = 0, stat.st_ino, []
            file.seek(self._num_bytes)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            record = parse_json(line)
            keys = record.keys() if self._keys is None else [k for k in self._keys if k in record]
            self.lines.append({key: record[key] for key in keys})
        self._num_bytes += len(whole)
        return stat.st_mtime


class RunView:
    """View of a run, which can be brought up to date at any time.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._journal = _Grown(run_dir / "journal.jsonl", keys=_JOURNAL_KEYS)
        self._metrics = _Grown(run_dir / "metrics.jsonl")
        self._written: float = 0.0

    def look(self) -> None:
        """Read what was written since the last time.

        Raises:
            UserError: There is no run.
        """
        times = [self._journal.read(), self._metrics.read()]
        if times[0] is None:
            raise UserError(f"RUN_DIR {self._run_dir}: it has no journal.jsonl; give the directory of a run")
        self._written = max(each for each in times if each is not None)

    @property
    def num_iterations(self) -> int | None:
        """Number of iterations of the run by its latest configuration; None if there is none yet."""
        try:
            # A run may have been given more of them than its journal's header knows.
            return load_run_config(self._run_dir, {}).es.iterations
        except UserError:
            return self._header.get("config", {}).get("es", {}).get("iterations")

    @property
    def num_lines(self) -> int:
        """Number of lines of the metrics."""
        return len(self._metrics.lines)

    @property
    def is_finished(self) -> bool:
        """True if the last line is that of the end, which has no members."""
        lines = self._metrics.lines
        return bool(lines) and "num_members" not in lines[-1]

    @property
    def _header(self) -> dict[str, Any]:
        return self._journal.lines[0] if self._journal.lines else {}

    def screen(self, *, now: float) -> str:
        """Return the state of the run as text.

        Args:
            now: The time, in seconds since the epoch.
        """
        return printable("\n".join(self._paragraphs(now)))

    def _paragraphs(self, now: float) -> Iterator[str]:
        done = [line for line in self._metrics.lines if "num_members" in line]
        config = self._header.get("config", {})
        model = Path(config.get("model", {}).get("path", "?")).name
        yield f"{self._run_dir}  {model}, {task_name_of(config)}"
        yield f"iterations   {len(done)} of {self.num_iterations or '?'}{self._time_left(done)}"
        yield from self._members(len(done))
        if done:
            line = done[-1]
            yield (
                f"reward       {shown_number(line['reward_mean'])}, std {shown_number(line['reward_std'])}, "
                f"from {shown_number(line['reward_min'])} to {shown_number(line['reward_max'])}"
            )
            yield f"             {_curve([each['reward_mean'] for each in done])}"
        yield from self._heldout()
        yield from _time(done)
        yield self._ending(now)

    def _time_left(self, done: list[dict[str, Any]]) -> str:
        if self.is_finished:
            return ""
        seconds = [sum(line["seconds"].values()) for line in done[-_NUM_TIMED:] if "seconds" in line]
        if not seconds or self.num_iterations is None:
            return ""
        left = fmean(seconds) * (self.num_iterations - len(done))
        return f", {duration(fmean(seconds))} each, about {duration(left)} left"

    def _members(self, iteration: int) -> Iterator[str]:
        """Yield the progress of the iteration that goes on."""
        known = 0
        for record in reversed(self._journal.lines):
            if record["type"] == "member" and record["iteration"] == iteration:
                known += 1
            elif record["type"] in ("update", "weights"):
                break
        if known and not self.is_finished:
            population = self._header["config"]["es"]["population"]
            if isinstance(population, dict):
                population = [v for k, v in population.items() if int(k) <= iteration][-1]
            yield f"members      {known} of {population} in iteration {iteration}"

    def _heldout(self) -> Iterator[str]:
        found = {r["iteration"]: r for r in self._journal.lines if r["type"] == "evaluation"}
        rewards = {at: r["reward"] for at, r in found.items() if r.get("reward") is not None}
        if rewards:
            last, best = max(rewards), max(rewards, key=lambda at: (rewards[at], -at))
            yield (
                f"held-out     {shown_number(rewards[last])} after {last} iterations; "
                f"the best {shown_number(rewards[best])} after {best}"
            )
            yield f"             {_curve(list(rewards.values()))}"
        if found:
            for name, part in found[max(found)].get("sets", {}).items():
                yield f"  {name}: {shown_number(part['reward'])}"

    def _ending(self, now: float) -> str:
        if self.is_finished:
            return "finished"
        silence = now - self._written
        hint = "; does the job still run?" if silence > _SILENCE_SECONDS else ""
        return f"last written {duration(max(silence, 0))} ago{hint}"


def _time(done: list[dict[str, Any]]) -> Iterator[str]:
    """Yield lines about the last iterations: time by phase, and tokens."""
    timed = [line for line in done[-_NUM_TIMED:] if line.get("seconds")]
    if not timed:
        return
    total = sum(sum(line["seconds"].values()) for line in timed)
    phases = {name for line in timed for name in line["seconds"]}
    shares = {name: sum(line["seconds"].get(name, 0.0) for line in timed) / total for name in phases}
    told = sorted(((share, name) for name, share in shares.items() if share >= 0.01), reverse=True)
    yield "time         " + ", ".join(f"{name} {share:.0%}" for share, name in told)
    tokens = sum(line["num_tokens"] for line in timed)
    yield f"tokens       {tokens / total:.0f} a second, {tokens / len(timed):.0f} an iteration"


def _curve(values: list[float | None]) -> str:
    """Return a row of bars; of more values than it is wide, the means of neighbours."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    width = min(_CURVE_WIDTH, len(known))
    edges = [len(known) * i // width for i in range(width + 1)]
    means = [fmean(known[low:high]) for low, high in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def watch(run_dir: Path, *, once: bool, every_seconds: float, is_terminal: bool) -> Iterator[str]:
    """Yield pieces of text to print about a run, until it is finished.

    On a terminal each piece replaces the one before it; elsewhere there is a piece whenever an iteration has
    ended.

    Args:
        run_dir: The run directory.
        once: Whether to end after one piece.
        every_seconds: Seconds between two looks at the run.
        is_terminal: Whether the text goes to a terminal.

    Raises:
        UserError: There is no run.
    """
    following, told = RunView(run_dir), None
    while True:
        with refusing_damage(run_dir):
            following.look()
            state = (following.num_lines, following.is_finished)
            screen = following.screen(now=time.time())
        if is_terminal and not once:
            yield f"\x1b[H\x1b[J{screen}\n"
        elif once or state != told:
            yield f"{screen}\n"
        told = state
        if once or following.is_finished:
            return
        time.sleep(every_seconds)
