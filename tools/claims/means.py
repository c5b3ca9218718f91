"""Means over seeds, with 95% intervals by Student's t."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95% quantiles of Student's t by the degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Mean:
    """Mean of some values with half of its 95% interval.

    Attributes:
        value: Mean.
        half: Half of the interval; infinity with one value.
        num_values: Number of values.
    """

    value: float
    half: float
    num_values: int

    @property
    def sign(self) -> int:
        """Return 1 or -1 if the interval is on one side of 0, else 0."""
        return 0 if abs(self.value) <= self.half else (1 if self.value > 0 else -1)

    def text(self, *, sign: str = "", digits: int = 3) -> str:
        """Return the mean and half of its interval for people."""
        half = "?" if math.isinf(self.half) else f"{self.half:.{digits}f}"
        return f"{self.value:{sign}.{digits}f} ± {half}"


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of one or more values, by Student's t."""
    count = len(values)
    if count == 1:
        return Mean(values[0], math.inf, 1)
    half = T_QUANTILES.get(count - 1, 1.96) * statistics.stdev(values) / math.sqrt(count)
    return Mean(statistics.fmean(values), half, count)
