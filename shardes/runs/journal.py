"""The journal: an append-only file from which every past iteration's weights can be computed again.

One JSON object a line, each with a checksum over itself and the line before it, so that a line that was
changed, lost or moved is found. The records:

- ``header``: configuration, base model, noise version, parameter table and engine of the run.
- ``engine``: the engine from here on, where a job has gone on with another one.
- ``portion``: what a member's answers to a portion of the problems earned, where members race; written as
  soon as it is known.
- ``member``: one member's reward, written as soon as it is known.
- ``probe``: the base model's answers to some prompts, to measure the divergence from it.
- ``kl``: the divergence of the centre from the base model.
- ``evaluation``: the centre's held-out metrics, before the iteration's members.
- ``update``: the coefficients of one iteration, on disk before the update is applied.
- ``weights``: the digest of the weights after it.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardes.config.old_keys import rename_in_header
from shardes.errors import UserError
from shardes.es.update import UPDATE_VERSION
from shardes.runs.records import check_form
from shardes.utils.closing import Closing
from shardes.utils.files import AppendFile
from shardes.utils.reading import parse_json, read_whole_lines

JOURNAL_VERSION = 2
# Of journals that do not say which engine they had.
_FIRST_ENGINE = "transformers"
# What a damaged line raises.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass
class History:
    """Content of a journal.

    Attributes:
        header: The first record; None for an empty journal.
        updates: One record per finished iteration, in order.
        members: Records by iteration and member.
        portions: Records of the iteration that is not decided yet, by round and member.
        evaluations: Records by iteration.
        digests: Digests of the weights, by the number of updates that they had had.
        instruments: Measures of the update that led to these weights, by the same number.
        probe: The base model's answers to the KL prompts; None: it was not asked.
        kls: Divergence of the centre from the base model, in nats per token, by iteration.
        engines: Engines that have answered, each a record with its first ``iteration``, and as ``engine`` its
            name and the facts that its answers depend on.
    """

    header: dict[str, Any] | None = None
    updates: list[dict[str, Any]] = field(default_factory=list)
    members: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    portions: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    instruments: dict[int, dict[str, Any]] = field(default_factory=dict)
    probe: dict[str, Any] | None = None
    kls: dict[int, float | None] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def update_version(self) -> int:
        """Version of the updates that the run was begun with; headers of version 1 do not say."""
        return UPDATE_VERSION if self.header is None else int(self.header.get("update_version", 1))

    def iteration_of(self, wanted: str | None, *, key: str) -> int:
        """Return the number of updates that a user means.

        Args:
            wanted: A number, ``best`` for the evaluation with the highest held-out reward, or None for all.
            key: The option that the user gave it by, for messages.

        Raises:
            UserError: There are fewer updates, or nothing was evaluated.
        """
        available = len(self.updates)
        if wanted is None:
            return available
        if wanted == "best":
            best = self.best_iteration()
            if best is None:
                raise UserError(f"{key}: the run has no held-out evaluation to choose by; give a number")
            return best
        if not wanted.isdecimal():
            raise UserError(f"{key}: wanted a number of iterations, or best")
        if len(wanted) > 18 or int(wanted) > available:
            raise UserError(f"{key}: the run has {available} iterations; give at most that, or best")
        return int(wanted)

    def best_iteration(self) -> int | None:
        """Return the iteration with the highest held-out reward, the first one of several."""
        rewards = self._heldout_rewards()
        return max(rewards, key=lambda iteration: (rewards[iteration], -iteration), default=None)

    def best_reward(self, *, before: int) -> float | None:
        """Return the highest held-out reward of evaluations before an iteration; None if there is none."""
        return max((reward for at, reward in self._heldout_rewards().items() if at < before), default=None)

    def _heldout_rewards(self) -> dict[int, float]:
        """Return the held-out rewards that are known, by iteration."""
        return {at: r["reward"] for at, r in self.evaluations.items() if r.get("reward") is not None}

    def add(self, record: dict[str, Any]) -> None:
        """Take in one record.

        Raises:
            ValueError: The record does not follow from those before it.
        """
        kind = record.get("type")
        if (kind == "header") != (self.header is None):
            raise ValueError("the header must be the first record, and the only one of its kind")
        if kind == "header":
            self.header = record
            self.engines.append({"iteration": 0, "engine": engine_of(record)})
        elif kind == "engine" and record["iteration"] == len(self.updates):
            self.engines.append(record)
        elif kind == "member" and record["iteration"] == len(self.updates):
            self.members.setdefault(record["iteration"], {})[record["member"]] = record
        elif kind == "portion" and record["iteration"] == len(self.updates):
            self.portions[record["round"], record["member"]] = record
        elif kind == "evaluation" and record["iteration"] == len(self.updates):
            self.evaluations[record["iteration"]] = record
        elif kind == "update" and record["iteration"] == len(self.updates):
            self.updates.append(record)
            self.portions = {}
            # The update has what became of them, and the runs of millions of answers are long.
            for member in self.members.get(record["iteration"], {}).values():
                member.pop("by_problem", None)
                member.pop("problems", None)
        elif kind == "probe" and self.probe is None:
            self.probe = record
        elif kind == "kl" and record["iteration"] == len(self.updates):
            self.kls[record["iteration"]] = record["kl"]
        elif kind == "weights" and record["iteration"] == len(self.updates):
            self.digests[record["iteration"]] = record["digest"]
            self.instruments[record["iteration"]] = record.get("instruments", {})
        else:
            raise ValueError(f"a record {kind!r} of iteration {record.get('iteration')} does not belong here")


class Journal(Closing):
    """An open journal. Only one process may hold it (see ``RunDirectory``).

    Args:
        path: The file; created if it does not exist.

    Attributes:
        history: Its content, records appended since included.
        dropped_bytes: Length of a torn last line that was cut off, 0 if there was none.

    Raises:
        UserError: The file is damaged elsewhere than in its last line.
    """

    def __init__(self, path: Path) -> None:
        self.history, self._link, good_bytes, total_bytes = read_journal(path)
        self.dropped_bytes = total_bytes - good_bytes
        self._file = AppendFile(path, keep_bytes=good_bytes)

    def append(self, record: dict[str, Any], *, durable: bool = False) -> None:
        """Write a record; it survives the death of this process, and if durable that of the machine.

        Raises:
            StorageError: It cannot be written; the file is as it was before, and the journal of no more use.
        """
        line, link = _seal(record, self._link)
        self.history.add(record)
        self._file.append(line + b"\n", durable=durable)
        self._link = link

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def engine_of(header: dict[str, Any]) -> dict[str, Any]:
    """Return the name and the facts of the engine that a run began with."""
    named = {"name": header["settings"].get("rollout.engine", _FIRST_ENGINE)}
    engine: dict[str, Any] = header.get("engine", named)
    return engine


def recorded_header(run_dir: Path) -> dict[str, Any] | None:
    """Return the header of a run's journal; None if the run has not begun, or it cannot be read."""
    path, history = run_dir / "journal.jsonl", History()
    try:
        line = next(read_whole_lines(path), None)
        if line is not None:
            _take(line, history, "", path=path)
    except (OSError, UserError, *_DAMAGE):  # whoever opens the run says so
        return None
    return history.header


