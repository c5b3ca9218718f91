"""eps, the noise: a pure function of (seed, iteration, direction, parameter, element).

Names are imported when they are first asked for, so that the configuration lists the kinds without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardes.noise.definition import NOISE_VERSION as NOISE_VERSION
    from shardes.noise.definition import data_order as data_order
    from shardes.noise.definition import sampling_uniforms as sampling_uniforms
    from shardes.noise.kinds.base import NoiseKind as NoiseKind
    from shardes.noise.kinds.gaussian import Gaussian as Gaussian
    from shardes.noise.kinds.low_rank import LowRank as LowRank
    from shardes.noise.kinds.low_rank import factors as factors
    from shardes.noise.kinds.low_rank.matrices import matrix_shape as matrix_shape
    from shardes.noise.kinds.rademacher import Rademacher as Rademacher
    from shardes.noise.operations import GAUSSIAN as GAUSSIAN
    from shardes.noise.operations import accumulate as accumulate
    from shardes.noise.operations import add as add
    from shardes.noise.operations import perturb as perturb
    from shardes.noise.region import Region as Region

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
