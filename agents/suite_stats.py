"""Intervals of a benchmark: a paired bootstrap over episodes and training seeds, crossed.

A difference stands in a matrix, training seeds by episodes; every draw takes seeds with replacement
(the same ones in all cells) and, in each cell, episodes with replacement. With one seed that is the
ordinary paired bootstrap. Two-sided p-values are of random sign flips of the episodes' differences
where there is one seed; flips would not see that seeds differ, so that of several the p-value is
that of the draws, too: the level at which their interval begins to exclude zero.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmrl.stats import CONFIDENCE, RESAMPLES, Interval, sign_flip_p

Floats = npt.NDArray[np.float64]
Draws = npt.NDArray[np.float32]


class Bootstrap:
    """The draws; all comparisons share them.

    Args:
        seed: Of the draws.
        resamples: How many.
    """

    def __init__(self, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.seed, self.resamples = seed, resamples
        self._seed_weights: dict[tuple[int, int], Draws] = {}
        self._last: tuple[tuple[int, int], Draws] = (-1, -1), np.empty((0, 0), np.float32)

    def cell_means(self, number: int, columns: Floats) -> Draws:
        """Return the mean of each column over drawn episodes, float32[resamples, K].

        Args:
            number: Of the cell: its draws are its own.
            columns: float64[n, K]; NaN where an episode says nothing.
        """
        n = len(columns)
        weights = self._episode_weights(number, n)
        valid = np.isfinite(columns)
        sums = weights @ np.where(valid, columns, 0.0).astype(np.float32)
        if valid.all():
            return np.asarray(sums / n, np.float32)
        counts = weights @ valid.astype(np.float32)
        return np.asarray(sums / np.maximum(counts, 1), np.float32)

    def _episode_weights(self, number: int, n: int) -> Draws:
        """Return how often each of n episodes is drawn, float32[resamples, n]."""
        if self._last[0] != (number, n):
            rng = np.random.default_rng((self.seed, 1, number))
            weights = rng.multinomial(n, np.full(n, 1 / n), self.resamples)
            self._last = (number, n), weights.astype(np.float32)
        return self._last[1]

    def over_seeds(self, means: Draws, side: int = 0) -> Draws:
        """Return the mean over drawn seeds, float32[resamples], of float32[resamples, S].

        Args:
            means: Of each seed.
            side: Of a comparison: seeds of the two sides have nothing to do with each other.
        """
        count = means.shape[1]
        if count == 1:
            return means[:, 0]
        if (count, side) not in self._seed_weights:
            rng = np.random.default_rng((self.seed, 2 + side, count))
            weights = rng.multinomial(count, np.full(count, 1 / count), self.resamples)
            self._seed_weights[count, side] = (weights / count).astype(np.float32)
        return np.asarray((means * self._seed_weights[count, side]).sum(axis=1), np.float32)


def interval(estimate: float, draws: Draws) -> Interval:
    """Return an estimate with its percentile interval; NaN bounds without an estimate."""
    if not np.isfinite(estimate):
        return Interval(float("nan"), float("nan"), float("nan"))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    return Interval(float(estimate), float(low), float(high))


def p_value(differences: Sequence[Floats], draws: Draws, seed: int) -> float:
    """Return the p-value of the differences of cells, each float64[S, n], taken together.

    Every cell counts the same: its differences are scaled by the number of its episodes.

    Args:
        differences: Of each cell.
        draws: float32[resamples], of their mean.
        seed: Of the flips.
    """
    if len(differences[0]) > 1:
        beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        return min(1.0, 2 * (beyond + 1) / (len(draws) + 1))
    flat = []
    for matrix in differences:
        values = matrix.mean(axis=0)
        values = values[np.isfinite(values)]
        if len(values):
            flat.append(values / len(values))
    return sign_flip_p(np.concatenate(flat), seed) if flat else 1.0