def recorded_setting(run_dir: Path, key: str) -> Any:
    """Return a setting of a journal's header; None if there is no header that can be read."""
    header = recorded_header(run_dir)
    return None if header is None else header["settings"].get(key)


def recorded_commit(run_dir: Path, hub_id: str | None) -> str | None:
    """Return the commit of a model of the hub with which a run began; None: it has none of that name."""
    header = recorded_header(run_dir)
    return None if header is None else commit_of(header, hub_id)


def commit_of(header: dict[str, Any], hub_id: str | None) -> str | None:
    """Return the commit that a journal's header has for a model of the hub; None: it is of another."""
    model = header["config"]["model"]
    return model.get("revision") if hub_id is not None and model["path"] == hub_id else None


def read_journal(path: Path) -> tuple[History, str, int, int]:
    """Read and check a journal without changing it.

    Returns:
        Its content, the checksum of its last good line, the number of bytes up to its end, and the number of
        bytes of the file.

    Raises:
        UserError: A line other than an incomplete last one is damaged.
    """
    history, link, good_bytes, num_bytes = History(), "", 0, 0
    try:
        for number, line in enumerate(read_whole_lines(path), start=1):
            try:
                link = _take(line, history, link, path=path)
            except _DAMAGE as error:
                raise UserError(
                    f"run.dir: {path} line {number} is damaged ({error}); restore the file from a copy, or "
                    f"do again what it says from that line on: truncate --size={good_bytes} {path}"
                ) from None
            good_bytes += len(line) + 1
        num_bytes = path.stat().st_size
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"run.dir: {path} cannot be read: {error.strerror}") from None
    return history, link, good_bytes, max(good_bytes, num_bytes)


def _take(line: bytes, history: History, link: str, *, path: Path) -> str:
    """Check a line of a journal, add its record to the history, and return its checksum.

    Raises:
        UserError: It is of a later version.
        ValueError, KeyError, TypeError, AttributeError: It is damaged.
    """
    record = parse_json(line)
    checksum = record.pop("checksum")
    expected, _ = _seal(record, link)
    if expected != line:
        raise ValueError("its checksum does not match")
    version = record.get("journal_version", 0)
    if isinstance(version, int) and version > JOURNAL_VERSION:
        raise UserError(
            f"run.dir: {path} has the journal version {version}, of a later shardes; this one reads versions "
            f"up to {JOURNAL_VERSION}"
        )
    if record.get("update_version", 1) not in range(1, UPDATE_VERSION + 1):
        raise UserError(
            f"run.dir: {path} has version {record['update_version']} of the updates (docs/updates.md), of "
            f"another shardes; this one knows versions up to {UPDATE_VERSION}"
        )
    check_form(record)
    if record["type"] == "header":
        rename_in_header(record)
    elif record["type"] == "update":
        # Each takes time to replay, and was the result of a member.
        at = record["iteration"]
        for key, what, iteration in (("coefficients", "its", at), ("reused", "the last", at - 1)):
            num_members, count = len(history.members.get(iteration, ())), len(record.get(key, ()))
            if count > num_members:
                raise ValueError(f"it has {count} {key}, but {what} iteration {num_members} members")
        is_paired = history.header is not None and history.header["settings"].get("es.antithetic")
        num_shaped = len(record.get("shaped", ()))
        num_members = len(record["coefficients"]) * (2 if is_paired else 1)
        if num_shaped not in (0, num_members):
            raise ValueError(f"it has {num_shaped} shaped rewards, but coefficients of {num_members} members")
    history.add(record)
    return str(checksum)


def _seal(record: dict[str, Any], link: str) -> tuple[bytes, str]:
    """Return a record's line without its break, and its checksum, which covers that of the line before."""
    body = json.dumps(record, separators=(",", ":"), sort_keys=True, allow_nan=False)
    checksum = hashlib.blake2b(f"{link}{body}".encode(), digest_size=8).hexdigest()
    sealed = json.dumps({**record, "checksum": checksum}, separators=(",", ":"), sort_keys=True)
    return sealed.encode(), checksum
