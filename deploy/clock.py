"""Where an engine's time comes from: the clock on the wall, or that of the cost model.

With `RealTime` jobs end when they end. With `SimulatedTime` the same jobs run, but end when the
simulator says so, and every decision can be compared with the simulator's.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from mmrl.node.state import IDLE

if TYPE_CHECKING:
    from mmrl.deploy.engine import Engine

COMPUTE, LINK_BOUND, H2D, D2H = "compute", "link-bound", "h2d", "d2h"  # the workers


class Clock(Protocol):
    """Where time comes from."""

    real: bool

    def now_ns(self) -> int:
        """Return the time."""

    def wait(self, engine: "Engine") -> set[str]:
        """Let time pass until something has happened; return the workers whose jobs ended."""


class RealTime:
    """The clock on the wall: jobs end when they end."""

    real = True

    def __init__(self) -> None:
        self._start_ns = time.monotonic_ns()
        self._last_ns = 0

    def now_ns(self) -> int:
        """Return nanoseconds since the start, never less than before."""
        self._last_ns = max(self._last_ns, time.monotonic_ns() - self._start_ns)
        return self._last_ns

    def wait(self, engine: "Engine") -> set[str]:
        """Wait for a message, the end of a job, or the next decision."""
        s = engine.node.state
        until_ns = int(min(s.due_ns, s.timer_ns))
        if engine.deciding:
            until_ns = min(until_ns, engine.decision_until_ns)
        timeout_s = max(0.0, (until_ns - self.now_ns()) / 1e9)
        # What was taken in while an instant waited for a worker is there already.
        at_once = engine.ended() or engine.inbox.calls
        engine.inbox.receive(0.0 if at_once else timeout_s)
        return engine.ended()


class SimulatedTime:
    """The clock of the cost model: an event happens when the simulator says so.

    Args:
        script: What comes from outside, and when: (instant in ns, function), in order.
    """

    real = False

    def __init__(self, script: Sequence[tuple[int, Callable[[], None]]] = ()) -> None:
        self._now_ns = 0
        self._script = deque(script)

    def now_ns(self) -> int:
        """Return simulated nanoseconds."""
        return self._now_ns

    def wait(self, engine: "Engine") -> set[str]:
        """Go to the next event that the costs foresee; jobs that end there have really ended."""
        s = engine.node.state
        self._now_ns = engine.node.next_event_ns()
        if self._script:
            self._now_ns = min(self._now_ns, self._script[0][0])
        while self._script and self._script[0][0] == self._now_ns:
            self._script.popleft()[1]()
        ends = {COMPUTE: s.gpu_end_ns, H2D: s.h2d_end_ns, D2H: s.d2h_end_ns}
        ended = {worker for worker, end in ends.items() if end == self._now_ns}
        if s.gpu_kind != IDLE and s.gpu_link_bound:
            ended.discard(COMPUTE)
            engine.foreseen_compute_end = bool(s.gpu_end_ns == self._now_ns)
        for worker in ended:
            engine.join(worker)
        return ended
