"""What torch's attention may do on GPUs, and what transformers makes of grouped queries."""

import logging
from typing import Any

import torch
import transformers

logger = logging.getLogger(__name__)

# The first version whose masked attention does not repeat keys and values for all heads of a group.
_GROUPS_SINCE = (5, 23)


def choose_attention(*, uses_cudnn: bool) -> None:
    """Set whether torch's attention may use the kernels of cuDNN, in the whole process."""
    torch.backends.cuda.enable_cudnn_sdp(uses_cudnn)


def warn_of_repeated_heads(model_config: Any, device: torch.device) -> None:
    """Say what a version of transformers costs that repeats keys and values in every decoding step.

    Args:
        model_config: Configuration of the model, a transformers ``PretrainedConfig``.
        device: Device of the model; nothing is said about CPUs.
    """
    config = model_config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    is_grouped = (getattr(config, "num_key_value_heads", None) or heads) != heads
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if device.type == "cpu" or not is_grouped or version >= _GROUPS_SINCE:
        return
    logger.warning(
        "transformers %s repeats the keys and values of each group for all of its heads at every token, so "
        "decoding large batches may take several times as long as it must: pip install 'transformers>=%d.%d'",
        transformers.__version__,
        *_GROUPS_SINCE,
    )
