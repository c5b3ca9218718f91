"""Consent to what a run's own configuration makes happen besides reading: it is given by the person alone.

A run directory may come from somebody else. What is in it, and what it names, is read and computed with; that
code runs, or that something is fetched or written elsewhere, takes a word on the command line. A file of a
run is nobody's word.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from shardes.config.loading import load_config
from shardes.config.old_keys import current_name
from shardes.config.schema import Config
from shardes.config.section import NeedsConsent
from shardes.errors import UserError
from shardes.utils.hub_cache import find_cached
from shardes.utils.reading import read_regular

FLAG = "--trust-remote-code"
# Files of a model directory that may name code or a hub's kernel, by such a key, and the most of one that is
# looked at.
_NAMING_FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
_NAMING_KEY = re.compile(rb'auto_map|_implementation"\s*:\s*(?:"[^"]*/|\{)')
_MOST_BYTES = 1 << 26


def load_trusted(path: Path, overrides: list[str], *, is_trusted: bool) -> Config:
    """Read a YAML file with overrides; one that lies in a run directory needs consent to what it asks for.

    Args:
        path: The file.
        overrides: Changes of keys, as ``KEY=VALUE``; they are the person's own.
        is_trusted: Whether the person has given consent.

    Raises:
        UserError: The file cannot be used, or asks for what it may not.
    """
    return check_consent(load_config(path, overrides), path, overrides, is_trusted=is_trusted)


def check_consent(config: Config, path: Path, overrides: list[str], *, is_trusted: bool) -> Config:
    """Return the configuration that a file with overrides has, as ``load_trusted`` does.

    Raises:
        UserError: The file lies in a run directory, and asks for what it may not.
    """
    # Also where a link leads, or a link to a run's file would be the person's own.
    if not any((each.parent / "journal.jsonl").exists() for each in (path, path.resolve())):
        return config
    return with_consent(config, origin=path, is_trusted=is_trusted, own=keys_of(overrides))


def keys_of(overrides: Collection[str]) -> list[str]:
    """Return the dotted keys of ``KEY=VALUE`` overrides, by the names that they have today."""
    return [current_name(override.removeprefix("--").partition("=")[0]) for override in overrides]


def with_consent(
    config: Config,
    *,
    origin: Path,
    is_trusted: bool,
    own: Collection[str] = (),
    sections: Collection[str] = tuple(Config.model_fields),
) -> Config:
    """Return a run's configuration if it asks for nothing that takes consent, or that is given.

    ``model.trust_remote_code`` is turned off where the model directory has no code. A model of the hub that
    is in the cache already was fetched by the person's own word.

    Args:
        config: The configuration.
        origin: The file that it is from, for messages.
        is_trusted: Whether the person has given consent.
        own: Dotted keys, or sections, that the person has set.
        sections: Sections that are from the run, and are used.

    Raises:
        UserError: It asks for something else; the message names every key.
    """
    if is_trusted:
        return config
    asked = {
        key: f"  {key}: {value} ({need.reason})"
        for key, value, need in _asked(config)
        if key.partition(".")[0] in sections and not any(f"{key}.".startswith(f"{each}.") for each in own)
    }
    is_elsewhere = config.run.dir.resolve() != origin.resolve().parent
    if "run" in sections and is_elsewhere and not {"run", "run.dir"}.intersection(own):
        asked["run.dir"] = f"  run.dir: {config.run.dir} (written to, and not where this file is)"
    directory: Path | None = config.model.directory
    if config.model.hub_id is not None:
        directory = find_cached(config.model.hub_id, config.model.revision)
        if directory is not None:
            asked.pop("model.path", None)
    if "model.trust_remote_code" in asked and directory is not None and not _names_code(directory):
        del asked["model.trust_remote_code"]
        model = config.model.model_copy(update={"trust_remote_code": False})
        config = config.model_copy(update={"model": model})
    if asked:
        raise UserError(
            f"{origin}: it asks for what takes your consent, which no file of a run can give:\n"
            + "\n".join(asked.values())
            + f"\nLook at these first; then give {FLAG}, or where a command takes KEY=VALUE or --config, "
            "values of your own"
        )
    return config


def _asked(value: Any, key: str = "") -> Iterator[tuple[str, Any, NeedsConsent]]:
    """Yield the dotted keys whose values take consent."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            part, place = getattr(value, name), f"{key}.{name}" if key else name
            for need in field.metadata:
                if isinstance(need, NeedsConsent) and need.is_asked(part):
                    yield place, part, need
            yield from _asked(part, place)
    elif isinstance(value, dict | list):
        for index, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _asked(part, f"{key}.{index}")


def _names_code(model: Path) -> bool:
    """Return whether a model directory has Python files, or says where code is to be fetched from."""
    try:
        if any(model.glob("*.py")):
            return True
        files = [path for path in map(model.joinpath, _NAMING_FILES) if path.exists()]
        return any(_NAMING_KEY.search(read_regular(path, max_bytes=_MOST_BYTES)) for path in files)
    except OSError:
        return True  # what cannot be looked at may have it
