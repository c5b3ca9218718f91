"""Building the backend that a configuration names."""

from shardes.backends.base import Backend
from shardes.backends.registry import BACKENDS
from shardes.config.schema import Config
from shardes.distributed.group import Group
from shardes.models.build import load_generation_config, skeleton_of
from shardes.models.conversion import Conversion


def make_backend(config: Config, *, group: Group) -> Backend:
    """Build the configured model without weights, spread over the ranks of ``group``; a collective.

    Raises:
        UserError: The model directory or the backend's configuration cannot be used.
    """
    skeleton = skeleton_of(config)
    skeleton.generation_config = load_generation_config(config.model.path, skeleton.config)
    conversion = Conversion(skeleton)  # before the backend takes the skeleton over
    backend: Backend = BACKENDS[config.parallel.backend].load().build(skeleton, config=config, group=group)
    backend.conversion = conversion
    return backend
