"""Verification of a run directory: its journal is replayed, and all else compared with that."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardes.errors import UserError
from shardes.models.checkpoint import Checkpoint
from shardes.runs.directory import read_lines
from shardes.runs.journal import History
from shardes.runs.snapshot import Snapshot, SnapshotError, find_snapshots, snapshot_path
from shardes.session import Session
from shardes.utils.progress import progress
from shardes.weights.master_digest import checkpoint_digest


@dataclass
class Verification:
    """Result of a verification.

    Attributes:
        num_iterations: Number of iterations that were replayed.
        num_compared: Number of digests compared with the journal's, that of the base model among them.
        num_snapshots: Number of snapshots that were read.
        export_iterations: Numbers of updates after which the weights are the export's.
        problems: A sentence for each difference, the earliest iteration first.
    """

    num_iterations: int
    num_compared: int = 0
    num_snapshots: int = 0
    export_iterations: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify_run(session: Session, history: History, *, run_dir: Path, export: Path | None) -> Verification:
    """Replay a journal over a session's base weights; a collective of all ranks.

    Args:
        session: A session with the journal's base weights.
        history: Content of the journal.
        run_dir: The directory of the run, for its metrics and snapshots.
        export: A model directory that must hold the weights of one of the iterations.

    Returns:
        The result, the same on every rank.
    """
    result = Verification(len(history.updates))
    wanted = None
    if export is not None:
        wanted, result.problems = _export_digest(session, export)
    found: dict[int, str] = {}
    steps = range(len(history.updates) + 1)
    for iteration in progress(steps, what="replaying and comparing", total=len(steps), unit="iterations"):
        if iteration:
            session.replay(history.updates[iteration - 1 : iteration])
        found[iteration] = session.digest()
        if wanted is not None and session.digest(is_rounded=True) == wanted:
            result.export_iterations.append(iteration)
    result.num_compared = 1 + len(history.digests)  # the base model's was compared before
    result.problems += _differences(found, history.digests, source="the journal")
    result.problems += _differences(found, _metrics_digests(session, run_dir), source="metrics.jsonl")
    for iteration in session.mesh.world.broadcast_json(find_snapshots(run_dir)):
        result.num_snapshots += 1
        result.problems += _check_snapshot(session, snapshot_path(run_dir, iteration), found)
    if wanted is not None and not result.export_iterations:
        result.problems.append(f"{export} holds the weights of none of the iterations")
    return result


def _differences(found: Mapping[int, str], told: Mapping[int, str], *, source: str) -> list[str]:
    """Return a sentence about the first iteration that differs; those after it follow from it."""
    for iteration, digest in sorted(told.items()):
        if found.get(iteration, digest) != digest:
            return [
                f"the weights after {iteration} updates are the first that differ: they have the digest "
                f"{found[iteration]}, but {source} says {digest}"
            ]
    return []


def _metrics_digests(session: Session, run_dir: Path) -> dict[int, str]:
    """Return the digests of metrics.jsonl, as rank 0 reads it, by number of updates."""
    # The line of an iteration has the weights after it; that of the end has no iteration of its own.
    told = {
        line["iteration"] + ("reward_mean" in line): line["weights_digest"]
        for line in read_lines(run_dir / "metrics.jsonl")
        if "weights_digest" in line
    }
    return dict(session.mesh.world.broadcast_json(list(told.items())))


def _check_snapshot(session: Session, path: Path, found: Mapping[int, str]) -> list[str]:
    """Return what is wrong with a snapshot; the ranks share its files."""
    world = session.mesh.world
    problems: list[str] = []
    try:
        snapshot = Snapshot(path)
        if snapshot.weights_digest != found.get(snapshot.iteration):
            problems.append(
                f"snapshot {path.name}: it says that its weights have the digest {snapshot.weights_digest}; "
                f"wanted {found.get(snapshot.iteration, 'one of an iteration that the journal has')}"
            )
        damaged = snapshot.damaged_files(part=world.rank, num_parts=world.world_size)
        problems += [f"snapshot {path.name}: {name} is damaged" for name in damaged]
    except SnapshotError as error:
        problems.append(f"snapshot {path.name}: {error}")
    every = world.gather_json(problems)
    return sorted({problem for each in every for problem in each})


def _export_digest(session: Session, export: Path) -> tuple[str | None, list[str]]:
    """Return the digest of the weights in a model directory, or None and what is wrong with them."""
    part, problem = 0, None
    try:
        checkpoint = Checkpoint(export)
        part = checkpoint_digest(session.weights, checkpoint)
    except (UserError, OSError) as error:
        problem = str(error).removeprefix("model.path: ")
    problems = sorted({each for each in session.mesh.world.gather_json(problem) if each is not None})
    return (None, problems) if problems else (session.combined(part), [])
