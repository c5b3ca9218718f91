"""Export of a run's weights as a model directory, from its journal."""

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
    """Facts about an export.

    Attributes:
        iteration: Number of updates that the weights have had.
        dtype: Dtype of the weights.
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
    is_trusted: bool = False,
) -> Exported:
    """Replay a run's journal over its base model and export the weights; a collective of all ranks.

    Args:
        run_dir: The run directory.
        out: Directory to write; it must not exist, or be empty.
        iteration: Number of updates, or ``best`` by held-out reward; None: all updates.
        base: Directory of the base model; None: the run's ``model.path``.
        backend: Backend that shards the model over ranks.
        dtype: Dtype of the exported weights; None: the dtype that the model was trained in.
        max_file_bytes: Largest size of a file, unless one parameter is larger.
        is_trusted: Whether code of the model directory may run, if the run's configuration asks for it.

    Raises:
        UserError: There is no such run or iteration, ``out`` is taken, or the base model is another.
        StorageError: The export cannot be written.
    """
    config, header, history = read_run(run_dir, base=base, backend=backend, is_trusted=is_trusted)
    wanted = history.iteration_of(iteration, key=f"--iteration {iteration}")
    check_destination(out)
    with open_session(config) as session:
        session.follow(header, run_dir)
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
