"""`FullSwap`: one model at a time, swapped in order of arrival, as llama-swap does.

The model on the device stays until all its requests that arrived before the oldest request of any
other model are done; then it goes and that other model comes.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.state import CostTable, Nodes, Record
from mmrl.rules.base import Rule
from mmrl.rules.common import first_arrival_ns, load_if_legal, longest_waiting, out_if_legal


class FullSwap(Rule):
    """First come first served, one model on the device."""

    name: ClassVar[str] = "full-swap"
    number: ClassVar[int] = 1


@jit
def suggest(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action of ``FullSwap``."""
    m = longest_waiting(s, r)
    if m < 0:
        return 0
    for v in range(s.n_models):
        if s.target[v] > 0 and first_arrival_ns(s, r, v) < first_arrival_ns(s, r, m):
            return 0
    for v in range(s.n_models):
        if s.target[v] > 0:
            return out_if_legal(s, r, v)
    return load_if_legal(s, r, m)
