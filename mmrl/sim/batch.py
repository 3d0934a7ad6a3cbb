"""Many simulated nodes advanced by one compiled call.

``Simulator`` holds N nodes and their requests as struct-of-arrays; each is an independent episode
drawn by a sampler from its own random stream, so that results do not depend on N.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import legal_actions, some_verb_legal, verb_count
from mmrl.node.jit import jit
from mmrl.node.observe import observation_size, observe
from mmrl.node.state import MAX_MODELS, CostTable, Nodes, Record, new_nodes, new_requests
from mmrl.sim.kernel import act, advance, next_decision, settle_reward, start, step

ALL = slice(None)


class Sampler(Protocol):
    """Where episodes come from; ``mmrl.scenarios`` makes them."""

    decode_tables: CostTable
    prefill_tables: CostTable
    capacity: int
    max_models: int
    full_verbs: bool

    def draw(
        self,
        rng: np.random.Generator,
        node: Record,
        requests: Nodes,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Fill the constants of a zeroed node and its requests; return what was drawn."""


@jit
def _read_step(
    s: Record, i: int, terms: npt.NDArray[np.float64], dt_s: npt.NDArray[np.float64]
) -> None:
    terms[i, 0] = -s.miss_weight * s.misses
    terms[i, 1] = -s.latency_weight * s.latency_area
    dt_s[i] = (s.now_ns - s.decided_ns) * 1e-9


@jit
def _step_all(
    nodes: Nodes,
    requests: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    actions: npt.NDArray[np.int64],
    terms: npt.NDArray[np.float64],
    dt_s: npt.NDArray[np.float64],
) -> None:
    for i in range(len(nodes)):
        s = nodes[i]
        if s.done:
            continue
        step(s, requests[i], decode_tables, prefill_tables, actions[i])
        _read_step(s, i, terms, dt_s)


@jit
def _observe_all(
    nodes: Nodes,
    requests: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    out: npt.NDArray[np.float32],
) -> None:
    for i in range(len(nodes)):
        observe(nodes[i], requests[i], decode_tables, prefill_tables, out[i])


@jit
def _masks_all(nodes: Nodes, requests: Nodes, out: npt.NDArray[np.bool_]) -> None:
    for i in range(len(nodes)):
        legal_actions(nodes[i], requests[i], out[i])


@jit
def _begin(s: Record, r: Nodes, decode_tables: CostTable, prefill_tables: CostTable) -> None:
    start(s, r)
    advance(s, r, decode_tables, prefill_tables)


class Simulator:
    """N independent simulated nodes.

    Attributes:
        nodes: recarray[N] of ``NODE``.
        requests: recarray[N, R] of ``REQUEST``.
        node_array: The memory of ``nodes`` as a plain array, for compiled code and whole fields.
        request_array: The memory of ``requests`` as a plain array.
        infos: What the sampler drew for each node.
        rewards: float64[N], of the last step.
        reward_terms: float64[N, 2], misses and latency; ``rewards`` is their sum.
        dt_s: float64[N], simulated seconds that the last step took.
        done: int8[N], 0 running, 1 terminated (every request ended), 2 truncated (horizon).
    """

    def __init__(self, sampler: Sampler, num_envs: int, longest: int = 0) -> None:
        """Make room for nodes; each must be ``reset`` before it is stepped.

        Args:
            sampler: Where episodes come from.
            num_envs: How many nodes.
            longest: Requests of the longest trace to be played, if any is.
        """
        self.sampler = sampler
        self.num_envs = num_envs
        self.max_models = sampler.max_models
        self.decode_tables = sampler.decode_tables
        self.prefill_tables = sampler.prefill_tables
        self.num_actions = 1 + self.max_models * verb_count(int(sampler.full_verbs))
        self.observation_size = observation_size(self.max_models)
        self.nodes = new_nodes(num_envs)
        self.nodes.done = 2
        self.requests = new_requests(num_envs, max(sampler.capacity, longest))
        self.infos: list[Any] = [None] * num_envs
        self.reward_terms = np.zeros((num_envs, 2))
        self.dt_s = np.zeros(num_envs)
        self._zero = np.zeros_like(self.nodes[0])
        self._share_memory()

    def _share_memory(self) -> None:
        # To numba and NumPy a recarray costs several times what a plain array does.
        self.node_array: Any = np.asarray(self.nodes)
        self.request_array: Any = np.asarray(self.requests)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share_memory()

    @property
    def rewards(self) -> npt.NDArray[np.float64]:
        """Return the rewards of the last step, float64[N]."""
        total: npt.NDArray[np.float64] = self.reward_terms.sum(axis=1)
        return total

    @property
    def done(self) -> npt.NDArray[np.int8]:
        """Return 0 running, 1 terminated or 2 truncated for each node, int8[N]."""
        done: npt.NDArray[np.int8] = self.node_array["done"].copy()
        return done

    def reset(
        self, i: int, rng: np.random.Generator, options: Mapping[str, Any] | None = None
    ) -> None:
        """Draw an episode for node ``i`` and bring it to its first decision."""
        self.nodes[i] = self._zero
        node, requests = self.nodes[i], self.requests[i]
        self.infos[i] = self.sampler.draw(rng, node, requests, options)
        _begin(node, requests, self.decode_tables, self.prefill_tables)

    def step(self, actions: npt.NDArray[np.int64]) -> None:
        """Do one action per node, int64[N]; finished nodes stay as they are with reward 0."""
        self.reward_terms[:] = 0.0
        self.dt_s[:] = 0.0
        _step_all(
            self.node_array,
            self.request_array,
            self.decode_tables,
            self.prefill_tables,
            actions,
            self.reward_terms,
            self.dt_s,
        )

    def step_watched(self, i: int, action: int, watch: Callable[[], None]) -> None:
        """Do one action on node ``i`` alone; call ``watch`` at each instant that goes unasked.

        Those are the decision instants on the way at which no verb is legal.
        """
        self.reward_terms[i] = 0.0
        self.dt_s[i] = 0.0
        s, r = self.nodes[i], self.request_array[i]
        if s.done:
            return
        if not act(s, r, action):
            ready = np.zeros(MAX_MODELS, np.int8)
            next_decision(s, r, ready, self.decode_tables, self.prefill_tables)
            while not s.done and not some_verb_legal(s, r):
                watch()
                next_decision(s, r, ready, self.decode_tables, self.prefill_tables)
            settle_reward(s, r)
        _read_step(s, i, self.reward_terms, self.dt_s)

    def observe(self, out: npt.NDArray[np.float32], rows: slice = ALL) -> None:
        """Write the observations of the nodes of a slice, float32[K, at least observation_size].

        What is left of a row is filled with zeros.
        """
        nodes, requests = self.node_array[rows], self.request_array[rows]
        _observe_all(nodes, requests, self.decode_tables, self.prefill_tables, out)

    def masks(self, out: npt.NDArray[np.bool_], rows: slice = ALL) -> None:
        """Write the legal actions of the nodes of a slice, bool[K, at least num_actions]."""
        _masks_all(self.node_array[rows], self.request_array[rows], out)
