"""Resuming of a run: its progress, and the weights of any of its iterations."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from shardes.errors import UserError
from shardes.es.member import MemberResult
from shardes.es.update import UPDATE_VERSION, Update
from shardes.models.checkpoint import Checkpoint
from shardes.runs.journal import History
from shardes.runs.snapshot import Snapshot, SnapshotError, find_snapshots, snapshot_path
from shardes.session import Session
from shardes.weights.master_digest import optimizer_digest
from shardes.weights.snapshot_view import load_snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumeState:
    """Progress of a run, as its journal has it; rank 0 reads it and sends it to the others as JSON.

    Attributes:
        updates: Records of the updates, in order.
        digests: Digests of the weights, by the number of updates that they had had.
        results: Results of the first iteration's members, by member. Members without a reward are left out
            and asked again: the user may have mended the reward function.
        portions: What the answers to portions earned, by round and member, where members of the first
            iteration race; those without a reward are left out likewise.
        update_version: Version of the updates that the run was begun with.
        evaluation: Record of the held-out evaluation after all updates; None if there is none.
        best_reward: The highest held-out reward of earlier evaluations; None if there is none.
        kl_probe: Record of the base model's answers to the KL prompts; None if it was not asked.
        has_kl: Whether the divergence after all updates is recorded.
    """

    updates: list[dict[str, Any]]
    digests: dict[int, str]
    results: dict[int, MemberResult]
    portions: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    update_version: int = UPDATE_VERSION
    evaluation: dict[str, Any] | None = None
    best_reward: float | None = None
    kl_probe: dict[str, Any] | None = None
    has_kl: bool = False

    @property
    def first_iteration(self) -> int:
        """The first iteration whose update is not decided."""
        return len(self.updates)

    @property
    def is_cut_off(self) -> bool:
        """True if the job died between the last update and the record of the weights' digest after it."""
        return self.first_iteration > 0 and self.first_iteration not in self.digests

    @classmethod
    def from_history(cls, history: History) -> Self:
        """Return the progress that a journal has recorded."""
        first = len(history.updates)
        members = history.members.get(first, {})
        return cls(
            history.updates,
            history.digests,
            {m: MemberResult.of_record(r) for m, r in members.items() if r["reward"] is not None},
            portions={key: r["part"] for key, r in history.portions.items() if _has_reward(r["part"])},
            update_version=history.update_version,
            evaluation=history.evaluations.get(first),
            best_reward=history.best_reward(before=first),
            kl_probe=history.probe,
            has_kl=first in history.kls,
        )

    def to_json(self) -> dict[str, Any]:
        """Return an object that JSON keeps as it is, for ``from_json``."""
        results = [result.record() for result in self.results.values()]
        portions = list(self.portions.items())
        return vars(self) | {"digests": list(self.digests.items()), "results": results, "portions": portions}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """Return the progress of which ``to_json`` made an object."""
        results = map(MemberResult.of_record, state["results"])
        by_member = {result.member: result for result in results}
        portions = {(number, member): part for (number, member), part in state["portions"]}
        digests = dict(state["digests"])
        return cls(**{**state, "digests": digests, "results": by_member, "portions": portions})


def _has_reward(part: Mapping[str, Any]) -> bool:
    """Return whether a part of a member's answers has a reward that counts."""
    return bool(part["is_finite"]) and any(value is not None for value in part["values"])


def restore_weights(
    session: Session,
    updates: list[dict[str, Any]],
    *,
    digests: Mapping[int, str],
    run_dir: Path,
    sets_damaged_aside: bool = False,
) -> None:
    """Bring a session's base weights to those after some updates, bit for bit; a collective of all ranks.

    Args:
        session: A session with its base weights.
        updates: The journal's records of the updates.
        digests: The journal's digests of the weights, by number of updates.
        run_dir: The run directory, whose snapshots are used.
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
        session.weights.load(Checkpoint(session.config.model.directory))
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
    """Read a snapshot into the masters; return what is wrong with it, the same on every rank, or None."""
    problem = None
    try:
        snapshot = Snapshot(path)
        load_snapshot(session.weights, snapshot, last_update=last_update)
    except (SnapshotError, OSError, KeyError) as error:
        problem = str(error)
    problems = [each for each in session.mesh.world.gather_json(problem) if each is not None]
    if problems:
        return problems[0]
    found, states = session.digest(), session.combined(optimizer_digest(session.weights))
    if found != digest:
        return f"its weights have the digest {found}; wanted {digest}"
    wanted = snapshot.states_digest
    return None if states == wanted else f"its optimizer states have the digest {states}; wanted {wanted}"


def _set_aside(path: Path) -> None:
    """Rename a damaged snapshot; where that is not possible, it is in nobody's way."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged{number}")
    try:
        path.rename(aside)
    except OSError as error:
        logger.warning("%s could not be renamed: %s", path, error)
