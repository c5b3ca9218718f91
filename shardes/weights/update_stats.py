"""Norms and cosines of an update, and the distance of the weights from the base model."""

import math
from collections.abc import Sequence

import torch

# Sums over all elements of all shards, in this order.
_SUMS = ("step^2", "arrived^2", "step*arrived", "last^2", "step*last", "distance^2")
# Elements that are summed at a time, on CPUs so few that they stay in a cache; and the bytes of float64 that
# each takes meanwhile.
NUM_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 20}
BYTES_AT_ONCE = 6 * 8
# Sums over shards differ in their last bits between shardings; metrics do not.
_DIGITS = 6


class UpdateStats:
    """Sums over the weights that an update changes, kept on the device so that the host does not wait.

    Args:
        device: Device of the weights.
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
        """Add some weights to the sums; all tensors are flat and of equal length.

        Args:
            step: Step that the optimizer asked for, float32.
            before: Masters before the step.
            after: Masters after the step.
            last_step: Step of the update before, float32; None if there was none.
            base: The base model's weights in the master's dtype.
        """
        size = NUM_AT_ONCE[step.device.type]
        for first in range(0, step.numel(), size):
            part = slice(first, first + size)
            wanted, arrived = step[part].double(), after[part].double() - before[part].double()
            last = torch.zeros_like(wanted) if last_step is None else last_step[part].double()
            distance = after[part].double() - base[part].double()
            pairs = ((wanted, wanted), (arrived, arrived), (wanted, arrived), (last, last), (wanted, last))
            self._sums += torch.stack([torch.dot(a, b) for a, b in (*pairs, (distance, distance))])

    def sums(self) -> list[float]:
        """Return the sums of this rank's weights, to be added up over ranks."""
        return self._sums.tolist()


def update_stats(sums: Sequence[float]) -> dict[str, float | None]:
    """Compute the metrics of an update, to six digits, from ``UpdateStats.sums`` added up over ranks.

    Returns:
        By name:

        - ``update_norm``: the length of the step.
        - ``update_norm_ratio``: the length of the change of the masters over that of the step.
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
