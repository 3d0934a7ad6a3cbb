"""`IdleCost`: evict what is idle longest against the cost of its reload, as Lemonade does."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.memory import is_idle, load_seconds
from mmrl.node.observe import RATE_LONG_S, estimated_rate
from mmrl.node.state import CostTable, Nodes, Record
from mmrl.rules.base import Rule, tunable
from mmrl.rules.common import longest_waiting, make_room_or_load


class IdleCost(Rule):
    """The victim has the largest ``idle time / (load time x weight)``.

    Attributes:
        rate_weight: The weight of a model is its arrivals per second to this power; 0 weighs all
            models the same.
    """

    name: ClassVar[str] = "idle-cost"
    number: ClassVar[int] = 4

    rate_weight: float = tunable(0.0, 0.0, 2.0)


@jit
def suggest(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action of ``IdleCost``."""
    m = longest_waiting(s, r)
    if m < 0:
        return 0
    victim = -1
    highest = -1.0
    for v in range(s.n_models):
        if is_idle(s, v):
            rate = estimated_rate(s, v, s.rate_long[v], RATE_LONG_S)
            weight = load_seconds(s, v) * (1e-3 + rate) ** params[0]
            score = (s.now_ns - s.used_ns[v]) / weight
            if score > highest:
                highest = score
                victim = v
    return make_room_or_load(s, r, m, victim)
