"""Classes and functions named as ``module:class``, imported when they are first used."""

import importlib
from typing import Any


def load_class(reference: str) -> Any:
    """Import and return what is named as ``module:class`` or ``module:function``."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
