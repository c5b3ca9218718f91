"""Building the backend that a configuration names."""

from shardes.backends.base import Backend
from shardes.backends.registry import BACKENDS
from shardes.config.schema import Config
from shardes.distributed.group import Group
from shardes.models.build import build_model, load_generation_config
from shardes.models.checkpoint import Checkpoint


def make_backend(config: Config, *, group: Group, checkpoint: Checkpoint | None = None) -> Backend:
    """Build the configured model without weights, spread over the ranks of ``group``; a collective.

    Args:
        config: Configuration of the run.
        group: Ranks that hold the model together.
        checkpoint: Weights of ``model.path``, of which only what decides the model's shape is read, and its
            buffers; None: they are opened here.

    Raises:
        UserError: The model directory or the backend's configuration cannot be used.
    """
    skeleton, conversion = build_model(config, checkpoint or Checkpoint(config.model.directory))
    skeleton.generation_config = load_generation_config(config.model.directory, skeleton.config)
    backend: Backend = BACKENDS[config.parallel.backend].load().build(skeleton, config=config, group=group)
    backend.conversion = conversion
    return backend
