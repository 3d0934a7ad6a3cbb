"""`Slack`: preempt when waiting costs more targets than being preempted does.

The champion: the rule that a learned policy must beat. What fits is loaded, most urgent first. When
nothing more fits, a model that lacks weights is worth the requests that can still meet their
targets if it is loaded now but not if it is loaded ``patience`` later; a resident model is worth
those that cannot if it is away for as long as a swap takes. The cheapest set of victims that makes
room is put out if the waiting side outweighs it. Requests that have missed a target weigh little,
until they have waited too long.
"""

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import level_pieces, missing_bytes, room_bytes
from mmrl.node.jit import jit, jit_arrays
from mmrl.node.memory import has_work, idle_bytes, load_seconds
from mmrl.node.observe import load_ns
from mmrl.node.state import MAX_MODELS, NEVER, CostTable, Nodes, Record
from mmrl.rules.base import Rule, tunable
from mmrl.rules.common import (
    freed_bytes,
    generated_tokens,
    lacks,
    load_if_legal,
    load_verb,
    out_if_legal,
    prefill_ns,
    residency_ns,
    service_ns,
)

SCANNED = 32  # requests of a queue that are looked at


class Slack(Rule):
    """Preempt on the slack of those who wait against the slack of those who run.

    The defaults are what ``mmrl tune slack fast --split train --configs 160 --episodes 200
    --objective goodput-latency`` found with the costs of the first probes. They stay, since load 1
    is where they reach a goodput of .90; what the same command finds today is ``slack@tuned``.

    Attributes:
        patience: A load is urgent for a request that would miss a target if it came later by so
            many times the request's TTFT target.
        margin: Targets saved must exceed so many times the targets lost.
        residency: A victim has been resident for so many of its own load times, and for as long as
            two decisions may lie apart.
        absence: A victim will be away for so many times the two loads of the swap ...
        service: ... and so many times the expected decode time of the waiting model.
        doomed: Weight of a request that has missed a target already.
        longest_wait: Such a request weighs in full after so many of its TTFT targets.
    """

    name: ClassVar[str] = "slack"
    number: ClassVar[int] = 0

    dispatch: Literal["rr", "edf", "las"] | None = "edf"
    patience: float = tunable(0.5, 0.0, 2.0)
    margin: float = tunable(0.231, 0.1, 8.0, log=True)
    residency: float = tunable(1.0, 0.0, 8.0)
    absence: float = tunable(5.85, 0.5, 6.0)
    service: float = tunable(2.47, 0.0, 4.0)
    doomed: float = tunable(0.0468, 0.0, 0.5)
    longest_wait: float = tunable(93.7, 2.0, 100.0, log=True)


PATIENCE, MARGIN, RESIDENCY, ABSENCE, SERVICE, DOOMED, LONGEST_WAIT = range(7)


