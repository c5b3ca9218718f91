"""Harnesses: programs that play an episode by asking the endpoint, and adapters that are such programs."""

from collections.abc import Mapping
from typing import Any

from shardes.environments.base import HarnessSpec

ADAPTERS = {"verifiers": "shardes.environments.verifiers_harness:play"}
"""Harnesses that play other libraries' environments, which are named after the colon: ``verifiers:NAME``."""


def harness_of(reference: str, arguments: Mapping[str, Any] | None = None) -> HarnessSpec:
    """Return the choice that a reference makes, which may name an adapter: ``verifiers:NAME``."""
    kind, _, name = reference.partition(":")
    if kind in ADAPTERS:
        return HarnessSpec(ADAPTERS[kind], {"name": name, **(arguments or {})})
    return HarnessSpec(reference, dict(arguments or {}))


def is_adapted(spec: HarnessSpec) -> bool:
    """Return whether a harness is an adapter's."""
    return spec.reference in ADAPTERS.values()


def is_harness(reference: str | None) -> bool:
    """Return whether ``task.environment`` names one that plays itself, through the endpoint."""
    return (reference or "").partition(":")[0] in ADAPTERS
