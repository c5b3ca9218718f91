"""Numbers of bytes on the command line."""

from typing import Annotated, Any

import click
from annotated_types import Gt
from pydantic import ByteSize, TypeAdapter, ValidationError


class Size(click.ParamType):
    """Option type for a number of bytes, as people write it: ``80GiB`` or ``5000000``.

    Args:
        positive: Whether 0 is refused.
    """

    name = "SIZE"

    def __init__(self, *, positive: bool = False) -> None:
        self._type = TypeAdapter(Annotated[ByteSize, Gt(0)] if positive else ByteSize)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes that a text says."""
        try:
            return int(self._type.validate_python(value))
        except ValidationError:
            self.fail(
                f"got {value!r}; wanted a number of bytes, or one with a unit, such as 80GiB", param, ctx
            )
