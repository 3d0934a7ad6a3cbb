"""`Partial`: the champion with levels: weights come and go by quarters, chosen by a knapsack.

Who must run and when it is worth to preempt is decided as in `Slack`. What is added:

- To make room, each other model may keep any of its levels or none. A dynamic program over models
  and levels finds what costs least: an idle model the loads that its next arrivals wait for, a
  running one the targets that it misses while it streams, at a price for the link.
- A model that has its weights but no room for the KV of who waits asks for room as well.
- While the link has nothing to do, free memory takes the weights that save most load time per byte,
  those that are in use first: the way back from a partial level to a full one.

Bringing a model in below the highest level that can ever fit was tried too, and gained nothing.
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import (
    LEVEL_0,
    LEVEL_100,
    OUT,
    encode,
    legal,
    level_pieces,
    missing_bytes,
    room_bytes,
    waiting_kv_bytes,
)
from mmrl.node.jit import jit, jit_arrays
from mmrl.node.memory import (
    free_bytes,
    has_work,
    idle_bytes,
    is_idle,
    promised_bytes,
    weight_bytes,
)
from mmrl.node.observe import RATE_LONG_S, estimated_rate
from mmrl.node.state import (
    BATCH_LIMIT,
    DECODE,
    IDLE,
    LINK_IDLE,
    MAX_MODELS,
    NEVER,
    PREFILL,
    CostTable,
    Nodes,
    Record,
)
from mmrl.rules.base import tunable
from mmrl.rules.common import freed_bytes, load_verb, mean_output, service_ns
from mmrl.rules.slack import (
    ABSENCE,
    DOOMED,
    LONGEST_WAIT,
    MARGIN,
    PATIENCE,
    SCANNED,
    SERVICE,
    Slack,
    resides,
    slack_ns,
    stake,
    urgency_ns,
)

CELLS = 64  # into which the room that is needed is divided
KEPT = -1  # choice of the knapsack: the model stays as it is
IN_USE = 1e9  # what weights that somebody waits for are worth over those of an expected arrival


class Partial(Slack):
    """Slack's preemption, and a knapsack over levels.

    The first parameters are those of `Slack`.

    Attributes:
        link: Targets lost for each second of the link that a running model streams.
        spare: Share of the budget that weights loaded ahead of their use leave free.
    """

    name: ClassVar[str] = "partial"
    number: ClassVar[int] = 8

    link: float = tunable(1.0, 0.05, 50.0, log=True)
    spare: float = tunable(0.05, 0.0, 0.5)


LINK, SPARE = 7, 8


@jit_arrays
def suggest(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action of ``Partial``."""
    action = raise_most_urgent(s, r, decode_tables, prefill_tables, params)
    if action == 0:
        action = swap(s, r, decode_tables, prefill_tables, params)
    return action if action != 0 else raise_ahead(s, r, params)


# --- who asks for room ----------------------------------------------------------------------------


@jit
def short(s: Record, r: Nodes, m: int) -> bool:
    """Return whether model ``m`` has work, could ever hold more weights, and may be raised now."""
    wanted = level_pieces(s, m, load_verb(s, r, m))
    return bool(has_work(s, m) and not s.acted[m] & 1 and s.target[m] < wanted)


@jit
def starved(s: Record, r: Nodes, m: int) -> bool:
    """Return whether model ``m`` has its weights but no room for the KV of who waits."""
    if s.target[m] == 0 or s.landed[m] < s.target[m]:
        return False
    waits = s.queue_len[m] > 0 and s.prefilling[m] < 0 and s.begun_len[m] < BATCH_LIMIT
    if s.saved[m] == 0 and not waits:
        return False
    return bool(waiting_kv_bytes(s, r, m) > free_bytes(s) - promised_bytes(s) + idle_bytes(s, m))


@jit
def raise_ns(s: Record, m: int, pieces: int) -> int:
    """Return how long the link needs to bring model ``m`` to so many pieces."""
    left = pieces - s.landed[m]
    if left <= 0:
        return 0
    base = s.load_base_ns[m] - s.load_layer_ns[m] if s.landed[m] == 0 else 0
    return int(s.load_fixed_ns[m] + base + left * s.load_layer_ns[m])


@jit
def bound_ns(s: Record, m: int, pieces: int) -> int:
    """Return how long an iteration of model ``m`` takes with so many pieces on the device.

    That is the link's time; models that stream at once take turns.
    """
    missing = s.pieces[m] - pieces
    if missing <= 0:
        return 0
    turns = 1
    for v in range(s.n_models):
        turns += v != m and has_work(s, v) and 0 < s.target[v] < s.pieces[v]
    return int(turns * (s.stream_fixed_ns[m] + missing * s.stream_layer_ns[m]))


