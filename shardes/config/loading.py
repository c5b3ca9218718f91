"""Reading of configurations from YAML files and ``a.b=value`` overrides, with messages about mistakes.

Nothing heavy is imported, so that a mistake is answered at once.
"""

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shardes.config.old_keys import apply_changes
from shardes.config.overrides import parse_override, section_of
from shardes.config.schema import Config
from shardes.config.task import is_hub_reference, is_range
from shardes.config.yaml_text import MAX_BYTES, YamlError, dump_yaml, file_text, parse_yaml
from shardes.errors import UserError
from shardes.utils.reading import read_regular

_SHOWN_CHARACTERS = 200
_KINDS = {bool: "a truth value, as yes, no, on and off are", int: "a number", float: "a number"}


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read a YAML file and apply ``a.b=value`` (or ``--a.b=value``) overrides.

    Raises:
        UserError: The file cannot be read, or a key or value is wrong.
    """
    return parse_config(read_tree(path, overrides), source=str(path))


def read_tree(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the sections of a YAML file with overrides, not checked yet.

    Raises:
        UserError: The file cannot be read, or an override is none.
    """
    tree = _read_tree(path, role="--config", remedy="give the path of a YAML file")
    apply_changes(tree, map(parse_override, overrides), source=str(path))
    return tree


def load_run_config(run_dir: Path, changes: dict[str, Any]) -> Config:
    """Return the configuration that a run directory holds, with some dotted keys changed.

    Raises:
        UserError: The directory holds no usable configuration.
    """
    path = run_dir / "config.yaml"
    tree = _read_tree(path, role="RUN_DIR", remedy="give the directory of a run")
    apply_changes(tree, changes.items(), source=str(path))
    return parse_config(tree, source=str(path))


def _read_tree(path: Path, *, role: str, remedy: str) -> dict[str, Any]:
    """Return the sections of a YAML file; ``role`` is what the user gave it as."""
    try:
        tree = parse_yaml(file_text(read_regular(path, max_bytes=MAX_BYTES)))
    except OSError as error:
        raise UserError(f"{role} {path}: cannot be read ({error.strerror}); {remedy}") from None
    except YamlError as error:
        raise UserError(f"{role} {path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{role} {path}: must be a mapping of sections such as 'model:' and 'es:'")
    return tree


def parse_config(tree: dict[str, Any], *, source: str) -> Config:
    """Check a tree of keys and values; ``source`` names where it came from in errors.

    Raises:
        UserError: A key or value is wrong; the message lists every mistake.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for detail in error.errors():
            location = _location(detail["loc"])
            problems.setdefault(".".join(location), []).append(_explain(detail, location))
        lines = [f"  {key}: {', or '.join(explanations)}" for key, explanations in problems.items()]
        raise UserError("\n".join([f"{source}: the configuration cannot be used", *lines])) from None


def _explain(detail: ErrorDetails, location: list[str]) -> str:
    """Return what one key got, what was wanted, and the remedy."""
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = sorted(_keys_of(location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        guess = f"did you mean '{'.'.join([*location[:-1], near[0]])}'? " if near else ""
        return f"unknown key; {guess}Known keys: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"missing; set it in the file, or give {key}=... on the command line"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message
    got = repr(detail["input"])
    if len(got) > _SHOWN_CHARACTERS:
        got = f"{got[:_SHOWN_CHARACTERS]}..."
    remedy = ""
    if detail["type"] in ("string_type", "path_type") and isinstance(detail["input"], bool | int | float):
        remedy = f"; YAML takes it for {_KINDS[type(detail['input'])]}: put quotes around it"
    return f"got {got}; {message[0].lower()}{message[1:]}{remedy}"


def _location(loc: tuple[int | str, ...]) -> list[str]:
    """Return the part of a place in the tree that the user wrote: pydantic adds the members of unions."""
    location: list[str] = []
    section: type[BaseModel] | None = Config
    parts = list(loc)
    while parts and section is not None:
        part = str(parts.pop(0))
        location.append(part)
        if part not in section.model_fields:
            break
        section, is_container = section_of(section.model_fields[part].annotation)
        if is_container and parts:
            location.append(str(parts.pop(0)))
    return location


def _keys_of(location: list[str]) -> list[str]:
    """Return the known keys of the section at ``location``."""
    section: type[BaseModel] = Config
    parts = list(location)
    while parts:
        found, is_container = section_of(section.model_fields[parts.pop(0)].annotation)
        if found is None:
            return []
        section = found
        if is_container and parts:
            parts.pop(0)
    return list(section.model_fields)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, its paths absolute: it is read again from anywhere."""
    tree = _with_absolute_paths(config.model_dump())
    if config.model.hub_id is not None:
        tree["model"]["path"] = config.model.hub_id
    return dump_yaml(tree)


def _with_absolute_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_absolute_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_absolute_paths(part) for part in value]
    if isinstance(value, Path):
        return str(value if is_hub_reference(value) or is_range(value) else value.absolute())
    return value
