"""The suggestion of a hand-written rule as a block of the observation: one-hot over the actions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.errors import InputError
from mmrl.node.jit import jit
from mmrl.node.state import CostTable, Nodes
from mmrl.rules import get_rule
from mmrl.rules.base import Rule
from mmrl.rules.dispatch import suggest


def as_rule(suggestion: str | Mapping[str, Any] | Rule) -> Rule:
    """Return the rule that is meant.

    Args:
        suggestion: A rule, its name, or a mapping of its ``name`` and parameters.

    Raises:
        InputError: There is no such rule, or a parameter is wrong.
    """
    if isinstance(suggestion, Rule):
        return suggestion
    if isinstance(suggestion, str):
        return get_rule(suggestion)
    params = dict(suggestion)
    if "name" not in params:
        raise InputError("suggestion has no name", "give {'name': 'slack', ...}")
    return get_rule(params.pop("name"), **params)


@jit
def write_suggestions(
    number: int,
    params: npt.NDArray[np.float64],
    nodes: Nodes,
    requests: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    first: int,
    out: npt.NDArray[np.float32],
) -> None:
    """Mark the action that the rule suggests for each node in ``out[i, first:]``, which is zero.

    Nothing is left to decide on a finished node: WAIT.
    """
    for i in range(len(nodes)):
        s = nodes[i]
        action = 0
        if not s.done:
            action = suggest(number, s, requests[i], decode_tables, prefill_tables, params)
        out[i, first + action] = 1.0