@jit
def gain(
    s: Record,
    r: Nodes,
    m: int,
    pieces: int,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> float:
    """Return how many waiting requests of model ``m`` meet their targets only if raised now.

    Those that cannot keep their pace with so many pieces do not count; nor do those that run,
    where the model has the weights already.
    """
    bound = bound_ns(s, m, pieces)
    sooner = raise_ns(s, m, pieces) + bound
    raised = s.target[m] < pieces
    total = 0.0
    queued = min(s.queue_len[m], SCANNED)
    for k in range(queued + s.begun_len[m]):
        request = r[s.queue[m, k]] if k < queued else r[s.begun[m, k - queued]]
        if not raised and (request.state == DECODE or request.state == PREFILL):
            continue
        slack = slack_ns(s, request, prefill_tables)
        if slack >= sooner and (request.tpot_ns == 0 or bound <= request.tpot_ns):
            total += slack < sooner + params[PATIENCE] * request.ttft_ns
        elif s.now_ns - request.arrival_ns > params[LONGEST_WAIT] * request.ttft_ns:
            total += 1.0
        else:
            total += params[DOOMED]
    return total


# --- who gives it ---------------------------------------------------------------------------------


@jit
def loss(
    s: Record,
    r: Nodes,
    v: int,
    pieces: int,
    busy_ns: float,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> float:
    """Return what is lost if model ``v`` keeps only so many pieces, in targets.

    Args:
        s: The node.
        r: Its requests.
        v: The model.
        pieces: What it keeps, 0 for none.
        busy_ns: For how long it will wait for the model that comes, in any case.
        prefill_tables: float64[P, 257].
        params: Parameters of ``Partial``.
    """
    load = s.load_fixed_ns[v] + (s.pieces[v] - max(1, pieces)) * s.load_layer_ns[v]
    if pieces == 0:
        load += s.load_base_ns[v]
    if not has_work(s, v):
        rate = estimated_rate(s, v, s.rate_long[v], RATE_LONG_S)
        return float(rate * load * 1e-9)  # arrivals that will wait for the reload
    away = params[ABSENCE] * load + busy_ns
    if pieces == 0:
        return float(stake(s, r, v, 0, 0.0, away, prefill_tables, params))
    bound = bound_ns(s, v, pieces)
    total = params[LINK] * 1e-9 * min(away, mean_output(s, v) * bound)
    queued = min(s.queue_len[v], SCANNED)
    for k in range(queued + s.begun_len[v]):
        request = r[s.queue[v, k]] if k < queued else r[s.begun[v, k - queued]]
        slack = slack_ns(s, request, prefill_tables)
        if slack < 0:
            total += params[DOOMED]
        elif request.tpot_ns > 0:
            # A token takes ``bound`` and adds the TPOT target to the slack.
            total += slack < bound + away * max(0.0, 1.0 - request.tpot_ns / bound)
    return float(total)


@jit_arrays
def fill_knapsack(
    s: Record,
    r: Nodes,
    m: int,
    need: int,
    preempt: bool,
    losses: npt.NDArray[np.float64],
    choices: npt.NDArray[np.int64],
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> None:
    """Find what is least lost by freeing 0 .. ``CELLS`` cells of ``need / CELLS`` bytes.

    Args:
        s: The node.
        r: Its requests.
        m: The model that asks for room; it may give up layers for KV.
        need: Bytes that all cells stand for, above 0.
        preempt: Whether models with work may give way.
        losses: float64[CELLS + 1], written; inf where so much cannot be freed.
        choices: int64[MAX_MODELS, CELLS + 1], written: the verb of each model, and the cell of
            those before it, in one number; or ``KEPT``.
        decode_tables: float64[P, 65, 33].
        prefill_tables: float64[P, 257].
        params: Parameters of ``Partial``.
    """
    losses[:] = np.inf
    losses[0] = 0.0
    before = np.empty(CELLS + 1)
    busy = params[SERVICE] * service_ns(s, r, m, decode_tables)
    busy += params[ABSENCE] * raise_ns(s, m, s.pieces[m])
    for v in range(s.n_models):
        choices[v, :] = KEPT
        may = is_idle(s, v) or (preempt and resides(s, v, params))
        if not may or s.acted[v] & 1 or s.pinned[v] or (v == m and short(s, r, m)):
            continue
        before[:] = losses
        for verb in range(OUT, LEVEL_100):
            pieces = 0 if verb == OUT else level_pieces(s, v, verb)
            if pieces >= s.target[v] or (verb == OUT and v == m):
                continue
            if verb == OUT:
                gives = freed_bytes(s, v)
            elif s.full_verbs:
                gives = weight_bytes(s, v, s.target[v]) - weight_bytes(s, v, pieces)
            else:
                break
            cells = min(CELLS, int(gives * CELLS // need))
            if cells == 0:
                continue
            lost = loss(s, r, v, pieces, busy, prefill_tables, params)
            for c in range(1, CELLS + 1):
                rest = max(0, c - cells)
                if before[rest] + lost < losses[c]:
                    losses[c] = before[rest] + lost
                    choices[v, c] = verb * (CELLS + 1) + rest


@jit
def first_victim(s: Record, r: Nodes, choices: npt.NDArray[np.int64]) -> int:
    """Return the first legal action of those that free all cells; WAIT if there is none."""
    cell = CELLS
    for v in range(s.n_models - 1, -1, -1):
        choice = choices[v, cell]
        if choice != KEPT:
            verb = choice // (CELLS + 1)
            if legal(s, r, v, verb):
                return encode(s.full_verbs, v, verb)
            cell = choice % (CELLS + 1)
    return 0


# --- actions --------------------------------------------------------------------------------------


@jit_arrays
def raise_most_urgent(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return what brings in the most urgent model for which idle weights make room, or WAIT."""
    chosen = -1
    most_urgent = int(NEVER)
    for m in range(s.n_models):
        if not short(s, r, m) or not legal(s, r, m, load_verb(s, r, m)):
            continue
        load = raise_ns(s, m, level_pieces(s, m, load_verb(s, r, m)))
        urgency = urgency_ns(s, r, m, load, prefill_tables)
        if urgency < most_urgent:
            most_urgent = urgency
            chosen = m
    if chosen < 0:
        return 0
    verb = load_verb(s, r, chosen)
    need = missing_bytes(s, r, chosen, level_pieces(s, chosen, verb)) - room_bytes(s, r, chosen)
    if need > 0 and s.full_verbs:  # else the node would put out whole models
        losses = np.empty(CELLS + 1)
        choices = np.empty((MAX_MODELS, CELLS + 1), dtype=np.int64)
        tables = decode_tables, prefill_tables
        fill_knapsack(s, r, chosen, need, False, losses, choices, *tables, params)
        action = first_victim(s, r, choices)
        if action != 0:
            return action
    return encode(s.full_verbs, chosen, verb)


@jit_arrays
def swap(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the first step of the swap that gains most, or WAIT where none is worth it."""
    best = 0.0
    action = 0
    losses = np.empty(CELLS + 1)
    choices = np.empty((MAX_MODELS, CELLS + 1), dtype=np.int64)
    for m in range(s.n_models):
        if short(s, r, m):
            pieces = level_pieces(s, m, load_verb(s, r, m))
        elif starved(s, r, m):
            pieces = s.target[m]
        else:
            continue
        gained = gain(s, r, m, pieces, prefill_tables, params)
        need = missing_bytes(s, r, m, pieces) - room_bytes(s, r, m)
        if gained <= best or need <= 0:
            continue
        tables = decode_tables, prefill_tables
        fill_knapsack(s, r, m, need, True, losses, choices, *tables, params)
        value = gained - params[MARGIN] * losses[CELLS]
        if value > best:
            first = first_victim(s, r, choices)
            if first != 0:
                best = value
                action = first
    return action


@jit
def raise_ahead(s: Record, r: Nodes, params: npt.NDArray[np.float64]) -> int:
    """Return the raise that saves most load time per byte of what is free, or WAIT.

    Only while the link has nothing to do. Of levels that are worth the same the highest is taken.
    """
    if s.load_len > 0 or s.grant_len > 0 or s.lb_kind != IDLE or s.h2d_kind != LINK_IDLE:
        return 0
    room = free_bytes(s) - promised_bytes(s) - params[SPARE] * s.budget_bytes
    action = 0
    best = 0.0
    for m in range(s.n_models):
        if s.acted[m] & 1 or s.target[m] >= s.pieces[m]:
            continue
        weight = estimated_rate(s, m, s.rate_long[m], RATE_LONG_S) + IN_USE * has_work(s, m)
        for verb in range(LEVEL_0 if s.full_verbs else LEVEL_100, LEVEL_100 + 1):
            pieces = level_pieces(s, m, verb)
            need = missing_bytes(s, r, m, pieces)
            if pieces <= s.target[m] or need > room or not legal(s, r, m, verb):
                continue
            value = weight * raise_ns(s, m, pieces) / need
            if value >= best:
                best = value
                action = encode(s.full_verbs, m, verb)
    return action
