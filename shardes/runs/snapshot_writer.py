"""Writing of snapshots while training goes on."""

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from shardes.distributed.group import Mesh
from shardes.errors import UserError
from shardes.runs.snapshot import find_snapshots, snapshot_path, write_manifest, write_part
from shardes.utils.device import synchronize
from shardes.utils.files import sync_directory
from shardes.weights.master import Weights
from shardes.weights.snapshot_view import owned_tensors

logger = logging.getLogger(__name__)

_INCOMPLETE = ".incomplete"


class SnapshotWriter:
    """Writer of a run's snapshots; every rank has one, and all call it alike.

    The masters change only in updates, so between two of them a thread of each rank writes its own to a file,
    straight from where they are. The next update waits for what is not written by then. Only there do the
    ranks tell each other how it went, and rank 0 completes the snapshot: no collective happens behind the
    back of the main thread.

    A snapshot that cannot be written is a warning: the journal has all that it would have had.

    Args:
        run_dir: The run directory, seen by every rank of the first replica.
        every: Iterations between snapshots; 0: none.
        keep: Number of snapshots that are kept.
        mesh: The ranks.
        weights: The master shards that are written.
        is_sharded: Whether the ranks of a replica hold different elements.
    """

    def __init__(
        self, run_dir: Path, *, every: int, keep: int, mesh: Mesh, weights: Weights, is_sharded: bool
    ) -> None:
        self._run_dir = run_dir
        self._every = every
        self._keep = keep
        self._world = mesh.world
        self._weights = weights
        # The first replica's elements are everyone's.
        self._is_writer = mesh.replica == 0 and (is_sharded or mesh.shard.is_main)
        self._part = f"rank-{mesh.shard.rank:05d}.safetensors"
        self._writing: _Writing | None = None
        # Iteration and digests of the snapshot that is being taken; the same on every rank.
        self._current: tuple[int, str, str] | None = None

    def open(self) -> None:
        """Make the directory, and remove what a dead job did not complete; a collective.

        Raises:
            UserError: A rank that would have to write there does not see it, or it is a link to snapshots of
                another run.
        """
        if not self._every:
            return
        directory = self._run_dir / "snapshots"
        # Old ones are removed there, whoever made them.
        home = directory.resolve().parent
        is_another_runs = home != self._run_dir.resolve() and (home / "journal.jsonl").exists()
        if self._world.broadcast_json(is_another_runs):
            raise UserError(
                f"run.snapshot_every: {directory} is a link to the snapshots of another run, in {home}, "
                "which would be removed; remove the link"
            )
        problem = self._make(directory, without=directory.glob(f"*{_INCOMPLETE}"), exist_ok=True)
        if problem is not None:
            raise UserError(
                f"run.snapshot_every: no snapshot can be written ({problem}); make room, or set it to 0: the "
                "journal alone is enough to go on from"
            )
        sees = self._world.gather_json(directory.is_dir() or not self._is_writer)
        blind = [rank for rank, sees_it in enumerate(sees) if not sees_it]
        if blind:
            raise UserError(
                f"run.snapshot_every: rank(s) {', '.join(map(str, blind))} do not see {directory} of rank 0, "
                "so they cannot write their parts; put run.dir where all machines see it, or set "
                "run.snapshot_every=0: the journal alone is enough to go on from"
            )

    def is_due(self, iteration: int) -> bool:
        """Return whether there is to be a snapshot after ``iteration`` updates."""
        return bool(self._every) and iteration % self._every == 0

    def begin(self, iteration: int, *, digest: str, states_digest: str) -> None:
        """Start to write the weights, which are not to change before ``finish``; a collective.

        Args:
            iteration: Number of updates that the weights have had.
            digest: The digest of the weights.
            states_digest: The digest of the optimizer's states.
        """
        directory = self._incomplete(iteration)
        problem = self._make(directory, without=[directory])
        if problem is not None:
            self._warn(iteration, problem)
            return
        self._current = iteration, digest, states_digest
        if self._is_writer:
            self._writing = _Writing(directory / self._part, self._weights)

    def finish(self) -> None:
        """Wait until the snapshot that was begun, if any, is written, and complete it; a collective."""
        if self._current is None:
            return
        (iteration, digest, states_digest), self._current = self._current, None
        writing, self._writing = self._writing, None
        reports = self._world.gather_json(None if writing is None else writing.report())
        if not self._world.is_main:
            return
        problems = [report["problem"] for report in reports if report and "problem" in report]
        files = [report["file"] for report in reports if report and "file" in report]
        directory = self._incomplete(iteration)
        try:
            if problems:
                raise OSError(problems[0])
            write_manifest(
                directory, iteration=iteration, digest=digest, states_digest=states_digest, files=files
            )
            self._put_in_place(directory, snapshot_path(self._run_dir, iteration))
            self._remove_old(iteration)
        except OSError as error:
            self._warn(iteration, str(error))
            shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Give up a snapshot that is not complete; no collective."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        self._current = None

    def _make(self, directory: Path, *, without: Iterable[Path], exist_ok: bool = False) -> str | None:
        """Remove some directories and make one, on rank 0; return the problem there is, on all ranks."""
        problem = None
        if self._world.is_main:
            try:
                for path in without:
                    shutil.rmtree(path, ignore_errors=True)
                directory.mkdir(parents=True, exist_ok=exist_ok)
            except OSError as error:
                problem = str(error)
        return self._world.broadcast_json(problem)

    def _incomplete(self, iteration: int) -> Path:
        final = snapshot_path(self._run_dir, iteration)
        return final.with_name(final.name + _INCOMPLETE)

    def _put_in_place(self, directory: Path, final: Path) -> None:
        """Give a complete snapshot its name; one of that name, left from a longer journal, makes room."""
        if final.exists():
            self._remove(final)
        directory.rename(final)
        sync_directory(final.parent)

    def _remove_old(self, iteration: int) -> None:
        """Remove all but the newest; those of later iterations, left from a longer journal, do not count."""
        past = [each for each in find_snapshots(self._run_dir) if each <= iteration]
        for each in past[self._keep :]:
            self._remove(snapshot_path(self._run_dir, each))

    def _remove(self, path: Path) -> None:
        """Remove a snapshot; whenever that is interrupted, there is no half of one under its name."""
        doomed = path.with_name(f"{path.name}.old{_INCOMPLETE}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _warn(self, iteration: int, problem: str) -> None:
        if self._world.is_main:
            logger.warning(
                "the snapshot of iteration %d could not be written (%s); the run goes on, and can be resumed "
                "from its journal and older snapshots",
                iteration,
                problem,
            )


class _Writing:
    """The thread that writes one rank's part of a snapshot."""

    def __init__(self, path: Path, weights: Weights) -> None:
        self._report: dict[str, Any] = {}
        self._is_cancelled = threading.Event()
        tensors = list(owned_tensors(weights))
        on_device = _after_queued_work(tensors[0][2].device) if tensors else contextlib.nullcontext

        def write() -> None:
            try:
                with on_device():
                    file = write_part(path, tensors, is_cancelled=self._is_cancelled.is_set)
                self._report = {"file": file}
            except Exception as error:  # whatever it is, it is the snapshot's alone
                self._report = {"problem": f"{path.name}: {error}"}

        self._thread = threading.Thread(target=write, name="snapshot", daemon=True)
        self._thread.start()

    def report(self) -> dict[str, Any]:
        """Wait for the end; return the file's entry in the manifest, or the problem."""
        self._thread.join()
        return self._report

    def cancel(self) -> None:
        """End the writing soon, and wait for that."""
        self._is_cancelled.set()
        self._thread.join()


def _after_queued_work(
    device: torch.device,
) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """Return a context in which another thread's copies from the device see all that was computed by now."""
    synchronize(device)
    module = torch.get_device_module(device)
    stream = module.Stream(device)
    return lambda: module.stream(stream)
