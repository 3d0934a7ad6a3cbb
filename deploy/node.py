"""`LiveNode`: the state of a running node, moved from instant to instant by what really happened.

The arrays, the transitions and the order of an instant's steps are the simulator's
(``docs/semantics.md`` section 7); only the ends of iterations and transfers come from outside. What
is to be started next stands in the arrays afterwards; the engine does it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mmrl.deploy import transitions
from mmrl.node.actions import verb_count
from mmrl.node.observe import observation_size
from mmrl.node.state import (
    CANCELLED,
    DECODE,
    DISPATCHES,
    DONE,
    IDLE,
    LINK_RESTORE,
    MAX_MODELS,
    NEVER,
    REFUSED,
    CostTable,
    Nodes,
    Record,
    new_nodes,
    new_requests,
)
from mmrl.profiles.costs import CostModel
from mmrl.profiles.schema import Profile
from mmrl.scenarios.bank import CostBank
from mmrl.scenarios.targets import TargetNumbers, targets_ns
from mmrl.sim.kernel import start

CAPACITY = 8192  # rows of requests; the oldest that have ended make room


@dataclass(frozen=True)
class ModelCosts:
    """A model as the state knows it: its profile, and the bytes that it really takes.

    Attributes:
        profile: Costs of its iterations and transfers.
        layers: Decoder layers.
        base_bytes: Device memory of the base weights.
        layer_bytes: Device memory of a layer.
        block_bytes: Device memory of a KV block.
        targets: Latency targets.
        batch: Whether it does batch work, which has a TTFT target of its own and no TPOT target.
    """

    profile: Profile
    layers: int
    base_bytes: int
    layer_bytes: int
    block_bytes: int
    targets: TargetNumbers
    batch: bool = False


@dataclass(frozen=True)
class NodeNumbers:
    """Numbers of a node, as in section 1 of ``docs/semantics.md``."""

    budget_bytes: int
    reserve_bytes: int
    host_kv_limit_bytes: int
    full_verbs: bool
    dispatch: str = "rr"
    prefetch: bool = True
    interval_ns: int = 250_000_000
    latency_ns: int = 0  # a live decision takes the time that it takes
    gap_ns: int = 100_000_000


class LiveNode:
    """State and transitions of a running node.

    Args:
        nodes: array[1] of ``NODE`` whose constants are filled.
        table: array[1, R] of ``REQUEST``.
        decode_tables: float64[P, 65, 33], seconds; a model's ``profile`` is the row.
        prefill_tables: float64[P, 257], seconds.
        models: The fleet; without it nothing can be submitted.

    Attributes:
        state: The record of ``NODE``, a view of ``nodes``.
        requests: The rows of ``table``, in order of arrival; they move only in `compact`.
    """

    def __init__(
        self,
        nodes: Nodes,
        table: Nodes,
        decode_tables: CostTable,
        prefill_tables: CostTable,
        models: Sequence[ModelCosts] = (),
    ) -> None:
        self.nodes: Any = np.asarray(nodes)
        self.table: Any = np.asarray(table)
        self.state: Record = self.nodes.view(np.recarray)[0]
        self.requests: Any = self.table[0]
        self.decode_tables, self.prefill_tables = decode_tables, prefill_tables
        self.models = tuple(models)
        self._costs = [CostModel(model.profile) for model in models]
        start(self.state, self.requests.view(np.recarray))
        rows = len(self.requests)
        self._ready = np.zeros(MAX_MODELS, np.int8)
        self._first = np.zeros(1, np.int64)
        self._held = np.zeros(rows, np.int32)
        self._changed = np.zeros(rows, np.int32)
        count, full_verbs = int(self.state.n_models), int(self.state.full_verbs)
        self._actions = 1 + count * verb_count(full_verbs)

    @classmethod
    def of(cls, models: Sequence[ModelCosts], numbers: NodeNumbers) -> Self:
        """Make the node of a fleet, with nothing on the device and no requests."""
        bank = CostBank.of(tuple(model.profile for model in models))
        nodes, count = new_nodes(1), len(models)
        s = nodes[0]
        s.n_models = count
        s.horizon_ns = NEVER
        for field, value in asdict(numbers).items():
            s[field] = DISPATCHES.index(value) if field == "dispatch" else value
        for field, values in bank.constants.items():
            s[field][:count] = values
        s.decode_scale[:count] = s.prefill_scale[:count] = 1.0
        for m, model in enumerate(models):
            s.pieces[m] = model.layers + 1
            s.base_bytes[m] = model.base_bytes
            s.layer_bytes[m] = model.layer_bytes
            s.block_bytes[m] = model.block_bytes
        tables = bank.decode_tables, bank.prefill_tables
        return cls(nodes, new_requests(1, CAPACITY), *tables, models)

    # ------------------------------------------------------------------ what happened

    def submit(self, now_ns: int, m: int, prompt_tokens: int, max_tokens: int) -> int:
        """Append a request; it arrives at the next `advance`. Return its row.

        The table must not be `full`.
        """
        s, i = self.state, int(self.state.n_requests)
        row, model = self.requests[i], self.models[m]
        self.requests[i] = np.zeros((), self.requests.dtype)
        row["first_ns"] = row["finish_ns"] = -1
        row["arrival_ns"] = now_ns
        row["model"] = m
        row["prompt"] = prompt_tokens
        row["output"] = max_tokens
        costs = self._costs[m]
        prefill_ns, step_ns = costs.prefill_s(prompt_tokens) * 1e9, costs.decode_s(1, 0) * 1e9
        row["ttft_ns"], row["tpot_ns"] = targets_ns(
            model.targets, prompt_tokens, prefill_ns, step_ns
        )
        if model.batch:
            row["ttft_ns"], row["tpot_ns"] = model.targets.batch_ttft_ns, 0
        # Only the reward reads it, and a live node has none.
        row["isolated_ns"] = max(1, round(prefill_ns))
        s.n_requests = i + 1
        return i

    @property
    def full(self) -> bool:
        """Whether no row is left; `compact` then makes some."""
        return bool(self.state.n_requests >= len(self.requests))

    def compact(self) -> npt.NDArray[np.int32]:
        """Forget the requests that have ended; return the new row of each old one, -1 if gone."""
        s, count = self.state, int(self.state.n_requests)
        states = self.requests["state"][:count]
        kept = np.flatnonzero((states != DONE) & (states != REFUSED) & (states != CANCELLED))
        moved = np.full(len(self.requests) + 1, -1, np.int32)
        moved[kept] = np.arange(len(kept), dtype=np.int32)
        for table in (self.requests, self._held):
            rows = table[kept]
            table[:] = np.zeros((), table.dtype)
            table[: len(kept)] = rows
        for name, lengths in (("queue", s.queue_len), ("begun", s.begun_len)):
            for m in range(s.n_models):
                s[name][m, : lengths[m]] = moved[s[name][m, : lengths[m]]]
        s.save_queue[: s.save_len] = moved[s.save_queue[: s.save_len]]
        s.restore_queue[: s.restore_len] = moved[s.restore_queue[: s.restore_len]]
        s.prefilling[: s.n_models] = moved[s.prefilling[: s.n_models]]  # -1 stays: last entry
        s.d2h_request = moved[s.d2h_request]
        if s.h2d_kind == LINK_RESTORE:
            s.h2d_request = moved[s.h2d_request]
        s.next_arrival = int((moved[: s.next_arrival] >= 0).sum())
        s.n_requests = len(kept)
        self._first[0] = 0
        return moved[:-1]

    def advance(
        self,
        now_ns: int,
        *,
        h2d: bool = False,
        d2h: bool = False,
    ) -> None:
        """Come to an instant and end its transfers (steps 1 and 2)."""
        transitions.end_transfers(self.nodes, self.table, now_ns, h2d, d2h)

    def end_compute(self) -> None:
        """End the iteration that computes (step 3)."""
        transitions.end_computing(self.nodes, self.table)

    @property
    def link_bound_complete(self) -> bool:
        """Whether the link-bound iteration in flight has computed and has its bytes."""
        s = self.state
        return bool(
            s.lb_kind != IDLE
            and s.lb_computed
            and s.lb_layers == 0
            and s.landed[s.lb_model] >= s.lb_need
        )

    def end_link_bound(self) -> None:
        """End the link-bound iteration in flight (step 4)."""
        transitions.end_waiting(self.nodes, self.table)

    def settle(self) -> bool:
        """Take in arrivals and settle memory (steps 5 and 6); return whether a decision is due."""
        return bool(transitions.arrive_and_settle(self.nodes, self.table))

    def cancel(self, i: int) -> bool:
        """Take a request out of the node; False where it has to be tried again later."""
        return bool(transitions.cancel_request(self.nodes, self.table, i))

    def end_output(self, i: int) -> None:
        """Make the token of the iteration in flight the last one of a request."""
        transitions.end_output(self.nodes, self.table, i)

    def fail_iteration(self, m: int, *, link_bound: bool, out: bool) -> None:
        """End an iteration with nothing produced; ``out``: and put its model out."""
        transitions.fail_iteration(self.nodes, self.table, m, link_bound, out)

    def fail_load(self) -> None:
        """End the load piece on the link, which has not landed, and put its model out."""
        transitions.fail_load(self.nodes, self.table)

    def fail_save(self) -> None:
        """End the save on the link, which found no room: its sequence is computed again."""
        transitions.drop_save(self.nodes, self.table)

    def preload(self, m: int) -> bool:
        """Load all of a model if it fits; return whether it does."""
        return bool(transitions.preload_model(self.nodes, self.table, m))

    @property
    def progress(self) -> tuple[int, ...]:
        """What is another one whenever an iteration or a transfer has ended."""
        s = self.state
        tokens = int(s.decode_tokens.sum()), int(s.prefill_tokens.sum())
        return *tokens, int(s.h2d_busy_ns), int(s.d2h_busy_ns)

    # ------------------------------------------------------------------ decisions

    def begin_decision(self) -> bool:
        """Begin a decision instant; return whether a verb is legal."""
        return bool(transitions.begin_decision(self.nodes, self.table))

    def act(self, action: int) -> bool:
        """Do a decision (step 8); return whether the next one is asked for at this instant."""
        return bool(transitions.act(self.nodes, self.table, action))

    def legal(self, m: int, verb: int) -> bool:
        """Return whether a verb (index into VERBS) on a model is legal now."""
        return bool(transitions.is_legal(self.nodes, self.table, m, verb))

    def look(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Return the observation, float32[observation_size(M)], and the legal actions, bool[A]."""
        seen = np.zeros(observation_size(int(self.state.n_models)), np.float32)
        mask = np.zeros(self._actions, np.bool_)
        transitions.observe_node(
            self.nodes, self.table, self.decode_tables, self.prefill_tables, seen, mask
        )
        return seen, mask

    # ------------------------------------------------------------------ what to do

    def start_work(self) -> None:
        """Start in the arrays what can start (steps 9 and 10)."""
        transitions.start_work(
            self.nodes, self.table, self._ready, self.decode_tables, self.prefill_tables
        )

    def foresee(self) -> int:
        """Return the model whose decode step surely follows the one that computes, or -1."""
        return int(transitions.foresee(self.nodes, self.table, self._ready))

    def foresee_stream(self) -> int:
        """Return whose next link-bound iteration surely streams what its last one did, or -1."""
        return int(transitions.foresee_stream(self.nodes, self.table))

    def kv_changes(self) -> list[int]:
        """Return the rows whose device blocks changed since the last call, shrinking ones first."""
        count = transitions.kv_changes(
            self.nodes, self.table, self._first, self._held, self._changed
        )
        return [int(i) for i in self._changed[:count]]

    def blocks(self, i: int) -> int:
        """Return the device blocks of a request as of the last `kv_changes`."""
        return int(self._held[i])

    def next_event_ns(self) -> int:
        """Return the next instant that the costs foresee: for a node under a simulated clock."""
        return int(transitions.next_event_ns(self.nodes, self.table))

    def decoding(self, m: int) -> list[int]:
        """Return the rows of the decode batch of a model, in order of arrival."""
        s = self.state
        begun = s.begun[m, : s.begun_len[m]]
        return [int(i) for i in begun if self.requests[i]["state"] == DECODE]
