"""Where shards live."""

from typing import TYPE_CHECKING

from shardes.backends.base import Backend
from shardes.config.schema import Config
from shardes.distributed.group import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Backend", "make_backend"]


def make_backend(config: Config, *, group: Group) -> Backend:
    """Builds the configured model without weights, spread over the ranks of ``group``.

    Raises:
        UserError: The model directory or the engine's configuration cannot be used.
    """
    import torch

    from shardes.models.build import build_skeleton, load_generation_config, load_model_config
    from shardes.models.conversion import Conversion

    trust = config.model.trust_remote_code
    model_config = load_model_config(config.model.path, trust_remote_code=trust)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    skeleton = build_skeleton(model_config, dtype=dtype, trust_remote_code=trust)
    skeleton.generation_config = load_generation_config(config.model.path, model_config)
    conversion = Conversion(skeleton)
    backend = _spread(skeleton, config=config, group=group)
    backend.conversion = conversion
    return backend


def _spread(skeleton: "PreTrainedModel", *, config: Config, group: Group) -> Backend:
    """Hands the model to the configured engine."""
    if config.parallel.backend == "single":
        from shardes.backends.single import SingleBackend

        return SingleBackend(skeleton, group=group)
    if config.parallel.backend == "fsdp":
        from shardes.backends.fsdp import FsdpBackend

        return FsdpBackend(skeleton, group=group)
    if config.parallel.backend == "tensor_parallel":
        from shardes.backends.tensor_parallel import TensorParallelBackend

        return TensorParallelBackend(skeleton, group=group)

    from shardes.backends.deepspeed_config import make_deepspeed_config
    from shardes.backends.zero3 import Zero3Backend
    from shardes.models.build import largest_layer, largest_parameter

    size = config.rollout.micro_batch_size
    deepspeed_config = make_deepspeed_config(
        config.parallel.deepspeed,
        dtype=skeleton.dtype,
        micro_batch_size=None if size == "auto" else size,
        world_size=group.world_size,
        hidden_size=skeleton.config.get_text_config().hidden_size,
        largest_layer=largest_layer(skeleton),
        largest_parameter=largest_parameter(skeleton),
    )
    trust = config.model.trust_remote_code
    return Zero3Backend(skeleton, deepspeed_config=deepspeed_config, group=group, trust_remote_code=trust)
