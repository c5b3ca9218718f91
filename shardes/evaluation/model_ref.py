"""Resolve ``--model DIR|RUN_DIR[@K]``, importing nothing heavy."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardes.config.consent import keys_of, load_trusted, with_consent
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
            session.follow(self.history.header, self.run_dir)
            restore_weights(
                session,
                self.history.updates[: self.iteration],
                digests=self.history.digests,
                run_dir=self.run_dir,
            )


# Sections of a run's configuration that an evaluation uses.
_USED = tuple(name for name in Config.model_fields if name not in ("run", "log"))


def resolve_model(
    model: str, *, config_path: Path | None, overrides: list[str], is_trusted: bool = False
) -> ModelRef:
    """Return the model that ``--model DIR|RUN_DIR[@K]`` and ``--config FILE`` refer to.

    The sections ``model``, ``es`` and ``weights`` are those of the run, all others those of the file, which
    is the run's own configuration if none is given.

    Args:
        model: Value of ``--model``.
        config_path: YAML file of the configuration; None: that of the run.
        overrides: Changes of keys, as ``KEY=VALUE``.
        is_trusted: Whether the person has consented to what a run's files ask for (``consent.py``).

    Raises:
        UserError: There is no such model, run or iteration, or a run asks for what takes consent.
    """
    path, at, wanted = Path(model), "", ""
    if not path.is_dir():
        text, at, wanted = model.rpartition("@")
        path = Path(text)
    if (path / "config.json").is_file() and not at:
        if config_path is None:
            raise UserError(f"--config: give the YAML file that says what {path} is asked")
        # The path is the person's own, as what they say of it is.
        overrides = [*overrides, f"model.path={json.dumps(str(path))}"]
        overrides += ["model.trust_remote_code=true"] if is_trusted else []
        return ModelRef(load_trusted(config_path, overrides, is_trusted=is_trusted))
    if not (path / "journal.jsonl").is_file():
        raise UserError(
            f"--model {model}: neither a model directory (with config.json) nor a run directory (with "
            "journal.jsonl); give DIR, RUN_DIR, RUN_DIR@K for the weights after K iterations, or RUN_DIR@best"
        )
    origin = path / "config.yaml"
    # Beside a file of the person's own, what they change is that file, but for the consent to code.
    taken = [
        each for each in overrides if config_path is None or keys_of([each]) == ["model.trust_remote_code"]
    ]
    own = load_config(origin, taken)
    history, *_ = read_journal(path / "journal.jsonl")
    if history.header is None:
        raise UserError(f"--model {model}: its journal is empty; nothing can be evaluated")
    config = with_consent(
        own,
        origin=origin,
        is_trusted=is_trusted,
        own=keys_of(taken),
        sections=("model",) if config_path else _USED,
    )
    if config_path is not None:
        asked = load_trusted(config_path, overrides, is_trusted=is_trusted)
        config = asked.model_copy(update={"model": config.model, "es": config.es, "weights": config.weights})
    return ModelRef(config, path, history, history.iteration_of(wanted or None, key=f"--model {model}"))
