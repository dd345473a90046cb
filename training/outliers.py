"""How unusual is a loss or a gradient norm? A z-score over the last values, as in llm.c."""

import math
from dataclasses import dataclass, field

WINDOW = 128  # values


@dataclass
class OutlierWindow:
    """The last `size` finite values, outliers included, oldest first."""

    size: int = WINDOW
    values: list[float] = field(default_factory=list)

    def score(self, value: float) -> float:
        """Take `value` in and return its z-score within the window.

        nan until the window was full before it (no score yet); inf for a value that is not finite, which
        stays out of the window: it would make every later score nan.
        """
        if not math.isfinite(value):
            return math.inf
        was_full = len(self.values) == self.size
        self.values = [*self.values, value][-self.size :]
        if not was_full:
            return math.nan
        mean = math.fsum(self.values) / self.size
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in self.values) / self.size)
        return (value - mean) / deviation if deviation > 0 else 0.0


def is_outlier(z: float, limit: float) -> bool:
    """Whether to skip an update with this score. A limit of 0 is off, but never for values not finite."""
    return z == math.inf or (limit > 0 and math.isfinite(z) and z > limit)
