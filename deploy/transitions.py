"""The transitions of a running node, compiled: the simulator's, in parts.

The order of an instant's steps is that of ``docs/semantics.md`` section 7; between the parts the
engine does what has to be done. `foresee` and `foresee_stream` say what the state will ask for,
so that it can be queued ahead; `kv_changes` says what it has given and taken.

Compiled functions take a whole array of one node and its request table: numba looks at the type of
a single record for twenty times as long.
"""

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import (
    legal,
    legal_actions,
    put_out,
    settle_memory,
    some_verb_legal,
)
from mmrl.node.external import (
    cancel,
    end_at_next_token,
    fail_compute,
    fail_link_bound,
    fail_piece,
    fail_save,
    preload,
)
from mmrl.node.jit import jit
from mmrl.node.memory import has_work
from mmrl.node.observe import observe
from mmrl.node.state import (
    DECODE,
    DECODE_STEP,
    DONE,
    IDLE,
    JOINING,
    NEVER,
    PREFILL,
    PREFILL_CHUNK,
    RESTORING,
    SAVING,
    CostTable,
    Nodes,
)
from mmrl.sim import kernel
from mmrl.sim.kernel import arrive, choose_model, decodes_next, end_compute, end_link_bound
from mmrl.sim.link import end_d2h, end_h2d


@jit
def end_transfers(nodes: Nodes, table: Nodes, now_ns: int, h2d: bool, d2h: bool) -> None:
    """Do steps 1 and 2 of an instant: the transfers that have ended."""
    s, r = nodes[0], table[0]
    s.now_ns = now_ns
    if h2d:
        s.h2d_end_ns = now_ns
        end_h2d(s, r)
    if d2h:
        s.d2h_end_ns = now_ns
        end_d2h(s, r)


@jit
def end_computing(nodes: Nodes, table: Nodes) -> None:
    """Do step 3: the iteration that computed has ended."""
    s, r = nodes[0], table[0]
    s.gpu_end_ns = s.now_ns
    end_compute(s, r)


@jit
def end_waiting(nodes: Nodes, table: Nodes) -> None:
    """Do step 4: the link-bound iteration, which has its bytes, has ended."""
    end_link_bound(nodes[0], table[0])


@jit
def arrive_and_settle(nodes: Nodes, table: Nodes) -> bool:
    """Do steps 5 and 6; return whether a decision is due."""
    s, r = nodes[0], table[0]
    arrive(s, r)
    settle_memory(s, r)
    return bool(min(s.due_ns, s.timer_ns) <= s.now_ns)


@jit
def begin_decision(nodes: Nodes, table: Nodes) -> bool:
    """Begin a decision instant; return whether there is something to decide."""
    s, r = nodes[0], table[0]
    s.due_ns = NEVER
    s.timer_ns = s.now_ns + s.interval_ns
    s.acted[:] = 0
    return some_verb_legal(s, r)


@jit
def act(nodes: Nodes, table: Nodes, action: int) -> bool:
    """Do a decision; return whether the next one is asked for at this instant."""
    return kernel.act(nodes[0], table[0], action)


