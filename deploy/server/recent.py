"""The last minute of one model's requests, as the live page sums it up."""

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from mmrl.deploy.server.records import Record

WINDOW_S = 60.0
MOST_REQUESTS = 5000  # that have ended


class Recent:
    """The requests of one model that ended in the last minute, and those that have not ended.

    A request that still waits for its first token counts with its age as soon as that is beyond its
    target: else a model that answers nobody would look like one that nobody asks.
    """

    def __init__(self) -> None:
        self._open: set[Record] = set()
        self._ended: deque[Record] = deque(maxlen=MOST_REQUESTS)

    def begin(self, record: Record) -> None:
        """Take a request that has begun."""
        self._open.add(record)

    def end(self, record: Record) -> None:
        """Take a request that has ended."""
        self._open.discard(record)
        if record.outcome != "invalid":
            self._ended.append(record)

    def summary(self) -> dict[str, Any]:
        """Return percentiles, and how many requests ended or are late, and missed a target."""
        since = time.perf_counter() - WINDOW_S
        while self._ended and (self._ended[0].ended or 0.0) < since:
            self._ended.popleft()
        late = sum(record.late for record in self._open)
        seen = [*self._ended, *self._open]
        came = [r.ttft_s for r in seen if r.ttft_s is not None and (r.first or 0.0) >= since]
        wait = [r.e2e_s for r in seen if r.first is None and r.late]
        return {
            "ttft_s": _percentiles(came + wait),
            "tpot_s": _percentiles([r.tpot_s for r in seen if r.tpot_s is not None]),
            "requests": len(self._ended) + late,
            "missed": sum(record.miss is not None for record in self._ended) + late,
        }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return the median and the 95th percentile (nearest rank)."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        name: ordered[math.ceil(share * len(ordered)) - 1]
        for name, share in (("p50", 0.5), ("p95", 0.95))
    }
