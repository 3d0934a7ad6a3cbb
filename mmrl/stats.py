"""Statistics of paired comparisons: every policy meets the same episodes, which are resampled.

Definitions follow rliable (Agarwal et al., "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", NeurIPS 2021, arXiv 2108.13264), with one difference: there the runs of two
algorithms are unrelated, here episode i of one policy is compared with episode i of the other.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 10_000
CONFIDENCE = 0.95
BATCH_VALUES = 2**22  # resampled values held at a time


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


def mean(values: Floats) -> Floats:
    """Return the mean over the last axis."""
    return np.asarray(values.mean(axis=-1))


def iqm(values: npt.ArrayLike) -> Floats:
    """Return the interquartile mean over the last axis: the mean of the middle half.

    As in rliable: floor(n / 4) values are cut off at each end.
    """
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(np.asarray(values, np.float64), 0.25, axis=-1))


def bootstrap(
    strata: Sequence[npt.ArrayLike],
    statistic: Callable[[Floats], Floats] = mean,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return a statistic, averaged over strata, with its percentile bootstrap interval.

    For a paired comparison the values are differences, episode by episode. With several strata
    (scenarios) each is resampled within itself, as rliable's stratified bootstrap does.

    Args:
        strata: Values of each stratum, float[n_k]; at least one value each.
        statistic: Maps float64[..., n] to float64[...].
        seed: Of the resampling.
        resamples: How many times the episodes are drawn anew.
        confidence: Probability that the interval stands for.

    Raises:
        ValueError: There is no stratum, or one is empty or holds a NaN.
    """
    rng = np.random.default_rng(seed)
    estimates = []
    drawn = np.zeros(resamples)
    for stratum in strata:
        values = np.asarray(stratum, np.float64)
        if values.ndim != 1 or len(values) == 0 or np.isnan(values).any():
            raise ValueError("a stratum needs at least one value and no NaN")
        estimates.append(float(statistic(values)))
        drawn += _resample(values, statistic, rng, resamples)
    if not estimates:
        raise ValueError("there is no stratum")
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn / len(estimates), (tail, 1 - tail))
    return Interval(float(np.mean(estimates)), float(low), float(high))


def _resample(
    values: Floats, statistic: Callable[[Floats], Floats], rng: np.random.Generator, resamples: int
) -> Floats:
    """Return the statistic of each of so many draws with replacement, float64[resamples]."""
    batch = max(1, BATCH_VALUES // len(values))
    parts = []
    for start in range(0, resamples, batch):
        draws = min(batch, resamples - start)
        parts.append(statistic(values[rng.integers(0, len(values), (draws, len(values)))]))
    return np.concatenate(parts)


def improvements(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> Floats:
    """Return 1 where ours is higher, 1/2 on a tie and 0 where it is lower, float64[n].

    Over the same episodes; their mean is the probability of improvement (Agarwal et al. 2021).
    """
    return (np.sign(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) + 1) / 2


def sign_flip_p(differences: npt.ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Return the two-sided p-value of a mean of paired differences by random sign flips.

    All patterns of signs where there are no more than ``resamples``, else random ones; what was
    found counts as one of them.
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    if n < 2 or not values.any():
        return 1.0
    least = abs(values.sum()) - 1e-9 * np.abs(values).sum()  # above what rounding makes
    if 2**n <= resamples:
        minus = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return float((abs((1 - 2 * minus) @ values) >= least).mean())
    rng, extreme = np.random.default_rng(seed), 1
    batch = max(1, BATCH_VALUES // n)
    for start in range(1, resamples, batch):
        minus = rng.integers(0, 2, (min(batch, resamples - start), n), np.int8)
        extreme += int((abs((1 - 2 * minus) @ values) >= least).sum())
    return extreme / resamples


def holm(p_values: npt.ArrayLike) -> Floats:
    """Return p-values adjusted for several comparisons by Holm's step-down method.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
