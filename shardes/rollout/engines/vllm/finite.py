"""Notice logits that are not finite: vLLM draws a token from them all the same."""

from typing import Any

import torch


class FiniteLogits:
    """Watches the logits of a vLLM model, on its device, without waiting for them.

    Args:
        model: vLLM's model, whose ``compute_logits`` is replaced by one that looks at what it returns.
    """

    def __init__(self, model: Any) -> None:
        device = next(model.parameters()).device
        self._are_finite = torch.ones((), dtype=torch.bool, device=device)
        compute = model.compute_logits

        def compute_and_look(*arguments: object, **keywords: object) -> torch.Tensor | None:
            logits: torch.Tensor | None = compute(*arguments, **keywords)
            if logits is not None:
                self._are_finite &= logits.isfinite().all()
            return logits

        model.compute_logits = compute_and_look

    def reset(self) -> None:
        """Forget what was seen."""
        self._are_finite.fill_(True)

    @property
    def is_finite(self) -> bool:
        """Return whether all logits were finite since the last reset; waits for the device."""
        return bool(self._are_finite)
