"""``suggest``: the action of any rule by its number, so that one compiled driver runs them all.

`act` is the same for a `Rule` and one node.
"""

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.state import CostTable, Nodes, Record
from mmrl.rules import (
    drain_first,
    full_swap,
    gdsf,
    idle_cost,
    lru,
    partial,
    setup_index,
    slack,
    static,
)
from mmrl.rules.base import Rule


@jit
def suggest(
    number: int,
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action that rule ``number`` takes now; always a legal one.

    Args:
        number: ``Rule.number``.
        s: The node.
        r: Its requests.
        decode_tables: float64[P, 65, 33].
        prefill_tables: float64[P, 257].
        params: float64[MAX_PARAMS], ``Rule.params``.

    Raises:
        ValueError: No rule has this number.
    """
    if number == 0:
        return slack.suggest(s, r, decode_tables, prefill_tables, params)
    if number == 1:
        return full_swap.suggest(s, r, decode_tables, prefill_tables, params)
    if number == 2:
        return lru.suggest(s, r, decode_tables, prefill_tables, params)
    if number == 3:
        return gdsf.suggest(s, r, decode_tables, prefill_tables, params)
    if number == 4:
        return idle_cost.suggest(s, r, decode_tables, prefill_tables, params)
    if number == 5:
        return static.suggest(s, r, decode_tables, prefill_tables, params)
    if number == 6:
        return drain_first.suggest(s, r, decode_tables, prefill_tables, params)
    if number == 7:
        return setup_index.suggest(s, r, decode_tables, prefill_tables, params)
    if number == 8:
        return partial.suggest(s, r, decode_tables, prefill_tables, params)
    raise ValueError("no rule has this number")


def act(
    rule: Rule, s: Record, r: Nodes, decode_tables: CostTable, prefill_tables: CostTable
) -> int:
    """Return the action of a rule for one node, a legal one.

    Args:
        rule: The rule.
        s: The node.
        r: Its requests.
        decode_tables: float64[P, 65, 33], seconds.
        prefill_tables: float64[P, 257], seconds.
    """
    return int(suggest(rule.number, s, r, decode_tables, prefill_tables, rule.params))
