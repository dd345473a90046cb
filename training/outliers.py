"""How unusual is a loss or a gradient norm? A z-score over the last values, as in llm.c."""

import math
import statistics
from dataclasses import dataclass, field

WINDOW = 128  # values
MOST_SKIPS = 8  # in a row
RISE = 4.0  # standard deviations


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


def divergence(skips_in_a_row: int, losses: OutlierWindow) -> str:
    """Why a run has to be taken for diverged; "" while it has not.

    Skipped updates in a row; or a sustained rise: the mean of the window's newest quarter lies above that of its
    older half by more than RISE of that half's standard deviations.
    """
    if skips_in_a_row >= MOST_SKIPS:
        return f"{skips_in_a_row} updates in a row were outliers"
    if len(losses.values) < losses.size:
        return ""
    older, newer = losses.values[: losses.size // 2], losses.values[-losses.size // 4 :]
    rise, deviation = statistics.fmean(newer) - statistics.fmean(older), statistics.pstdev(older)
    if deviation > 0 and rise > RISE * deviation:
        return f"the loss rose by {rise:.3f}, {rise / deviation:.1f} standard deviations"
    return ""
