"""Engines by the name that ``rollout.engine`` gives them; nothing heavy is imported before one is made."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardes.rollout.engines.base import Engine

ENGINES = {"transformers": "shardes.rollout.engines.transformers.engine:TransformersEngine"}
"""The class of each engine, as ``module:class``."""


def make_engine(name: str, **parts: Any) -> "Engine":
    """Build an engine.

    Args:
        name: One of ``ENGINES``.
        **parts: What all engines are made of: ``backend``, ``weights``, ``mesh``, ``tokenizer``, ``settings``
            (the section ``rollout``), ``seed`` and ``timer``.
    """
    module, _, class_name = ENGINES[name].partition(":")
    engine: Engine = getattr(import_module(module), class_name)(**parts)
    return engine
