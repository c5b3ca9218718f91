"""Building the backend that a configuration names."""

import torch

from shardes.backends.base import Backend
from shardes.backends.registry import BACKENDS
from shardes.config.schema import Config
from shardes.distributed.group import Group
from shardes.models.build import build_skeleton, load_generation_config, load_model_config
from shardes.models.conversion import Conversion


def make_backend(config: Config, *, group: Group) -> Backend:
    """Build the configured model without weights, spread over the ranks of ``group``; a collective.

    Raises:
        UserError: The model directory or the backend's configuration cannot be used.
    """
    trust = config.model.trust_remote_code
    model_config = load_model_config(config.model.path, trust_remote_code=trust)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    skeleton = build_skeleton(model_config, dtype=dtype, trust_remote_code=trust)
    skeleton.generation_config = load_generation_config(config.model.path, model_config)
    conversion = Conversion(skeleton)  # before the backend takes the skeleton over
    backend: Backend = BACKENDS[config.parallel.backend].load().build(skeleton, config=config, group=group)
    backend.conversion = conversion
    return backend
