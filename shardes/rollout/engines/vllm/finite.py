"""Notice logits that are not finite: vLLM draws a token from them all the same."""

from collections.abc import Callable
from typing import Any

import torch


class FiniteLogits:
    """Watches the logits of a vLLM model, on its device, without waiting for them.

    Args:
        model: vLLM's model, whose ``compute_logits`` is replaced by one that looks at what it returns.
        slot_of_rows: Returns the slot of each row of logits, int64, -1 for none; None: there are no slots.
        num_slots: Number of slots.
    """

    def __init__(
        self, model: Any, *, slot_of_rows: Callable[[], torch.Tensor] | None = None, num_slots: int = 0
    ) -> None:
        device = next(model.parameters()).device
        # Of rows without a slot, and of each slot; int32, because few devices have a minimum of bools.
        self._are_finite = torch.ones(1 + num_slots, dtype=torch.int32, device=device)
        compute = model.compute_logits

        def compute_and_look(*arguments: object, **keywords: object) -> torch.Tensor | None:
            logits: torch.Tensor | None = compute(*arguments, **keywords)
            if logits is None:
                return None
            rows = logits.isfinite().all(dim=-1).int()
            places = slot_of_rows() + 1 if slot_of_rows is not None else None
            if places is None or len(places) != len(rows):  # as for the tokens of a prompt, which are scored
                self._are_finite *= rows.min()
            else:
                self._are_finite.scatter_reduce_(0, places, rows, "amin")
            return logits

        model.compute_logits = compute_and_look

    def reset(self) -> None:
        """Forget what was seen."""
        self._are_finite.fill_(1)

    @property
    def is_finite(self) -> bool:
        """Return whether all logits were finite since the last reset; waits for the device."""
        return bool(self._are_finite.all())

    def of_slots(self, count: int) -> list[bool]:
        """Return for each of the first slots if all its logits were finite; waits for the device.

        Args:
            count: Number of slots; 0: return it for rows without a slot, in a list of one.
        """
        found = self._are_finite[1 : 1 + count] if count else self._are_finite[:1]
        return [bool(each) for each in found.tolist()]
