"""eps, the noise: a pure function of (seed, iteration, direction, parameter, element).

The names of ``operations`` are imported when they are first asked for, so that the
configuration lists the kinds without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardes.noise.operations import *  # noqa: F403


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module("shardes.noise.operations"), name)
