"""Choice of a harness: a program that plays an episode by asking the endpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardes.environments.base import EnvironmentSpec

ADAPTERS = {"verifiers": "shardes.environments.verifiers_harness:play"}
"""Harnesses that play other libraries' environments, which are named after the colon: ``verifiers:NAME``."""


@dataclass(frozen=True)
class HarnessSpec:
    """Choice of a harness.

    Attributes:
        reference: ``package.module:function`` or ``path/to/file.py:function``.
        arguments: Arguments of the function besides the row and the client, by name.
    """

    reference: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, reference: str, arguments: Mapping[str, Any] | None = None) -> "HarnessSpec":
        """Return the choice that a reference makes, which may name an adapter: ``verifiers:NAME``."""
        kind, _, name = reference.partition(":")
        if kind in ADAPTERS:
            return cls(ADAPTERS[kind], {"name": name, **(arguments or {})})
        return cls(reference, dict(arguments or {}))

    @property
    def is_adapted(self) -> bool:
        """Return whether it is an adapter's."""
        return self.reference in ADAPTERS.values()


def is_harness(spec: EnvironmentSpec) -> bool:
    """Return whether an environment is one that plays itself, through the endpoint."""
    return spec.reference.partition(":")[0] in ADAPTERS
