"""eps, the noise: a pure function of (seed, iteration, direction, parameter, element).

Names are imported when they are first asked for, so that the configuration lists the kinds without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardes.noise.definition import NOISE_VERSION, data_order, sampling_uniforms
    from shardes.noise.kinds.base import NoiseKind
    from shardes.noise.kinds.gaussian import Gaussian
    from shardes.noise.kinds.low_rank import LowRank, factors
    from shardes.noise.kinds.low_rank.matrices import matrix_shape
    from shardes.noise.kinds.rademacher import Rademacher
    from shardes.noise.operations import GAUSSIAN, accumulate, add, perturb
    from shardes.noise.region import Region

__all__ = [
    "GAUSSIAN",
    "NOISE_VERSION",
    "Gaussian",
    "LowRank",
    "NoiseKind",
    "Rademacher",
    "Region",
    "accumulate",
    "add",
    "data_order",
    "factors",
    "matrix_shape",
    "perturb",
    "sampling_uniforms",
]

_PLACES = {
    "definition": ("NOISE_VERSION", "data_order", "sampling_uniforms"),
    "kinds.base": ("NoiseKind",),
    "kinds.gaussian": ("Gaussian",),
    "kinds.low_rank": ("LowRank", "factors"),
    "kinds.low_rank.matrices": ("matrix_shape",),
    "kinds.rademacher": ("Rademacher",),
    "operations": ("GAUSSIAN", "accumulate", "add", "perturb"),
    "region": ("Region",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
