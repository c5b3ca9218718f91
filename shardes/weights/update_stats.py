"""How large an update is, how much of it arrived, and how far the weights have gone."""

import math
from collections.abc import Sequence

import torch

# The sums that shards add up, in this order.
_SUMS = ("step^2", "arrived^2", "step*arrived", "last^2", "step*last", "distance^2")
# Sums over shards differ in their last bits between shardings; metrics do not.
_DIGITS = 6


class UpdateStats:
    """Sums over the weights that an update moves; no device waits for another.

    Args:
        device: Where the weights are.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)

    def add(
        self,
        step: torch.Tensor,
        *,
        before: torch.Tensor,
        after: torch.Tensor,
        last_step: torch.Tensor | None,
        base: torch.Tensor,
    ) -> None:
        """Takes in some weights.

        Args:
            step: What was to be added to them, float32.
            before: The masters before it.
            after: The masters after it.
            last_step: The step before this one; None if there was none.
            base: The masters of the base model.
        """
        wanted, arrived = step.double(), after.double() - before.double()
        last = torch.zeros_like(wanted) if last_step is None else last_step.double()
        distance = after.double() - base.double()
        pairs = ((wanted, wanted), (arrived, arrived), (wanted, arrived), (last, last), (wanted, last))
        self._sums += torch.stack([torch.dot(a, b) for a, b in (*pairs, (distance, distance))])

    def sums(self) -> list[float]:
        """Those of this rank's weights, to be added up over ranks."""
        return self._sums.tolist()


def update_stats(sums: Sequence[float]) -> dict[str, float | None]:
    """The metrics of an update, from the sums over all weights; to six digits.

    Returns:
        By name:

        - ``update_norm``: the length of the step.
        - ``update_norm_ratio``: the length of what arrived in the masters over that of the step.
        - ``update_cosine``: the cosine between the two; below 1 only by rounding.
        - ``update_cosine_to_last``: the cosine between the step and the one before it.
        - ``base_distance``: the distance of the masters from the base model.
    """
    step, arrived, both, last, with_last, distance = sums
    return {
        "update_norm": _rounded(math.sqrt(step)),
        "update_norm_ratio": _rounded(math.sqrt(arrived / step)) if step else None,
        "update_cosine": _rounded(both / math.sqrt(step * arrived)) if step and arrived else None,
        "update_cosine_to_last": _rounded(with_last / math.sqrt(step * last)) if step and last else None,
        "base_distance": _rounded(math.sqrt(distance)),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
