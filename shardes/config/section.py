"""The base class of the sections of a configuration, and a validator of names."""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema

# How a path begins that a shell would have replaced.
_VARIABLE = re.compile(r"\$(\w|\{)")


@dataclass(frozen=True)
class Registered:
    """Annotation of a text that must be a name of a registry; it suggests the nearest for any other.

    Attributes:
        kind: What the names are of, in the singular.
        names: Returns them; called when a value is checked, so that the registry may be imported late.
    """

    kind: str
    names: Callable[[], Iterable[str]]

    def check(self, value: str) -> str:
        """Return the value if it is a name.

        Raises:
            ValueError: It is none; the message has the nearest name, and all of them.
        """
        known = list(self.names())
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"got {value!r}; {guess}Known {self.kind}s: {', '.join(known)}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(schema) | {"enum": list(self.names())}


@dataclass(frozen=True)
class NeedsConsent:
    """Annotation of a key by which a configuration makes more happen than reading and computing.

    A run's own configuration may not do that by itself (``consent.py``).

    Attributes:
        reason: What a value makes happen, for messages.
        is_asked: Returns whether a value asks for it.
    """

    reason: str
    is_asked: Callable[[Any], bool] = bool


class Section(BaseModel):
    """A group of keys; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``true`` where it would silently become 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"got {str(value).lower()}, which is neither a number nor a text")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _home_is_expanded(cls, value: Any, info: ValidationInfo) -> Any:
        """Replace ``~`` at the beginning of a path by the home directory, as a shell does.

        What only a shell would replace, and what an unset variable of a shell leaves, is refused.
        """
        annotation = cls.model_fields[str(info.field_name)].annotation
        is_path = Path in (annotation, *get_args(annotation))
        if not is_path or not isinstance(value, str | Path):
            return value
        if value == "":
            raise ValueError("got an empty text; give a path (. is the current directory)")
        if "\0" in str(value):
            raise ValueError(f"got {str(value)!r}, which has a character that no path has")
        if _VARIABLE.match(str(value)):
            raise ValueError(
                f"got {value}; variables of the environment are not replaced: give the path itself"
            )
        if not str(value).startswith("~"):
            return value
        try:
            return Path(value).expanduser()
        except RuntimeError:
            raise ValueError(
                f"got {value}, whose home directory is not known; give the whole path, or ./{value} for a "
                "directory of that name"
            ) from None
