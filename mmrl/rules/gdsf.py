"""`Gdsf`: evict idle models in GreedyDual-Size-Frequency order (Cherkasova 1998, FaasCache 2021).

The node evicts idle models in this order by itself when a load needs room, so the rule only loads:
the model of the oldest waiting request, as soon as it fits.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.state import CostTable, Nodes, Record
from mmrl.rules.base import Rule
from mmrl.rules.common import load_if_legal, longest_waiting


class Gdsf(Rule):
    """Idle models go by uses x load time / size above an ageing clock."""

    name: ClassVar[str] = "gdsf"
    number: ClassVar[int] = 3


@jit
def suggest(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action of ``Gdsf``."""
    m = longest_waiting(s, r)
    return load_if_legal(s, r, m) if m >= 0 else 0
