"""`Lru`: evict the idle model that was used least recently, as Ollama does.

Models are loaded in order of the oldest waiting request; a model with work is never put out. With
levels, a model that can never fit whole gets as many of its layers as do.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.state import CostTable, Nodes, Record
from mmrl.rules.base import Rule, tunable
from mmrl.rules.common import longest_unused, longest_waiting, make_room_or_load


class Lru(Rule):
    """Least recently used among the idle models.

    Attributes:
        keep_alive_s: An idle model stays for so long after its last use.
    """

    name: ClassVar[str] = "lru"
    number: ClassVar[int] = 2

    keep_alive_s: float = tunable(0.0, 0.0, 10.0, unit="s")


@jit
def suggest(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action of ``Lru``."""
    m = longest_waiting(s, r)
    if m < 0:
        return 0
    victim = longest_unused(s)
    if victim >= 0 and s.now_ns - s.used_ns[victim] < params[0] * 1e9:
        victim = -1
    return make_room_or_load(s, r, m, victim)
