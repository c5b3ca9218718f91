"""Compare members as low-rank terms with members as weights, when a run begins."""

from typing import Any

import torch

from shardes.backends.base import Backend
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.es.update import Perturbation
from shardes.rollout.gather_modes import BatchedGather, GatherMode
from shardes.weights.master import Weights

_NUM_TOKENS = 16


@torch.no_grad()
def check_hooks(mode: GatherMode, *, backend: Backend, weights: Weights, world: Group, sigma: float) -> None:
    """Compare the logits of two members, computed both ways; a collective of all ranks.

    Rounding explains a small part of the change that the perturbations make, a few steps of the dtype, and
    what a step of sigma changes: a large model in bfloat16 computes other logits after any change of its
    weights. The model is left at its centre.

    Args:
        mode: Gather mode, which must be a ``BatchedGather``.
        backend: Backend that holds the model.
        weights: Master shards of this rank.
        world: All ranks of the job.
        sigma: Scale of the noise of the two members.

    Raises:
        UserError: The logits differ by more than rounding explains.
    """
    assert isinstance(mode, BatchedGather), "other modes have no terms"
    members = [Perturbation(0, 0, sigma), Perturbation(0, 1, -sigma)]
    config: Any = backend.sharded_model.config
    vocabulary = config.get_text_config().vocab_size
    # From all of the vocabulary, whose first tokens are special ones, for which models compute with extremes.
    ids = (torch.arange(1, _NUM_TOKENS + 1, device=backend.device) * vocabulary // (_NUM_TOKENS + 1))[None]

    def logits(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=rows, use_cache=False).logits.double()
        return found

    near = Perturbation(0, 0, sigma * (1 + torch.finfo(backend.dtype).eps))
    as_weights = []
    for member in [*members, near]:
        weights.perturb(member)
        as_weights.append(logits(backend.sharded_model, ids))
    weights.centre()
    wanted = torch.cat(as_weights[:2])
    rounding = _rms(as_weights[2] - as_weights[0])
    centre = logits(backend.sharded_model, ids)
    mode.begin()
    model = mode.model()
    mode.hooks.load(members)
    with mode.hooks.on(model):
        mode.hooks.on_rows(torch.arange(2, device=backend.device))
        found = logits(model, ids.expand(2, -1))
    check_agreement(
        found,
        wanted=wanted,
        centre=centre,
        dtype=backend.dtype,
        world=world,
        what="logits",
        rounding=rounding,
    )


def check_agreement(
    found: torch.Tensor,
    *,
    wanted: torch.Tensor,
    centre: torch.Tensor,
    dtype: torch.dtype,
    world: Group,
    what: str,
    rounding: float = 0.0,
) -> None:
    """Check that members as low-rank terms compute what their weights do; a collective of all ranks.

    Args:
        found: What the terms gave, float64 of shape [members, ...].
        wanted: What the members' weights gave, of the same shape.
        centre: What the centre gave, broadcast over the members.
        dtype: Dtype of the weights.
        world: All ranks of the job.
        what: Name of the values, for the message.
        rounding: Root mean square of what rounding was seen to change.

    Raises:
        UserError: They differ by more than rounding explains.
    """
    step = torch.finfo(dtype).eps
    effect, error = _rms(wanted - centre), _rms(found - wanted)
    limit = max(1e-3, 16 * step) * effect + 4 * step * _rms(centre) + 2 * rounding
    if world.any(not error <= limit):
        raise UserError(
            f"rollout.members_per_forward: forwards of many members compute other {what} than the members' "
            f"weights do: they differ by {error:.3g} (root mean square), where the perturbation itself "
            f"changes them by {effect:.3g} "
            f"and rounding explains {limit:.3g}. The model computes something for which there is no right "
            "rule; set rollout.members_per_forward: 1, which evaluates the same members one by one"
        )


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
