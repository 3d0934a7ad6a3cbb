"""Futures of a node: the true one, or samples from what has been seen of its traffic.

A future is a copy of the node and of those of its requests that can still matter. In a sampled one
nothing is left that the true arrivals and output lengths could reach: outputs that are not known
yet are redrawn, arrivals are redrawn from the estimated rates, and what the node keeps that was
computed from them is computed again.
"""

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.observe import RATE_LONG_S, RATE_SHORT_S, estimated_rate
from mmrl.node.state import (
    DECODE,
    DONE,
    MISS_NONE,
    MISS_TPOT,
    UNARRIVED,
    CostTable,
    Nodes,
    Record,
)
from mmrl.profiles.costs import decode_ns
from mmrl.rules.common import ASSUMED_OUTPUT_TOKENS, generated_tokens, prefill_ns

Uniforms = npt.NDArray[np.float64]
SEEN = 256  # requests of the past that lengths are drawn from, the latest
TRIES = 8  # draws of an output longer than what has been generated, before it is doubled


@jit
def first_open(s: Record) -> int:
    """Return the index of the oldest request in the system, or of the next to arrive."""
    first = s.next_arrival
    for m in range(s.n_models):
        if s.queue_len[m] > 0:
            first = min(first, s.queue[m, 0])
        if s.begun_len[m] > 0:
            first = min(first, s.begun[m, 0])
    return int(first)


@jit
def copy_node(
    nodes: Nodes, i: int, r: Nodes, to_nodes: Nodes, k: int, to_r: Nodes, ahead_ns: int
) -> None:
    """Copy node ``i`` to place ``k``, and those of its requests that are open or arrive in time.

    A request arrives in time when it does before the copy's horizon, that is ``ahead_ns`` from now
    or, where this is 0, that of the node. Requests keep their places; what ``to_r`` holds elsewhere
    is never looked at.
    """
    to_nodes[k] = nodes[i]
    s = to_nodes[k]
    if ahead_ns > 0:
        s.horizon_ns = min(s.horizon_ns, s.now_ns + ahead_ns)
    j = first_open(s)
    while j < s.n_requests:
        to_r[j] = r[j]
        if r[j].arrival_ns >= s.horizon_ns:
            return
        j += 1


@jit
def uniform(uniforms: Uniforms, at: int) -> float:
    """Return number ``at`` of a table that is read round and round."""
    return float(uniforms[at % len(uniforms)])


@jit
def seen_like(r: Nodes, until: int, m: int, done: bool, u: float) -> int:
    """Return a request of model ``m`` that arrived before place ``until``, or -1.

    It is one of the latest ``SEEN`` of all models, each as likely (``u`` is uniform); with ``done``
    only those count that have ended, whose output is therefore known.
    """
    count = 0
    for j in range(max(0, until - SEEN), until):
        count += r[j].model == m and (not done or r[j].state == DONE)
    left = int(u * count)
    for j in range(max(0, until - SEEN), until):
        if r[j].model == m and (not done or r[j].state == DONE):
            if left == 0:
                return j
            left -= 1
    return -1


@jit
def draw_output(s: Record, r: Nodes, m: int, more_than: int, uniforms: Uniforms, at: int) -> int:
    """Draw an output of model ``m`` of more than so many tokens, from those that have ended."""
    for k in range(TRIES):
        j = seen_like(r, s.next_arrival, m, True, uniform(uniforms, at + k))
        tokens = r[j].output if j >= 0 else int(ASSUMED_OUTPUT_TOKENS)
        if tokens > more_than:
            return int(tokens)
    return int(2 * more_than + 1)


@jit
def isolated_ns(
    s: Record, request: Record, decode_tables: CostTable, prefill_tables: CostTable
) -> int:
    """Return about what a request takes alone: its prefill, and its steps at their mean context."""
    m = request.model
    steps = request.output - 1
    context = request.prompt + steps // 2
    step = decode_ns(decode_tables[s.profile[m]], s.decode_scale[m], 1, context)
    return int(prefill_ns(s, m, request.prompt, prefill_tables) + steps * step)


@jit
def redraw_open(
    s: Record,
    r: Nodes,
    to: Nodes,
    uniforms: Uniforms,
    at: int,
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> int:
    """Redraw the outputs of the open requests of a copy; return the next place of ``uniforms``."""
    s.urgency = 0.0
    s.next_miss_ns = 0
    for m in range(s.n_models):
        s.seg_finish[m] = 2**31
        for k in range(s.queue_len[m] + s.begun_len[m]):
            queued = s.queue_len[m]
            request = to[s.queue[m, k]] if k < queued else to[s.begun[m, k - queued]]
            known = generated_tokens(s, request)
            request.output = draw_output(s, r, m, known, uniforms, at)
            at += TRIES
            request.isolated_ns = isolated_ns(s, request, decode_tables, prefill_tables)
            s.urgency += 1e9 / request.isolated_ns
            if request.miss == MISS_TPOT:
                request.miss = MISS_NONE  # it is known to be certain only from the true output
            if request.state == DECODE:
                s.seg_finish[m] = min(s.seg_finish[m], request.output - request.generated)
    return at


@jit
def draw_arrivals(
    s: Record,
    r: Nodes,
    to: Nodes,
    uniforms: Uniforms,
    at: int,
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> None:
    """Redraw the arrivals of a copy up to its horizon: Poisson at the estimated rates.

    The rate of a model is the mean of its two estimates; prompt and targets are those of a request
    that has been seen.
    """
    total = 0.0
    for m in range(s.n_models):
        total += arrival_rate(s, m)
    j = s.next_arrival
    arrival_s = s.now_ns * 1e-9
    while total > 0.0 and j < len(to):
        arrival_s -= np.log(1.0 - uniform(uniforms, at)) / total
        if arrival_s * 1e9 >= s.horizon_ns:
            break
        m = 0
        left = uniform(uniforms, at + 1) * total - arrival_rate(s, 0)
        while left > 0.0 and m < s.n_models - 1:
            m += 1
            left -= arrival_rate(s, m)
        like = seen_like(r, s.next_arrival, m, False, uniform(uniforms, at + 2))
        if like >= 0:
            to[j] = r[like]
            request = to[j]
            request.arrival_ns = int(arrival_s * 1e9)
            request.output = draw_output(s, r, m, 0, uniforms, at + 3)
            request.isolated_ns = isolated_ns(s, request, decode_tables, prefill_tables)
            request.first_ns = -1
            request.finish_ns = -1
            request.generated = 0
            request.prefilled = 0
            request.blocks = 0
            request.preemptions = 0
            request.state = UNARRIVED
            request.miss = MISS_NONE
            j += 1
        at += 3 + TRIES
    s.n_requests = j


@jit
def arrival_rate(s: Record, m: int) -> float:
    """Return the arrivals per second of model ``m``: the mean of both estimates."""
    short = estimated_rate(s, m, s.rate_short[m], RATE_SHORT_S)
    return 0.5 * (short + estimated_rate(s, m, s.rate_long[m], RATE_LONG_S))
