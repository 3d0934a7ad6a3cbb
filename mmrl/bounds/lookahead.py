"""`Lookahead`: play each action on a copy of the node, go on by a rule, take what ends best.

At an instant the node is copied for each action that is legal; the copy does the action, and the
base rule plays it up to a frozen horizon. Its value is the reward of that time (section 9 of
``docs/semantics.md``)::

    - miss_weight x misses that became certain - latency_weight x latency integral

The action with the highest value is taken; the base rule's own where none is better. This is one
step of policy improvement (Bertsekas, *Rollout, Policy Iteration and Distributed RL*, 2020): where
the future is known and the horizon reaches the end, no episode earns less than under the base rule.

With the true future this is the `clairvoyant` bound: a schedule that can be had by who knows all
arrivals and outputs, and so a lower bound on the best one. With samples of futures it is `mpc`, a
model-predictive rule: an action must beat the base rule's by ``confidence`` standard errors over
the samples, for the best of many noisy values is mostly noise.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmrl.bounds.futures import Uniforms, copy_node, draw_arrivals, redraw_open
from mmrl.node.actions import VERBS, WAIT, decode, legal_actions
from mmrl.node.jit import jit, jit_arrays
from mmrl.node.state import CostTable, Nodes, Record, new_nodes, new_requests
from mmrl.rules.base import Rule
from mmrl.rules.dispatch import suggest
from mmrl.rules.slack import Slack
from mmrl.sim.batch import Simulator
from mmrl.sim.kernel import step

UNIFORMS = 2**16  # random numbers, read round and round
STRIDE = 1009  # of them lie between the first ones of two samples
EXTRA_ARRIVALS = 512  # sampled arrivals that a table has room for beside the true ones
LEAST_GAIN = 1e-9  # above what rounding makes of equal values


@dataclass(frozen=True)
class Planner:
    """How to look ahead.

    Attributes:
        futures: Sampled futures; 0 for the true one.
        horizon_s: How far each is played.
        confidence: Standard errors over the samples by which an action must be better than that of
            the base rule.
        base: The rule that plays on.
        verbs: Verbs that are tried besides the base rule's action; with none its own play results.
        seed: Of the samples.
    """

    futures: int
    horizon_s: float = 10.0
    confidence: float = 0.0
    base: Rule = field(default_factory=Slack)
    verbs: tuple[str, ...] = VERBS
    seed: int = 0


PLANNERS = {
    "mpc": Planner(futures=8, horizon_s=8.0, confidence=2.0),
    "clairvoyant": Planner(futures=0),
}


class Search(NamedTuple):
    """A `Planner` in the form that compiled code reads."""

    futures: int
    horizon_ns: int
    confidence: float
    number: int
    params: npt.NDArray[np.float64]
    allowed: npt.NDArray[np.bool_]
    uniforms: Uniforms


class Lookahead:
    """A planner at work on the nodes of a simulator, which have been reset.

    Sets the dispatch rule of the base rule.
    """

    def __init__(self, planner: Planner, simulator: Simulator) -> None:
        planner.base.prepare(simulator.nodes)
        self._simulator = simulator
        allowed = np.zeros(simulator.num_actions, np.bool_)
        allowed[WAIT] = len(planner.verbs) > 0
        full_verbs = int(simulator.sampler.full_verbs)
        for action in range(1, simulator.num_actions):
            allowed[action] = VERBS[decode(full_verbs, action)[1]] in planner.verbs
        self._search = Search(
            planner.futures,
            round(planner.horizon_s * 1e9),
            planner.confidence,
            planner.base.number,
            planner.base.params,
            allowed,
            np.random.default_rng(planner.seed).random(UNIFORMS),
        )
        self._mask = np.zeros(simulator.num_actions, np.bool_)
        # The futures, and behind them the copy that is played.
        count = max(1, planner.futures) + 1
        capacity = simulator.requests.shape[1] + EXTRA_ARRIVALS
        self._copies: Any = np.asarray(new_nodes(count))
        self._copied: Any = np.asarray(new_requests(count, capacity))

    def act(self, i: int) -> int:
        """Return the action for node ``i``, which is not done; a legal one."""
        simulator = self._simulator
        return int(
            choose(
                simulator.node_array,
                i,
                simulator.request_array[i],
                self._copies,
                self._copied,
                self._search,
                self._mask,
                simulator.decode_tables,
                simulator.prefill_tables,
            )
        )

    def run(self) -> None:
        """Drive all nodes to the ends of their episodes."""
        simulator = self._simulator
        actions = np.zeros(simulator.num_envs, np.int64)
        while not simulator.done.all():
            for i in np.flatnonzero(simulator.done == 0):
                actions[i] = self.act(int(i))
            simulator.step(actions)


@jit_arrays
def choose(
    nodes: Nodes,
    i: int,
    r: Nodes,
    copies: Nodes,
    copied: Nodes,
    search: Search,
    mask: npt.NDArray[np.bool_],
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> int:
    """Return the action of highest value for node ``i``; the base rule's where none is better.

    Args:
        nodes: Where the node is.
        i: Its place.
        r: Its requests.
        copies: Room for the futures and one more node.
        copied: Room for their requests.
        search: How to search.
        mask: bool[A], overwritten.
        decode_tables: float64[P, 65, 33].
        prefill_tables: float64[P, 257].
    """
    s = nodes[i]
    base = suggest(search.number, s, r, decode_tables, prefill_tables, search.params)
    legal_actions(s, r, mask)
    mask &= search.allowed
    mask[base] = False
    if s.in_system == 0 or not mask.any():
        return base  # nobody waits for anything, or there is nothing to choose
    make_futures(nodes, i, r, copies, copied, search, decode_tables, prefill_tables)
    of_base = values(copies, copied, base, search, decode_tables, prefill_tables)
    best = base
    best_gain = LEAST_GAIN
    for action in range(len(mask)):
        if not mask[action]:
            continue
        gains = values(copies, copied, action, search, decode_tables, prefill_tables) - of_base
        gain = gains.mean()
        if len(gains) > 1:
            gain -= search.confidence * gains.std() / np.sqrt(len(gains) - 1)
        if gain > best_gain:
            best_gain = gain
            best = action
    return best


@jit
def make_futures(
    nodes: Nodes,
    i: int,
    r: Nodes,
    copies: Nodes,
    copied: Nodes,
    search: Search,
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> None:
    """Write the future of node ``i``, or samples of it, into ``copies`` and ``copied``."""
    for k in range(max(1, search.futures)):
        copy_node(nodes, i, r, copies, k, copied[k], search.horizon_ns)
        if search.futures > 0:
            s = copies[k]
            at = (s.decisions * search.futures + k) * STRIDE
            tables = decode_tables, prefill_tables
            at = redraw_open(s, r, copied[k], search.uniforms, at, *tables)
            draw_arrivals(s, r, copied[k], search.uniforms, at, *tables)


@jit_arrays
def values(
    copies: Nodes,
    copied: Nodes,
    action: int,
    search: Search,
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> npt.NDArray[np.float64]:
    """Return the value of an action in each future, float64[futures]."""
    last = len(copies) - 1
    found = np.empty(last)
    for k in range(last):
        copy_node(copies, k, copied[k], copies, last, copied[last], 0)
        tables = decode_tables, prefill_tables
        found[k] = play_on(copies[last], copied[last], action, search, *tables)
    return found


@jit
def play_on(
    s: Record,
    r: Nodes,
    action: int,
    search: Search,
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> float:
    """Do an action, let the base rule play on to the horizon, and return the reward of it all."""
    total = 0.0
    while True:
        step(s, r, decode_tables, prefill_tables, action)
        total -= s.miss_weight * s.misses + s.latency_weight * s.latency_area
        if s.done:
            return float(total)
        action = suggest(search.number, s, r, decode_tables, prefill_tables, search.params)
