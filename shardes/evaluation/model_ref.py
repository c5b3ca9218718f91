"""Resolve names of models, ``DIR|NAME[@REVISION]|RUN_DIR[@K]``, importing nothing heavy."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardes.config.consent import keys_of, load_trusted, with_consent
from shardes.config.es import EsConfig
from shardes.config.loading import load_config
from shardes.config.schema import Config, ModelConfig, WeightsConfig
from shardes.errors import UserError
from shardes.runs.journal import History, commit_of, read_journal

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

    @property
    def recorded_commit(self) -> str | None:
        """Return the commit of the model of the hub with which the run began; None if there is none."""
        header = None if self.history is None else self.history.header
        return None if header is None else commit_of(header, self.config.model.hub_id)

    def with_config(self, config: Config) -> "ModelRef":
        """Return the reference with another configuration, whose model is here."""
        return replace(self, config=config)

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


@dataclass(frozen=True)
class _Place:
    """Place that a model's name leads to: a model directory, a model of the hub, or a run.

    Of the latter two, which revision or which iteration is wanted.
    """

    name: str
    path: Path
    is_run: bool
    wanted: str | None = None
    revision: str | None = None


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
    place = _locate(model, name=f"--model {model}")
    if not place.is_run:
        if config_path is None:
            raise UserError(f"--config: give the YAML file that says what {place.path} is asked")
        # The path is the person's own, as what they say of it is.
        revision = f"model.revision={json.dumps(place.revision)}"
        overrides = [*overrides, f"model.path={json.dumps(str(place.path))}", revision]
        overrides += ["model.trust_remote_code=true"] if is_trusted else []
        return ModelRef(load_trusted(config_path, overrides, is_trusted=is_trusted))
    # Beside a file of the person's own, what they change is that file, but for the consent to code.
    taken = [
        each for each in overrides if config_path is None or keys_of([each]) == ["model.trust_remote_code"]
    ]
    config = _config_of(place, taken, is_trusted=is_trusted, sections=("model",) if config_path else _USED)
    if config_path is not None:
        asked = load_trusted(config_path, overrides, is_trusted=is_trusted)
        config = _with_weights_of(config, asked)
    return _reference(place, config)


def resolve_models(
    models: Sequence[str], *, config_path: Path | None, overrides: list[str], is_trusted: bool = False
) -> tuple[Config, list[ModelRef]]:
    """Return several models that are asked the same, and the configuration that says what.

    Of a run, the sections ``model``, ``es`` and ``weights`` are its own, and overrides change ``model``
    alone. A model directory has the section ``model`` of the configuration, but for the path.

    Args:
        models: Names of the models, as for ``--model``.
        config_path: YAML file of the configuration; None: that of the first run.
        overrides: Changes of keys, as ``KEY=VALUE``.
        is_trusted: Whether the person has consented to what a run's files ask for (``consent.py``).

    Raises:
        UserError: There is no such model, run or iteration, or a run asks for what takes consent.
    """
    places = [_locate(model, name=model) for model in models]
    if config_path is not None:
        asked = load_trusted(config_path, overrides, is_trusted=is_trusted)
    else:
        first = next((place for place in places if place.is_run), None)
        if first is None:
            raise UserError("--config: give the YAML file that says what is asked; no model is a run's")
        asked = _config_of(first, overrides, is_trusted=is_trusted, sections=_USED)
    # The centre is evaluated by itself, with whatever noise the runs have.
    asked = asked.model_copy(update={"rollout": asked.rollout.model_copy(update={"members_per_forward": 1})})
    taken = [each for each in overrides if keys_of([each])[0].startswith("model.")]
    references = []
    for place in places:
        if place.is_run:
            own = _config_of(place, taken, is_trusted=is_trusted, sections=("model",))
            references.append(_reference(place, _with_weights_of(own, asked)))
            continue
        trust = is_trusted or asked.model.trust_remote_code
        model = asked.model.model_copy(
            update={"path": place.path, "revision": place.revision, "trust_remote_code": trust}
        )
        # It is not trained: patterns of another model's parameters and masters are of no use to it.
        parts = {
            "model": model,
            "es": EsConfig(iterations=1, seed=asked.es.seed),
            "weights": WeightsConfig(master="model"),
        }
        references.append(ModelRef(asked.model_copy(update=parts)))
    return asked, references


def _locate(model: str, *, name: str) -> _Place:
    """Return the place of a model directory, of a model of the hub, or of a run.

    Args:
        model: ``DIR``, ``NAME``, ``NAME@REVISION``, ``RUN_DIR``, ``RUN_DIR@K`` or ``RUN_DIR@best``.
        name: Its name in messages.

    Raises:
        UserError: There is neither.
    """
    path, at, wanted = Path(model), "", ""
    if not path.is_dir():
        text, at, wanted = model.rpartition("@")
        path = Path(text)
    if (path / "config.json").is_file() and not at:
        return _Place(name, path, is_run=False)
    if (path / "journal.jsonl").is_file():
        return _Place(name, path, is_run=True, wanted=wanted or None)
    hub_id, _, revision = model.partition("@")
    is_iteration = revision.isdecimal() or revision == "best" or ("@" in model and not revision)
    # Names of one part are of the hub in model.path alone: here, they are more often a mistyped directory.
    if not is_iteration and "/" in hub_id and ModelConfig(path=Path(hub_id)).hub_id is not None:
        return _Place(name, Path(hub_id), is_run=False, revision=revision or None)
    raise UserError(
        f"{name}: neither a model directory (with config.json) nor a run directory (with "
        "journal.jsonl); give DIR, RUN_DIR, RUN_DIR@K for the weights after K iterations, or RUN_DIR@best; "
        "for a model of the hub ORGANISATION/MODEL[@REVISION]"
    )


def _config_of(place: _Place, overrides: list[str], *, is_trusted: bool, sections: tuple[str, ...]) -> Config:
    """Return a run's own configuration, if the sections that are used ask for nothing without consent."""
    origin = place.path / "config.yaml"
    return with_consent(
        load_config(origin, overrides),
        origin=origin,
        is_trusted=is_trusted,
        own=keys_of(overrides),
        sections=sections,
    )


def _with_weights_of(run: Config, asked: Config) -> Config:
    return asked.model_copy(update={"model": run.model, "es": run.es, "weights": run.weights})


def _reference(place: _Place, config: Config) -> ModelRef:
    history, *_ = read_journal(place.path / "journal.jsonl")
    if history.header is None:
        raise UserError(f"{place.name}: its journal is empty; nothing can be evaluated")
    iteration = history.iteration_of(place.wanted, key=place.name)
    return ModelRef(config, place.path, history, iteration)
