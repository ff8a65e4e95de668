"""Means over seeds, and differences from a baseline with confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and the bounds of its two-sided t confidence interval.

    The bounds are NaN for a single pair, and all three if a difference is not finite, as with a PSNR of infinity.
    """

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is above or below 0, 0 if it includes 0."""
        return int(self.low > 0) - int(self.high < 0)


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation (n - 1); NaN for a single value, or if one is not finite."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def paired_difference(values: Sequence[float], baseline: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """The difference of paired values, here by seed: d +- t(n - 1) s / sqrt(n), Student 1908.

    Assumes normally distributed differences; not corrected for multiple comparisons.

    Raises:
        ValueError: the sequences differ in length, or are empty.
    """
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    if not all(map(math.isfinite, differences)):
        return Difference(math.nan, math.nan, math.nan)
    mean = fmean(differences)
    if len(differences) == 1:
        return Difference(mean, math.nan, math.nan)
    from scipy import stats

    quantile = float(stats.t.ppf((1 + confidence) / 2, len(differences) - 1))
    half = quantile * stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, mean - half, mean + half)
