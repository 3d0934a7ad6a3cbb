"""`DrainFirst`: serve what has come, then switch, once enough wait (Hofri & Ross 1987).

A model that lacks weights is called when its requests number ``threshold`` or its oldest has
waited for ``longest_wait_s``. Idle models make room for it; if that is not enough, drained models
do, which have finished all that is older than the oldest waiting request, lowest GDSF priority
first.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import level_pieces, missing_bytes, room_bytes
from mmrl.node.jit import jit
from mmrl.node.memory import has_work, idle_bytes
from mmrl.node.state import CostTable, Nodes, Record
from mmrl.rules.base import Rule, tunable
from mmrl.rules.common import (
    first_arrival_ns,
    freed_bytes,
    lacks,
    load_if_legal,
    load_verb,
    out_if_legal,
    residency_ns,
)


class DrainFirst(Rule):
    """Threshold policy: drain, then switch.

    Attributes:
        threshold: A model is called when so many of its requests wait ...
        longest_wait_s: ... or when the oldest of them has waited for so long.
    """

    name: ClassVar[str] = "drain-first"
    number: ClassVar[int] = 6

    threshold: float = tunable(2.0, 1.0, 16.0, log=True)
    longest_wait_s: float = tunable(1.0, 0.05, 30.0, log=True, unit="s")


@jit
def drained(s: Record, r: Nodes, v: int, since_ns: int) -> bool:
    """Return whether resident model ``v`` has served all that arrived before ``since_ns``."""
    return bool(
        residency_ns(s, v) >= 0 and has_work(s, v) and first_arrival_ns(s, r, v) >= since_ns
    )


@jit
def next_victim(s: Record, r: Nodes, m: int) -> int:
    """Return the drained model to put out for model ``m``; -1 if all of them do not make room."""
    oldest = first_arrival_ns(s, r, m)
    pieces = level_pieces(s, m, load_verb(s, r, m))
    need = missing_bytes(s, r, m, pieces) - room_bytes(s, r, m) - idle_bytes(s, m)
    victim = -1
    for v in range(s.n_models):
        if drained(s, r, v, oldest) and not s.acted[v] & 1:
            need -= freed_bytes(s, v)
            if victim < 0 or s.gdsf_priority[v] < s.gdsf_priority[victim]:
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
    """Return the action of ``DrainFirst``."""
    for m in range(s.n_models):
        if not lacks(s, m):
            continue
        waited_s = (s.now_ns - first_arrival_ns(s, r, m)) * 1e-9
        if s.queue_len[m] + s.begun_len[m] < params[0] and waited_s < params[1]:
            continue
        action = load_if_legal(s, r, m)
        if action != 0:
            return action
        victim = next_victim(s, r, m)
        if victim >= 0:
            return out_if_legal(s, r, victim)
    return 0
