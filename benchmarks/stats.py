"""Medians, means, paired differences, and what can be told from zero."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and its standard error (NaN for a single value)."""
    array = np.array(list(values), dtype=np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), float(error)


def mean_text(values: Iterable[float]) -> str:
    """Return a mean and its standard error as the tables have it; of a single value the mean alone."""
    found = list(values)
    if not found:
        return "–"
    mean, error = mean_and_error(found)
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def quartiles(times: Sequence[float], unit: str = "ms", count: str = "runs") -> dict[str, float]:
    """Return what a raw row says of some times: median, quartiles and how many they are."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return {f"median_{unit}": median, f"q1_{unit}": low, f"q3_{unit}": high, count: len(times)}


def two_sided_p(t: float, degrees: int) -> float:
    """Return the probability of a Student's t at least as far from 0: the density integrated over t = √d·tan θ."""
    if math.isnan(t):
        return math.nan
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (degrees - 1)
    total = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(degrees)), angle, total) / total[-1])


def half_width(error: float, degrees: int) -> float:
    """Return half of the 95 % interval of a mean with this standard error."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 0.05 else (low, middle)
    return high * error


# A difference of a larger p is called none.
UNCLEAR = 0.05


class Difference(NamedTuple):
    """A paired difference: its mean, standard error, degrees of freedom and p."""

    mean: float
    error: float
    degrees: int

    @property
    def p(self) -> float:
        if self.degrees < 1 or math.isnan(self.error):
            return math.nan
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return two_sided_p(self.mean / self.error, self.degrees)

    @property
    def is_clear(self) -> bool:
        """Whether it can be told from zero; never with one pair."""
        return self.p <= UNCLEAR

    @property
    def place(self) -> str:
        """How the pages say it in words: where the first side is, of two accuracies."""
        return ("above" if self.mean > 0 else "below") if self.is_clear else "not clearly different from"

    def __str__(self) -> str:
        if math.isnan(self.p):
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} ± {self.error:.2f} ({p_text(self.p)})"


def p_text(p: float) -> str:
    """Return a p-value as the tables have it."""
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Return `ours` less `theirs` over the seeds that both have."""
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return Difference(*mean_and_error(pairs), len(pairs) - 1) if pairs else None


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of a paired permutation test: how many flips of the signs give as large a sum.

    Exact for up to 20 differences. Above, the flips are 2^20 drawn ones, the same on every call, and the sum itself
    counts as one more, so that p is never 0 (Phipson and Smyth, 2010).
    """
    return _sign_flip_p(tuple(differences))


# The pages ask the same of the same differences more than once, and a million flips take a second.
@functools.cache
def _sign_flip_p(differences: tuple[float, ...]) -> float:
    values = np.abs(np.array(differences, dtype=np.float64))
    count = len(values)
    if count == 0:
        return math.nan
    if count <= 20:
        flips = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
    else:
        flips = np.random.default_rng(0).integers(0, 2, (1 << 20, count))
    sums = np.abs((1 - 2 * flips) @ values)
    # Sums of the same numbers in another order may differ in the last bits.
    as_large = int((sums >= abs(sum(differences)) - 1e-9 * values.sum()).sum())
    return as_large / len(sums) if count <= 20 else (as_large + 1) / (len(sums) + 1)
