"""The weights of any iteration of a run: its newest good snapshot, and the journal from there."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardes.errors import UserError
from shardes.es.member import MemberResult
from shardes.es.update import Update
from shardes.models.checkpoint import Checkpoint
from shardes.runs.journal import History
from shardes.runs.snapshot import Snapshot, SnapshotError, find_snapshots, snapshot_path
from shardes.session import Session

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumeState:
    """What a run's journal knows when the run goes on.

    Attributes:
        updates: The records of all updates.
        digests: The weights' digests by number of updates.
        results: Members of the first iteration to do that have earned something already.
        evaluation: The record of the centre's evaluation after all updates, if there is one.
        best_reward: The best held-out reward before that.
        kl_probe: The base model's answers, if they were recorded.
        has_kl: Whether the divergence was estimated after all updates.
    """

    updates: list[dict[str, Any]]
    digests: dict[int, str]
    results: dict[int, MemberResult]
    evaluation: dict[str, Any] | None
    best_reward: float | None
    kl_probe: dict[str, Any] | None
    has_kl: bool

    @property
    def first_iteration(self) -> int:
        return len(self.updates)

    @property
    def is_cut_off(self) -> bool:
        return self.first_iteration > 0 and self.first_iteration not in self.digests

    @classmethod
    def from_history(cls, history: History) -> "ResumeState":
        first = len(history.updates)
        # A member without a reward is asked again: the user may have mended the reward function.
        pending = [r for r in history.members.get(first, {}).values() if r["reward"] is not None]
        return cls(
            history.updates,
            dict(history.digests),
            {r["member"]: MemberResult.of_record(r) for r in pending},
            history.evaluations.get(first),
            history.best_reward(before=first),
            history.probe,
            first in history.kls,
        )

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {
            "digests": list(self.digests.items()),
            "results": [r.record() for r in self.results.values()],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ResumeState":
        results = [MemberResult.of_record(r) for r in record["results"]]
        return cls(
            **{**record, "digests": dict(record["digests"]), "results": {r.member: r for r in results}}
        )


def restore_weights(
    session: Session,
    updates: list[dict[str, Any]],
    *,
    digests: Mapping[int, str],
    run_dir: Path,
    sets_damaged_aside: bool = False,
) -> None:
    """Makes the base weights of a session those after some updates, bit for bit; a collective of all ranks.

    Args:
        session: With its base weights.
        updates: The journal's records of the updates.
        digests: What the journal knows of the weights, by number of updates.
        run_dir: Where snapshots are looked for.
        sets_damaged_aside: Whether damaged snapshots are renamed, so that they no longer count as ones.

    Raises:
        UserError: The weights are not those that the journal says.
    """
    world = session.mesh.world
    found = [each for each in find_snapshots(run_dir) if each <= len(updates) and each in digests]
    first, is_base = 0, True
    for iteration in world.broadcast_json(found):
        path, last = snapshot_path(run_dir, iteration), Update.of_record(updates[iteration - 1])
        problem = _load(session, path, digests[iteration], last_update=last)
        is_base = False
        if problem is None:
            first = iteration
            break
        if world.is_main:
            logger.warning(
                "the snapshot of iteration %d is damaged (%s); going further back", iteration, problem
            )
            if sets_damaged_aside:
                _set_aside(snapshot_path(run_dir, iteration))
    if not (first or is_base):
        session.weights.load(Checkpoint(session.config.model.path))
    if updates:
        origin = f"the snapshot of iteration {first}" if first else "the base model"
        logger.info("replaying %d iterations over %s", len(updates) - first, origin)
    session.replay(updates[first:])
    wanted = digests.get(len(updates))
    if wanted is not None and (digest := session.digest()) != wanted:
        raise UserError(
            f"run.dir: {run_dir}: the weights after {len(updates)} iterations have the digest {digest}, but "
            f"the journal says {wanted}. This machine computes other numbers than the one before, or one of "
            f"them is broken; to see where they part: shardes verify {run_dir}"
        )


def _load(session: Session, path: Path, digest: str, *, last_update: Update) -> str | None:
    """Reads a snapshot into the masters; returns what is wrong with it, the same on every rank."""
    problem = None
    try:
        snapshot = Snapshot(path)
        session.weights.load_snapshot(snapshot, last_update=last_update)
    except (SnapshotError, OSError, KeyError) as error:
        problem = str(error)
    problems = [each for each in session.mesh.world.gather_json(problem) if each is not None]
    if problems:
        return problems[0]
    found, states = session.digest(), session.combined(session.weights.states_digest())
    if found != digest:
        return f"its weights have the digest {found}; wanted {digest}"
    wanted = snapshot.states_digest
    return None if states == wanted else f"its optimizer states have the digest {states}; wanted {wanted}"


def _set_aside(path: Path) -> None:
    """Renames a damaged snapshot; where that is not possible, it is in nobody's way."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged{number}")
    try:
        path.rename(aside)
    except OSError as error:
        logger.warning("%s could not be renamed: %s", path, error)
