"""Evolution strategies fine-tuning for language models whose parameters are sharded over many devices.

``Trainer``, ``TrainConfig`` and the errors are imported when they are first asked for: the command line
answers mistakes without them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from shardes.utils.version import VERSION

if TYPE_CHECKING:
    from shardes.api import TrainConfig, Trainer, TrainResult
    from shardes.errors import StorageError, UserError

__version__ = VERSION

__all__ = ["StorageError", "TrainConfig", "TrainResult", "Trainer", "UserError", "__version__"]

_PLACES = {
    "Trainer": "shardes.api",
    "TrainConfig": "shardes.api",
    "TrainResult": "shardes.api",
    "StorageError": "shardes.errors",
    "UserError": "shardes.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
