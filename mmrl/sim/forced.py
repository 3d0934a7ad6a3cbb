"""`play` a simulated node whose decisions come from outside, and `Forced`: decisions from a log.

A live node's log of verbs, played on the same arrivals and costs, separates what the simulator gets
wrong about time from what other decisions would have changed. Each verb is done at its logged
instant. Where the simulated node is behind the live one and a verb is not legal yet, it is tried
again for a while; how many were late, of no effect or never legal is counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import (
    LEVEL_0,
    LEVEL_100,
    OUT,
    PAUSE,
    RESUME,
    WAIT,
    decode,
    legal,
    level_pieces,
    some_verb_legal,
)
from mmrl.node.state import MAX_MODELS, NEVER, CostTable, Nodes, Record
from mmrl.sim.kernel import act, next_decision, settle_reward, start

RETRY_NS = 5_000_000  # between two tries of a verb that is not legal yet
PATIENCE_NS = 1_000_000_000  # after which it is given up


def play(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    decide: Callable[[], int],
    *,
    wake_ns: Callable[[], int] = lambda: NEVER,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Play an episode from its start to its end.

    Args:
        s: A node whose constants are filled, a record of recarray[N] of ``NODE``.
        r: Its requests, array[R] of ``REQUEST``.
        decode_tables: float64[P, 65, 33], seconds.
        prefill_tables: float64[P, 257], seconds.
        decide: Called at each decision instant, as often as a policy is asked; returns an action.
        wake_ns: Called before time goes on; there is a decision instant at what it returns, beside
            those of the semantics.
        watch: Called at each decision instant before anything is decided, and at the end.
    """
    start(s, r)
    ready = np.zeros(MAX_MODELS, np.int8)
    while not s.done:
        s.timer_ns = min(int(s.timer_ns), max(wake_ns(), int(s.now_ns) + 1))
        next_decision(s, r, ready, decode_tables, prefill_tables)
        watch()
        if not s.done and some_verb_legal(s, r):
            while act(s, r, decide()):
                pass
    settle_reward(s, r)


@dataclass
class Forced:
    """Decides as a log says.

    Args:
        s: The node, as for `play`.
        r: Its requests.
        times_ns: int64[K], instants of the logged verbs, never falling.
        actions: int64[K], the verbs; no WAIT.

    Attributes:
        delays_ns: Of each verb done, how long after its logged instant.
        void: Places of verbs whose effect was there already.
        dropped: Places of verbs that did not become legal in time.
    """

    s: Record
    r: Nodes
    times_ns: npt.NDArray[np.int64]
    actions: npt.NDArray[np.int64]
    delays_ns: list[int] = field(default_factory=list)
    void: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    _next: int = 0
    _pending: list[int] = field(default_factory=list)

    @property
    def late(self) -> int:
        """How many verbs were not legal at their instant but were done later."""
        return sum(delay > 0 for delay in self.delays_ns)

    def wake_ns(self) -> int:
        """Return the instant at which the log has something to do."""
        if self._pending:
            return int(self.s.now_ns) + RETRY_NS
        return int(self.times_ns[self._next]) if self._next < len(self.times_ns) else NEVER

    def look(self) -> None:
        """Take up the verbs that are due at this instant."""
        for k in list(self._pending):
            self._settle(k)
        while self._next < len(self.times_ns) and self.times_ns[self._next] <= self.s.now_ns:
            self._pending.append(self._next)
            self._next += 1

    def decide(self) -> int:
        """Return the first due verb that is legal now, else WAIT."""
        for k in list(self._pending):
            m, verb = decode(int(self.s.full_verbs), int(self.actions[k]))
            if legal(self.s, self.r, m, verb):
                self._pending.remove(k)
                self.delays_ns.append(int(self.s.now_ns - self.times_ns[k]))
                return int(self.actions[k])
            self._settle(k)
        return WAIT

    def _settle(self, k: int) -> None:
        """Give up a verb that is not legal, where there is no sense in trying it again."""
        m, verb = decode(int(self.s.full_verbs), int(self.actions[k]))
        if _already(self.s, m, verb):
            self.void.append(k)
        elif self.s.now_ns - self.times_ns[k] > PATIENCE_NS:
            self.dropped.append(k)
        else:
            return
        self._pending.remove(k)


def _already(s: Record, m: int, verb: int) -> bool:
    """Return whether a model is already as a verb would have it."""
    if verb == OUT:
        return bool(s.target[m] == 0)
    if LEVEL_0 <= verb <= LEVEL_100:
        return bool(s.target[m] == level_pieces(s, m, verb))
    if verb in (PAUSE, RESUME):
        return bool(s.paused[m] == (verb == PAUSE))
    return False
