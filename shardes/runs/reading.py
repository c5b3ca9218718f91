"""Reading what a run directory holds, for those who want its weights; nothing heavy is imported."""

from pathlib import Path
from typing import Any

from shardes.config.loading import load_run_config
from shardes.config.schema import Config
from shardes.errors import UserError
from shardes.runs.journal import History, read_journal


def read_run_journal(run_dir: Path) -> tuple[dict[str, Any], History, int, int]:
    """The header and all of a run's journal, how many of its bytes are whole lines, and how many it has.

    Raises:
        UserError: There is none, or it is empty.
    """
    path = run_dir / "journal.jsonl"
    if not path.is_file():
        raise UserError(f"RUN_DIR {run_dir}: {path} does not exist; give the directory of a run")
    history, _, good_bytes, num_bytes = read_journal(path)
    if history.header is None:
        raise UserError(f"RUN_DIR {run_dir}: its journal is empty; nothing can be replayed")
    return history.header, history, good_bytes, num_bytes


def read_run(run_dir: Path, *, base: Path | None, backend: str) -> tuple[Config, dict[str, Any], History]:
    """The configuration, for ranks of our own, and the journal of a run whose weights are wanted.

    Args:
        run_dir: The run directory.
        base: Where the base model is; None: where the run had it.
        backend: What spreads the model over ranks.

    Raises:
        UserError: The directory holds no run.
    """
    changes: dict[str, str | None] = {"run.dir": str(run_dir), "parallel.backend": backend}
    changes |= {"parallel.deepspeed": None, "parallel.shard_size": None, "rollout.mode": "auto"}
    if base is not None:
        changes["model.path"] = str(base)
    config = load_run_config(run_dir, changes)
    header, history, *_ = read_run_journal(run_dir)
    return config, header, history
