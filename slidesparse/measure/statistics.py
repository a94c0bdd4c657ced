"""Medians, percentiles and 95 % intervals. The only place where they are computed.

Interval of a median, n >= 6: distribution-free, from order statistics. X(l) <= median <= X(n+1-l) holds with
probability 1 - 2 * sum_{i<l} C(n, i) / 2**n; the largest l that keeps it at 95 % or more is taken.
n < 6: no order statistics reach 95 %, so a lognormal shape is assumed:
    median * exp(+-t(n-1) * 1.2533 * s / sqrt(n)), s the standard deviation of the logarithms,
1.2533 = sqrt(pi / 2), the standard error of a median over that of a mean.
Ratio, paired (interleaved samples): the interval of the median of the pairwise ratios.
Ratio, unpaired (two runs): MOVER on logarithms (Donner and Zou, Stat. Methods Med. Res. 21, 2012).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, exp, log, pi, sqrt

import numpy as np

CONFIDENCE = 0.95
STUDENT_T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom (standard table)."""
MEDIAN_OVER_MEAN = sqrt(pi / 2)


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % interval, in the unit of the samples."""

    median: float
    low: float
    high: float

    @property
    def rel(self) -> float:
        """Half width over the median."""
        return (self.high - self.low) / 2 / self.median if self.median else float("inf")

    def scaled(self, factor: float) -> Interval:
        """In another unit."""
        return Interval(self.median * factor, self.low * factor, self.high * factor)

    def rate(self, amount: float) -> Interval:
        """`amount` per sample: seconds become tokens/s; low and high change places."""
        return Interval(amount / self.median, amount / self.high, amount / self.low)


def median_interval(samples: Sequence[float]) -> Interval:
    """Median and 95 % interval of positive samples. Raises ValueError for fewer than two."""
    n = len(samples)
    if n < 2:
        raise ValueError(f"{n} samples have no interval; take at least 2")
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    median = float(np.median(ordered))
    rank = _rank(n)
    if rank:
        return Interval(median, float(ordered[rank - 1]), float(ordered[n - rank]))
    spread = float(np.std(np.log(ordered), ddof=1))
    factor = exp(STUDENT_T[n - 1] * MEDIAN_OVER_MEAN * spread / sqrt(n))
    return Interval(median, median / factor, median * factor)


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics."""
    return float(np.percentile(np.asarray(samples, dtype=np.float64), percent))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median of the ratios of samples taken side by side. Raises ValueError when the counts differ."""
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} and {len(denominator)} samples are not pairs")
    return median_interval([a / b for a, b in zip(numerator, denominator, strict=True)])


def unpaired_ratio(numerator: Interval, denominator: Interval) -> Interval:
    """Ratio of two independent medians, from their own intervals."""
    above, below = log(numerator.high / numerator.median), log(numerator.median / numerator.low)
    over, under = log(denominator.high / denominator.median), log(denominator.median / denominator.low)
    ratio = numerator.median / denominator.median
    return Interval(ratio, ratio * exp(-sqrt(below**2 + over**2)), ratio * exp(sqrt(above**2 + under**2)))


@lru_cache(maxsize=4096)
def _rank(n: int) -> int:
    """Largest l (from 1) whose order-statistic interval covers the median with 95 %; 0 when none does."""
    outside, rank = 0, 0
    while 2 * (outside + comb(n, rank)) <= (1 - CONFIDENCE) * 2**n:
        outside += comb(n, rank)
        rank += 1
    return rank
