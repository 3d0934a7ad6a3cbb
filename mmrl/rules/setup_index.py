"""`SetupIndex`: serve where the reward rate, set-up included, is highest (Duenyas & Van Oyen 1995).

The index of a model that lacks weights is its requests over the time to load it and serve them,
that of a resident one its requests over the time to serve them. The model with the highest index
is loaded; if it does not fit, models of lower index make room for it.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import level_pieces, missing_bytes, room_bytes
from mmrl.node.jit import jit
from mmrl.node.memory import has_work, idle_bytes
from mmrl.node.observe import load_ns
from mmrl.node.state import CostTable, Nodes, Record
from mmrl.rules.base import Rule, tunable
from mmrl.rules.common import (
    freed_bytes,
    lacks,
    load_if_legal,
    load_verb,
    out_if_legal,
    prefill_ns,
    residency_ns,
    service_ns,
)


class SetupIndex(Rule):
    """Switch to the higher reward rate.

    Attributes:
        advantage: A victim's index is so many times lower than that of the model that comes.
        residency_s: A victim has been resident for so long.
    """

    name: ClassVar[str] = "setup-index"
    number: ClassVar[int] = 7

    advantage: float = tunable(2.0, 1.0, 32.0, log=True)
    residency_s: float = tunable(1.0, 0.0, 10.0, unit="s")


@jit
def index(
    s: Record, r: Nodes, m: int, decode_tables: CostTable, prefill_tables: CostTable
) -> float:
    """Return requests served per nanosecond if the device turned to model ``m`` now."""
    work = service_ns(s, r, m, decode_tables)
    for k in range(s.queue_len[m]):
        work += prefill_ns(s, m, r[s.queue[m, k]].prompt, prefill_tables)
    return float((s.queue_len[m] + s.begun_len[m]) / (load_ns(s, m) + work))


@jit
def next_victim(
    s: Record,
    r: Nodes,
    m: int,
    highest: float,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    residency: float,
) -> int:
    """Return the model of the lowest index below ``highest`` to put out for model ``m``, or -1."""
    pieces = level_pieces(s, m, load_verb(s, r, m))
    need = missing_bytes(s, r, m, pieces) - room_bytes(s, r, m) - idle_bytes(s, m)
    victim = -1
    lowest = highest
    for v in range(s.n_models):
        if has_work(s, v) and not s.acted[v] & 1 and residency_ns(s, v) >= residency:
            value = index(s, r, v, decode_tables, prefill_tables)
            if value < highest:
                need -= freed_bytes(s, v)
                if value < lowest:
                    lowest = value
                    victim = v
    return victim if need <= 0 else -1


@jit
def suggest(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action of ``SetupIndex``."""
    chosen = -1
    highest = 0.0
    for m in range(s.n_models):
        if lacks(s, m):
            value = index(s, r, m, decode_tables, prefill_tables)
            if value > highest:
                highest = value
                chosen = m
    if chosen < 0:
        return 0
    action = load_if_legal(s, r, chosen)
    if action != 0:
        return action
    victim = next_victim(
        s, r, chosen, highest / params[0], decode_tables, prefill_tables, params[1] * 1e9
    )
    return out_if_legal(s, r, victim) if victim >= 0 else 0
