"""A forward without numbers, which tells a model whose parts do not fit each other from other failures."""

import re

import torch
from transformers import PreTrainedModel

from shardes.errors import UserError
from shardes.utils.messages import one_line

# Errors of torch about shapes.
_SHAPES = re.compile(
    r"must match the size|Attempting to broadcast|cannot be multiplied|is invalid for input of size"
    r"|size mismatch|must be divisible|Expected size|split_with_sizes|normalized_shape|expanded size"
    r"|same number of"
)


def may_be_of_model(error: Exception) -> bool:
    """Return whether an exception is of a kind that a model raises whose parts do not fit each other."""
    is_of_shapes = isinstance(error, RuntimeError) and _SHAPES.search(one_line(error)) is not None
    return is_of_shapes or isinstance(error, TypeError | ZeroDivisionError)


def check_forward(model: PreTrainedModel, *, like: Exception) -> None:
    """Run a forward of two tokens on the meta device, where only shapes are computed.

    Args:
        model: Model whose parameters are on meta; it becomes unusable.
        like: Exception that something raised; only one of its type counts.

    Raises:
        UserError: Shapes or types of its configuration do not fit each other.
    """
    what = f"model.path: config.json of {model.config.name_or_path} describes a model that cannot compute"
    # transformers looks at values where there is no mask of four dimensions, which some models do not take.
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    masks = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta"), None
    found: Exception | None = None
    for mask in masks:
        try:
            with torch.no_grad():
                model.to("meta")(ids, attention_mask=mask, use_cache=False)
        except Exception as error:
            # Anything else may mean that the model cannot run without numbers.
            if may_be_of_model(error) and type(error) is type(like):
                found = found or error
        else:
            return
    if found is not None:
        raise UserError(f"{what}: {type(found).__name__}: {one_line(found)}")
