"""``a.b=value`` on the command line: the value as it was typed where the key wants a text, else as YAML."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from shardes.config.old_keys import current_name
from shardes.config.schema import Config
from shardes.config.yaml_text import YamlError, parse_scalar, parse_yaml
from shardes.errors import UserError

_NULLS = ("null", "~")


def parse_override(override: str) -> tuple[str, Any]:
    """Return the dotted key and the value of ``a.b=value`` or ``--a.b=value``.

    Raises:
        UserError: It does not look like that, or the value is none that such a key may have.
    """
    key, equals, text = override.removeprefix("--").partition("=")
    if not equals or not key:
        raise UserError(
            f"override {override!r}: must look like section.key=value, for example es.sigma=0.001"
        )
    try:
        # Where the locale is not UTF-8, Python leaves other bytes as halves of surrogates.
        key, text = (os.fsencode(part).decode("utf-8") for part in (key, text))
        annotation = annotation_of(current_name(key).split("."))
        kinds = _kinds_of(annotation)
        if Path in kinds:
            os.fsencode(text)
    except UnicodeError:
        raise UserError(
            f"override {override!r}: is not UTF-8 text, or this job's locale has no such file names "
            f"({sys.getfilesystemencoding()}); set LC_ALL=C.UTF-8"
        ) from None
    try:
        return key, _value(text, kinds, has_texts=_has_texts(annotation))
    except YamlError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}; quote it") from None


def annotation_of(location: Sequence[str]) -> Any:
    """Return the type of the key at a place in the configuration; Any if there is none."""
    section: type[BaseModel] | None = Config
    parts = list(location)
    while parts:
        field = section.model_fields.get(parts.pop(0)) if section is not None else None
        if field is None:
            return Any
        if not parts:
            return field.annotation
        if len(parts) == 1 and get_origin(field.annotation) is dict:
            return get_args(field.annotation)[1]
        section, is_container = section_of(field.annotation)
        if is_container:
            parts.pop(0)
    return Any


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the section that an annotation is about, and whether it holds several, by index or by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for argument in get_args(annotation):
        section, _ = section_of(argument)
        if section is not None:
            is_optional = get_origin(annotation) in (Union, UnionType)
            return section, not is_optional or section_of(argument)[1]
    return None, False


def _kinds_of(annotation: Any) -> set[Any]:
    """Return the plain types that a value may have; a Literal has those of its values."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds_of(part)}
    if origin is Annotated:
        return _kinds_of(get_args(annotation)[0])
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {origin or annotation}


def _has_texts(annotation: Any) -> bool:
    """Return whether a key wants a list of texts, or texts by name."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return any(part in (list[str], dict[str, str]) for part in parts)


def _value(text: str, kinds: set[Any], *, has_texts: bool) -> Any:
    if kinds <= {str, Path, NoneType}:
        return _text(text, kinds)
    if kinds <= {str, int, float, bool, NoneType} and text[:1] not in tuple("[{&*!|>'\""):
        # A comment is no part of YAML's value, but it is a part of what was typed.
        return parse_scalar(text.strip())
    if has_texts and text.strip() in ("", *_NULLS):
        return None
    return parse_yaml(text, may_have_comments=False, has_texts=has_texts)


def _text(text: str, kinds: set[Any]) -> str | None:
    if NoneType in kinds and (text in _NULLS or (not text and Path in kinds)):
        return None
    if _is_quoted(text):
        with contextlib.suppress(YamlError):
            value = parse_yaml(text)
            return value if isinstance(value, str) else text
    return text


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
