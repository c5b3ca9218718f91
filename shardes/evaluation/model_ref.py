"""Resolve ``--model DIR|RUN_DIR[@K]``, importing nothing heavy."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardes.config.loading import load_config
from shardes.config.schema import Config
from shardes.errors import UserError
from shardes.runs.journal import History, read_journal

if TYPE_CHECKING:
    from shardes.session import Session


@dataclass(frozen=True)
class ModelRef:
    """Reference to a model to evaluate.

    Attributes:
        config: Configuration that it is evaluated with.
        run_dir: Directory of the run that has the weights; None for a model directory.
        history: Content of the run's journal; None for a model directory.
        iteration: Number of the run's updates that are applied to the base weights.
    """

    config: Config
    run_dir: Path | None = None
    history: History | None = None
    iteration: int = 0

    @property
    def date(self) -> str | None:
        """Return the date that the prompts of the run have, in ISO format; None if they have none."""
        header = None if self.history is None else self.history.header
        return None if header is None else header["settings"].get("task.date")

    def restore(self, session: "Session") -> None:
        """Bring a session's model to the weights to evaluate; a collective of all ranks.

        Raises:
            UserError: The base model or the noise definition is not that of the run.
        """
        if self.history is not None and self.run_dir is not None:
            from shardes.runs.resume import restore_weights

            assert self.history.header is not None, "a run has begun"
            session.check_base(self.history.header, self.run_dir)
            restore_weights(
                session,
                self.history.updates[: self.iteration],
                digests=self.history.digests,
                run_dir=self.run_dir,
            )


def resolve_model(model: str, *, config_path: Path | None, overrides: list[str]) -> ModelRef:
    """Return the model that ``--model DIR|RUN_DIR[@K]`` and ``--config FILE`` refer to.

    The sections ``model``, ``es`` and ``weights`` are those of the run, all others those of the file, which
    is the run's own configuration if none is given.

    Args:
        model: Value of ``--model``.
        config_path: YAML file of the configuration; None: that of the run.
        overrides: Changes of keys, as ``KEY=VALUE``.

    Raises:
        UserError: There is no such model, run or iteration.
    """
    path, at, wanted = Path(model), "", ""
    if not path.is_dir():
        text, at, wanted = model.rpartition("@")
        path = Path(text)
    if (path / "config.json").is_file() and not at:
        if config_path is None:
            raise UserError(f"--config: give the YAML file that says what {path} is asked")
        return ModelRef(load_config(config_path, [*overrides, f"model.path={json.dumps(str(path))}"]))
    if not (path / "journal.jsonl").is_file():
        raise UserError(
            f"--model {model}: neither a model directory (with config.json) nor a run directory (with "
            "journal.jsonl); give DIR, RUN_DIR, RUN_DIR@K for the weights after K iterations, or RUN_DIR@best"
        )
    own = load_config(path / "config.yaml", [] if config_path else overrides)
    config = own
    if config_path is not None:
        asked = load_config(config_path, overrides)
        config = asked.model_copy(update={"model": own.model, "es": own.es, "weights": own.weights})
    history, *_ = read_journal(path / "journal.jsonl")
    if history.header is None:
        raise UserError(f"--model {model}: its journal is empty; nothing can be evaluated")
    return ModelRef(config, path, history, history.iteration_of(wanted or None, key=f"--model {model}"))
