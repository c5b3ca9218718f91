"""The weights of a run as a model directory, from its journal."""

from dataclasses import dataclass
from pathlib import Path

import torch

from shardes.export.writer import MAX_FILE_BYTES, check_destination, export_model
from shardes.runs.directory import read_run
from shardes.runs.resume import restore_weights
from shardes.session import open_session
from shardes.utils.files import cannot_write


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        iteration: After how many updates the weights are.
        dtype: Theirs.
        is_main: Whether this is rank 0, which wrote them.
    """

    iteration: int
    dtype: str
    is_main: bool


def export_run(
    run_dir: Path,
    out: Path,
    *,
    iteration: str | None = None,
    base: Path | None = None,
    backend: str = "single",
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Replays a run's journal over its base model and exports the weights; a collective of all ranks.

    Args:
        run_dir: The run directory.
        out: A directory that does not exist, or is empty.
        iteration: After how many updates, or ``best`` by held-out reward; None: all.
        base: Where the base model is; None: where the run had it.
        backend: What spreads the model over ranks.
        dtype: Of the exported weights; None: in which the model was trained.
        max_file_bytes: Files are no larger, unless one parameter is.

    Raises:
        UserError: There is no such run or iteration, ``out`` is taken, or the base model is another.
        StorageError: The export cannot be written.
    """
    config, header, history = read_run(run_dir, base=base, backend=backend)
    wanted = history.iteration_of(iteration, key=f"--iteration {iteration}")
    check_destination(out)
    with open_session(config) as session:
        session.check_base(header, run_dir)
        restore_weights(session, history.updates[:wanted], digests=history.digests, run_dir=run_dir)
        try:
            export_model(
                session,
                out,
                iteration=wanted,
                settings=header["settings"],
                history=history,
                dtype=None if dtype is None else getattr(torch, dtype),
                max_file_bytes=max_file_bytes,
            )
        except OSError as error:
            raise cannot_write(out, error) from error
        return Exported(wanted, dtype or config.model.dtype, session.mesh.world.is_main)