@jit_arrays
def suggest(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> int:
    """Return the action of ``Slack``."""
    action = load_most_urgent(s, r, prefill_tables)
    if action != 0:
        return action
    best = 0.0
    victim = -1
    victims = np.zeros(MAX_MODELS, dtype=np.int8)
    for m in range(s.n_models):
        if not lacks(s, m):
            continue
        gain = stake(s, r, m, load_ns(s, m), params[PATIENCE], 0.0, prefill_tables, params)
        if gain <= best:
            continue
        loss = choose_victims(s, r, m, victims, decode_tables, prefill_tables, params)
        if loss >= 0.0 and gain - params[MARGIN] * loss > best:
            best = gain - params[MARGIN] * loss
            victim = int(np.argmax(victims))
    return out_if_legal(s, r, victim) if victim >= 0 else 0


@jit
def slack_ns(s: Record, request: Record, prefill_tables: CostTable) -> int:
    """Return for how long a request may get no service and still meet its targets.

    Negative when a target is missed or the sequence is behind it; NEVER for work that has its
    first token and no TPOT target.
    """
    deadline = request.arrival_ns + request.ttft_ns
    if request.first_ns < 0:
        left = request.prompt - request.prefilled
        return int(deadline - s.now_ns - prefill_ns(s, request.model, left, prefill_tables))
    if request.first_ns > deadline:
        return -1
    if request.tpot_ns == 0:
        return int(NEVER)
    return int(request.first_ns + request.tpot_ns * generated_tokens(s, request) - s.now_ns)


@jit
def stake(
    s: Record,
    r: Nodes,
    m: int,
    sooner_ns: int,
    later: float,
    later_ns: float,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> float:
    """Return how many requests of model ``m`` miss a target if it serves them later, not sooner.

    Args:
        s: The node.
        r: Its requests.
        m: The model.
        sooner_ns: It would serve again after this time ...
        later: ... or later than that by so many times the TTFT target of the request ...
        later_ns: ... plus this time.
        prefill_tables: float64[P, 257].
        params: Parameters of ``Slack``.
    """
    total = 0.0
    queued = min(s.queue_len[m], SCANNED)
    for k in range(queued + s.begun_len[m]):
        request = r[s.queue[m, k]] if k < queued else r[s.begun[m, k - queued]]
        slack = slack_ns(s, request, prefill_tables)
        if slack >= sooner_ns:
            total += slack < sooner_ns + later * request.ttft_ns + later_ns
        elif s.now_ns - request.arrival_ns > params[LONGEST_WAIT] * request.ttft_ns:
            total += 1.0
        else:
            total += params[DOOMED]
    return total


@jit
def urgency_ns(s: Record, r: Nodes, m: int, load: int, prefill_tables: CostTable) -> int:
    """Return the least slack, after a load of so long, of requests that can still meet targets.

    Just below NEVER where there is none.
    """
    urgency = int(NEVER) - 1
    queued = min(s.queue_len[m], SCANNED)
    for k in range(queued + s.begun_len[m]):
        request = r[s.queue[m, k]] if k < queued else r[s.begun[m, k - queued]]
        slack = slack_ns(s, request, prefill_tables) - load
        if 0 <= slack < urgency:
            urgency = slack
    return urgency


@jit
def load_most_urgent(s: Record, r: Nodes, prefill_tables: CostTable) -> int:
    """Return the load of the most urgent model that fits once idle models are evicted, or WAIT.

    Its urgency is the least slack of those requests that can still meet their targets.
    """
    action = 0
    most_urgent = int(NEVER)
    for m in range(s.n_models):
        if not lacks(s, m):
            continue
        load = load_if_legal(s, r, m)
        if load == 0:
            continue
        urgency = urgency_ns(s, r, m, load_ns(s, m), prefill_tables)
        if urgency < most_urgent:
            most_urgent = urgency
            action = load
    return action


@jit
def resides(s: Record, v: int, params: npt.NDArray[np.float64]) -> bool:
    """Return whether model ``v`` has work and has been resident for long enough to be preempted.

    Without a floor in time a tiny model would come and go at every decision: its load takes
    microseconds.
    """
    least = max(params[RESIDENCY] * load_seconds(s, v) * 1e9, s.interval_ns)
    return bool(has_work(s, v) and residency_ns(s, v) >= least)


@jit_arrays
def choose_victims(
    s: Record,
    r: Nodes,
    m: int,
    victims: npt.NDArray[np.int8],
    decode_tables: CostTable,
    prefill_tables: CostTable,
    params: npt.NDArray[np.float64],
) -> float:
    """Choose models with work whose going makes room for model ``m``, least loss per byte first.

    Args:
        s: The node.
        r: Its requests.
        m: The model that lacks weights; it does not fit yet.
        victims: int8[MAX_MODELS], written: 1 for a victim.
        decode_tables: float64[P, 65, 33].
        prefill_tables: float64[P, 257].
        params: Parameters of ``Slack``.

    Returns:
        What is lost; -1 where no set of victims makes room.
    """
    victims[:] = 0
    loss = np.full(MAX_MODELS, -1.0)
    gives = np.zeros(MAX_MODELS, dtype=np.int64)
    service = params[SERVICE] * service_ns(s, r, m, decode_tables)
    for v in range(s.n_models):
        if not s.acted[v] & 1 and resides(s, v, params):
            away = params[ABSENCE] * (load_ns(s, m) + load_seconds(s, v) * 1e9) + service
            loss[v] = stake(s, r, v, 0, 0.0, away, prefill_tables, params)
            gives[v] = freed_bytes(s, v)
    pieces = level_pieces(s, m, load_verb(s, r, m))
    need = missing_bytes(s, r, m, pieces) - room_bytes(s, r, m) - idle_bytes(s, m)
    total = 0.0
    while need > 0:
        chosen = -1
        rate = 0.0
        for v in range(s.n_models):
            if loss[v] >= 0.0 and not victims[v] and gives[v] > 0:
                per_byte = loss[v] / min(need, gives[v])
                if chosen < 0 or per_byte < rate:
                    chosen = v
                    rate = per_byte
        if chosen < 0:
            return -1.0
        victims[chosen] = 1
        need -= gives[chosen]
        total += loss[chosen]
    for v in range(s.n_models):  # some may not be needed beside those chosen after them
        if victims[v] and need + gives[v] <= 0:
            victims[v] = 0
            need += gives[v]
            total -= loss[v]
    return total