@jit
def start_work(
    nodes: Nodes,
    table: Nodes,
    ready: npt.NDArray[np.int8],
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> None:
    """Do steps 9 and 10: what can start, starts in the arrays."""
    kernel.start_work(nodes[0], table[0], ready, decode_tables, prefill_tables, False)


@jit
def foresee(nodes: Nodes, table: Nodes, ready: npt.NDArray[np.int8]) -> int:
    """Return the resident model whose decode step surely follows the one that computes, or -1.

    Surely, unless something arrives, ends early or is decided in the meantime.
    """
    s, r = nodes[0], table[0]
    m = s.gpu_model
    if s.gpu_kind != DECODE_STEP or s.gpu_link_bound or s.seg_steps[m] + 1 >= s.seg_finish[m]:
        return -1
    c = choose_model(s, r, ready)
    if c < 0 or s.landed[c] < s.pieces[c] or s.granted[c] > s.target[c]:
        return -1
    if ready[c] == 2 and not decodes_next(s, c):
        return -1
    if s.seg_left[c] - (c == m) <= 0:
        return -1
    return c


@jit
def foresee_stream(nodes: Nodes, table: Nodes) -> int:
    """Return the model whose next link-bound iteration surely streams what its last one did, or -1.

    The last one is in flight or has ended. Surely, unless something arrives, ends early or is
    decided in the meantime.
    """
    s, r = nodes[0], table[0]
    m = s.lb_model
    in_flight = s.lb_kind != IDLE
    if (
        s.lb_id == 0
        or s.load_len > 0
        or s.restore_len > 0
        or s.paused[m] == 1
        or s.target[m] == s.pieces[m]
        or not s.target[m] == s.granted[m] == s.landed[m] == s.lb_need
        or (in_flight and s.lb_abandoned)
    ):
        return -1
    for other in range(s.n_models):  # which of two would be the next, only its instant tells
        streams = 0 < s.target[other] < s.pieces[other] or s.landed[other] < s.target[other]
        if other != m and streams and has_work(s, other):
            return -1
    if not in_flight or s.lb_kind == PREFILL_CHUNK:
        if s.decoding[m] > 0:
            return int(m)
        i = s.prefilling[m]
        return int(m) if i >= 0 and r[i].generated + 1 < r[i].output else -1
    for k in range(s.begun_len[m]):
        request = r[s.begun[m, k]]
        if request.state == DECODE and request.generated + s.seg_steps[m] + 1 < request.output:
            return int(m)
    return -1


@jit
def kv_changes(
    nodes: Nodes,
    table: Nodes,
    first: npt.NDArray[np.int64],
    held: npt.NDArray[np.int32],
    changed: npt.NDArray[np.int32],
) -> int:
    """Find the requests whose KV blocks on the device are not those that the state gives them.

    Args:
        nodes: The node.
        table: Its requests.
        first: int64[1], rows before this have ended and hold nothing; brought up to date here.
        held: int32[R], blocks held now, brought up to date here.
        changed: int32[R], receives the rows; those that give blocks back come first.

    Returns:
        How many there are.
    """
    s, r = nodes[0], table[0]
    while first[0] < s.next_arrival and r[first[0]].state >= DONE and held[first[0]] == 0:
        first[0] += 1
    count = 0
    for growing in range(2):
        for i in range(first[0], s.next_arrival):
            state = r[i].state
            wanted = 0
            if PREFILL <= state <= SAVING or state in (RESTORING, JOINING):
                wanted = r[i].blocks
            if (wanted > held[i]) if growing else (wanted < held[i]):
                held[i] = wanted
                changed[count] = i
                count += 1
    return count


@jit
def observe_node(
    nodes: Nodes,
    table: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    seen: npt.NDArray[np.float32],
    mask: npt.NDArray[np.bool_],
) -> None:
    """Write the observation, float32[observation_size(M)], and the legal actions, bool[A]."""
    observe(nodes[0], table[0], decode_tables, prefill_tables, seen)
    legal_actions(nodes[0], table[0], mask)


@jit
def is_legal(nodes: Nodes, table: Nodes, m: int, verb: int) -> bool:
    """Return whether a verb (index into VERBS) on a model is legal now."""
    return legal(nodes[0], table[0], m, verb)


@jit
def next_event_ns(nodes: Nodes, table: Nodes) -> int:
    """Return the next instant that the costs foresee."""
    s, r = nodes[0], table[0]
    instant = min(s.gpu_end_ns, s.h2d_end_ns, s.d2h_end_ns, s.due_ns, s.timer_ns)
    if s.next_arrival < s.n_requests:
        instant = min(instant, r[s.next_arrival].arrival_ns)
    return int(instant)


@jit
def cancel_request(nodes: Nodes, table: Nodes, i: int) -> bool:
    """Take a request out of the node; False where it has to be tried again later."""
    return cancel(nodes[0], table[0], i)


@jit
def end_output(nodes: Nodes, table: Nodes, i: int) -> None:
    """Make the token of the iteration in flight the last one of a request."""
    end_at_next_token(nodes[0], table[0], i)


@jit
def fail_iteration(nodes: Nodes, table: Nodes, m: int, link_bound: bool, out: bool) -> None:
    """End an iteration of model ``m`` with nothing produced; ``out``: put the model out."""
    s, r = nodes[0], table[0]
    if link_bound:
        fail_link_bound(s)
    else:
        fail_compute(s)
    if out:
        put_out(s, m)
    settle_memory(s, r)


@jit
def fail_load(nodes: Nodes, table: Nodes) -> None:
    """End the load piece on the link, which has not landed, and put its model out."""
    s, r = nodes[0], table[0]
    fail_piece(s)
    put_out(s, s.h2d_model)
    settle_memory(s, r)


@jit
def drop_save(nodes: Nodes, table: Nodes) -> None:
    """End the save on the link, which found no room on the host."""
    s, r = nodes[0], table[0]
    fail_save(s, r)
    settle_memory(s, r)


@jit
def preload_model(nodes: Nodes, table: Nodes, m: int) -> bool:
    """Load all of a model if it fits; return whether it does."""
    return preload(nodes[0], table[0], m)
