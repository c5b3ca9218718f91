"""The weights of any iteration of a run: its newest good snapshot, and the journal from there."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardes.errors import UserError
from shardes.es.update import Update
from shardes.models.checkpoint import Checkpoint
from shardes.runs.snapshot import Snapshot, SnapshotError, find_snapshots, snapshot_path
from shardes.session import Session
from shardes.weights.master_digest import optimizer_digest
from shardes.weights.snapshot_view import load_snapshot

logger = logging.getLogger(__name__)


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
    """Renames a damaged snapshot; where that is not possible, it is in nobody's way."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged{number}")
    try:
        path.rename(aside)
    except OSError as error:
        logger.warning("%s could not be renamed: %s", path, error)
