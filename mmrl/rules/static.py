"""`Static`: pin the best subset of models by the rates of a warm-up, and never change it.

During the warm-up models come and go as under `Gdsf`. Then models are pinned greedily by arrivals
per byte, as long as they and a share of the budget for KV fit; the others are not served any more.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit_arrays
from mmrl.node.memory import weight_bytes
from mmrl.node.state import MAX_MODELS, CostTable, Nodes, Record
from mmrl.rules import gdsf
from mmrl.rules.base import Rule, tunable
from mmrl.rules.common import lacks, load_if_legal, out_if_legal


class Static(Rule):
    """A pinned set of models.

    Attributes:
        warm_up_s: Arrivals are counted for so long.
        kv_share: Share of the budget that stays free for KV cache.
    """

    name: ClassVar[str] = "static"
    number: ClassVar[int] = 5

    warm_up_s: float = tunable(20.0, 5.0, 60.0, unit="s")
    kv_share: float = tunable(0.1, 0.02, 0.5)


@jit_arrays
def pin(
    s: Record, r: Nodes, warm_up_ns: float, kv_share: float, pinned: npt.NDArray[np.int8]
) -> None:
    """Write which models are pinned into ``pinned`` (int8[MAX_MODELS])."""
    arrivals = np.zeros(MAX_MODELS)
    for i in range(s.next_arrival):
        if r[i].arrival_ns > warm_up_ns:
            break
        arrivals[r[i].model] += 1.0
    pinned[:] = 0
    room = s.budget_bytes * (1.0 - kv_share) - s.reserve_bytes
    tried = np.zeros(MAX_MODELS, dtype=np.int8)
    for _ in range(s.n_models):
        best = -1
        for m in range(s.n_models):
            if not tried[m] and (
                best < 0
                or arrivals[m] * weight_bytes(s, best, s.pieces[best])
                > arrivals[best] * weight_bytes(s, m, s.pieces[m])
            ):
                best = m
        tried[best] = 1
        size = weight_bytes(s, best, s.pieces[best])
        if size <= room:
            room -= size
            pinned[best] = 1


@jit_arrays
def suggest(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action of ``Static``."""
    warm_up_ns = params[0] * 1e9
    if s.now_ns <= warm_up_ns:
        return gdsf.suggest(s, r, decode_tables, prefill_tables, params)
    pinned = np.zeros(MAX_MODELS, dtype=np.int8)
    pin(s, r, warm_up_ns, params[1], pinned)
    for m in range(s.n_models):
        if not pinned[m] and s.target[m] > 0:
            action = out_if_legal(s, r, m)
            if action != 0:
                return action
    for m in range(s.n_models):
        if pinned[m] and lacks(s, m):
            action = load_if_legal(s, r, m)
            if action != 0:
                return action
    return 0
