"""Classes named in registries as ``module:class``, imported when they are first used."""

import importlib
from typing import Any


def load_class(reference: str) -> Any:
    """Import and return the class that a registry names as ``module:class``."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
