"""The base class of the sections of a configuration, and a validator of names."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


def registered(names: Iterable[str]) -> Callable[[str], str]:
    """Return a validator that accepts the names of a registry, and suggests the nearest for any other."""
    known = list(names)

    def check(value: str) -> str:
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"got {value!r}{guess} Known are: {', '.join(known)}")
        return value

    return check


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
