"""How often a thing is measured: until the spread of its median is small, or patience ends."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SPREAD = 0.03  # of a median, below which it is not measured again


@dataclass(frozen=True)
class Patience:
    """How often and how long one thing is measured.

    Attributes:
        least: Measurements at least, however long they take.
        most: Measurements at most.
        limit_s: No further one is begun after so long.
    """

    least: int = 5
    most: int = 40
    limit_s: float = 1.0


def spread(times_s: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a median, relative to it.

    Standard error of the median of normal values: 1.253 sigma / sqrt(n); sigma from the
    interquartile range, which outliers leave alone: IQR / 1.349.
    """
    if len(times_s) < 2:
        return 1.0
    low, middle, high = np.quantile(times_s, (0.25, 0.5, 0.75))
    return float(1.96 * 1.253 * (high - low) / 1.349 / len(times_s) ** 0.5 / middle)


def repeated(job: Callable[[], float], patience: Patience, warm: int = 1) -> list[float]:
    """Measure something again and again.

    Args:
        job: Does it once and returns the seconds that count.
        patience: When to stop.
        warm: Runs before the first that counts.

    Returns:
        Seconds of each run.
    """
    for _ in range(warm):
        job()
    times: list[float] = []
    ends = time.monotonic() + patience.limit_s
    while len(times) < patience.most:
        enough = len(times) >= patience.least
        if enough and (spread(times) < SPREAD or time.monotonic() > ends):
            break
        times.append(job())
    return times


def median(times_s: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(times_s))


class Deadline:
    """When the time that was given ends.

    Args:
        seconds: From now.
    """

    def __init__(self, seconds: float) -> None:
        self._ends_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left, negative afterwards."""
        return self._ends_s - time.monotonic()
