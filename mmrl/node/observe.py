"""What a policy sees of a node: named features, all ratios and squashed times within [-1, 1].

``observe`` reads the state and nothing else, in training and in deployment. Nothing identifies a
model or a platform: sizes are shares of the budget, times are squashed against a scale written
beside the feature, and arrival rates are estimated from nothing. Layout of an observation: the
node's features, then one block of features per model, padded with zeros to ``max_models`` blocks.
"""

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import waiting_kv_bytes
from mmrl.node.jit import jit
from mmrl.node.memory import (
    free_bytes,
    idle_bytes,
    is_idle,
    lacks_weights,
    load_seconds,
    promised_bytes,
    releasing_bytes,
    weight_bytes,
    whole_load_ns,
)
from mmrl.node.requests import head_request
from mmrl.node.state import (
    BATCH_LIMIT,
    DECODE,
    DISPATCH_EDF,
    DISPATCH_LAS,
    IDLE,
    MAX_MODELS,
    NEVER,
    CostTable,
    Nodes,
    Record,
)
from mmrl.profiles.costs import decode_ns, prefill_chunk_ns

RATE_SHORT_S = 10.0  # horizons of the two arrival-rate averages
RATE_LONG_S = 60.0

GLOBAL_FEATURES = (
    "free",  # of the budget
    "releasing",
    "promised",
    "evictable",  # held by idle models
    "link_backlog",  # seconds of loads queued, against 1 s
    "kv_backlog",  # KV moves queued, against 8
    "link_bound",  # 1: a link-bound iteration is in flight
    "lacking",  # models that lack weights, against 4
    "running",  # models with sequences that decode, against 4
    "models",  # of MAX_MODELS
    "pressure",  # weights of the fleet over the budget, against 1
    "arrivals",  # arrivals per second at the long horizon, against 4
    "since_decision",  # against 0.25 s
    "dispatch_edf",
    "dispatch_las",
    "full_verbs",
)

MODEL_FEATURES = (
    "weights",  # of the budget
    "layers",  # against 32
    "resident",  # pieces landed
    "target",
    "granted",
    "load_left",  # seconds until its load ends if it had the link alone, against 1 s
    "load",  # seconds of a whole load, against 1 s
    "since_loaded",  # against its whole load
    "queued",  # against 8
    "oldest_wait",  # over its TTFT target, against 1
    "head_slack",  # time of the head to its TTFT target, over the target
    "head_slack_loaded",  # the same less load and prefill
    "head_expired",  # 1: every waiting request is past its TTFT target
    "head_prefill",  # against 1 s
    "decoding",  # against 8
    "prefilling",
    "suspended",  # against 8
    "paused",
    "tpot_slack_min",  # seconds its sequences are ahead of their TPOT target, against 1 s
    "tpot_slack_mean",
    "suspended_slack_min",
    "generated",  # mean over decoding sequences, against 200 tokens
    "output",  # mean over finished requests, against 200 tokens
    "remaining",  # expected seconds to finish the decoding sequences, against 1 s
    "kv",  # of the budget
    "kv_move",  # seconds to save it, against 0.1 s
    "rate_short",  # arrivals per second, against 1
    "rate_long",
    "since_used",  # against 10 s
    "since_arrival",
    "step_over_tpot",  # decode step over the TPOT target, against 1
    "step",  # decode step when resident, against 0.05 s
    "step_level0",  # iteration time at each level, against 0.25 s
    "step_level25",
    "step_level50",
    "step_level75",
    "focus",
    "acted_residency",
    "acted_run",
    "acted_focus",
    "idle",
    "lacks_weights",
    "gdsf",  # priority above the clock, against 1
    "in_link_bound",
    "head_kv",  # KV of the next request to serve, of the budget, against 0.05
    "head_room",  # memory that it could have without a preemption, less that, against 0.05
    "starved",  # 1: the weights are there, and no room for that KV
)

N_GLOBAL = len(GLOBAL_FEATURES)
N_MODEL = len(MODEL_FEATURES)


def observation_size(max_models: int) -> int:
    """Return the length of an observation padded to ``max_models`` models."""
    if not 1 <= max_models <= MAX_MODELS:
        raise ValueError(f"max_models must be between 1 and {MAX_MODELS}, not {max_models}")
    return N_GLOBAL + max_models * N_MODEL


@jit
def squash(x: float, scale: float) -> float:
    """Map a real number into (-1, 1), 1/2 at ``scale``."""
    return x / (abs(x) + scale)


@jit
def clip(x: float) -> float:
    """Clip to [-1, 1]."""
    return min(1.0, max(-1.0, x))


@jit
def filled(s: Record, horizon_s: float) -> float:
    """Return which share of an average over ``horizon_s`` the time since the start has filled."""
    return float(1.0 - np.exp(-(s.now_ns * 1e-9 + 1.0) / horizon_s))


@jit
def corrected_rate(s: Record, m: int, average: float, horizon_s: float, share: float) -> float:
    """Return arrivals/s of model ``m``: the average, decayed, over the share that is filled."""
    if s.rate_ns[m] < 0:
        return 0.0
    decayed = average * np.exp(-(s.now_ns - s.rate_ns[m]) * 1e-9 / horizon_s)
    return float(decayed / share)


@jit
def estimated_rate(s: Record, m: int, average: float, horizon_s: float) -> float:
    """Return arrivals/s of model ``m``: the average, decayed and corrected for its start."""
    return corrected_rate(s, m, average, horizon_s, filled(s, horizon_s))


@jit
def load_left_ns(s: Record, m: int) -> int:
    """Return how long the rest of the load of model ``m`` takes alone on the link."""
    left = s.target[m] - s.landed[m]
    if left <= 0:
        return 0
    total = left * s.load_layer_ns[m]
    if s.landed[m] == 0:
        total += s.load_base_ns[m] - s.load_layer_ns[m]
    if not s.load_begun[m]:
        total += s.load_fixed_ns[m]
    return int(total)


@jit
def load_ns(s: Record, m: int) -> int:
    """Return how long until model ``m`` could be resident: the rest of its load, or a whole one."""
    if s.target[m] > 0:
        return load_left_ns(s, m)
    return whole_load_ns(s, m)


@jit
def batch_step_ns(s: Record, r: Nodes, m: int, decode_tables: CostTable) -> int:
    """Return the price of a decode step of model ``m`` for its batch (at least one sequence)."""
    if s.decoding[m] > 0 and s.seg_left[m] > 0:
        return int(s.step_ns[m])
    batch = 0
    context = 0
    for k in range(s.begun_len[m]):
        request = r[s.begun[m, k]]
        if request.generated > 0:
            batch += 1
            context += request.prompt + request.generated
    return decode_ns(decode_tables[s.profile[m]], s.decode_scale[m], max(1, batch), context)


@jit
def tpot_ahead_ns(s: Record, request: Record, generated: int) -> int:
    """Return how far a sequence is ahead of its TPOT target, or NEVER where it has none."""
    if request.tpot_ns == 0:
        return NEVER
    return int(request.first_ns + request.tpot_ns * generated - s.now_ns)


@jit
def observe_node(s: Record, r: Nodes, arrivals: float, out: npt.NDArray[np.float32]) -> None:
    """Write the node's features into ``out[:N_GLOBAL]``; arrivals is the rate of all models."""
    budget = s.budget_bytes
    backlog = 0
    lacking = 0
    running = 0
    weights = 0
    for m in range(s.n_models):
        backlog += load_left_ns(s, m)
        lacking += lacks_weights(s, m)
        running += s.decoding[m] > 0
        weights += weight_bytes(s, m, s.pieces[m])
    out[0] = free_bytes(s) / budget
    out[1] = clip(releasing_bytes(s, r) / budget)
    out[2] = clip(promised_bytes(s) / budget)
    out[3] = clip(idle_bytes(s, -1) / budget)
    out[4] = squash(backlog * 1e-9, 1.0)
    out[5] = squash(s.restore_len + s.save_len, 8.0)
    out[6] = s.lb_kind != IDLE
    out[7] = squash(lacking, 4.0)
    out[8] = squash(running, 4.0)
    out[9] = s.n_models / MAX_MODELS
    out[10] = squash(weights / budget, 1.0)
    out[11] = squash(arrivals, 4.0)
    out[12] = squash((s.now_ns - s.decided_ns) * 1e-9, 0.25)
    out[13] = s.dispatch == DISPATCH_EDF
    out[14] = s.dispatch == DISPATCH_LAS
    out[15] = s.full_verbs


@jit
def observe_weights(s: Record, m: int, out: npt.NDArray[np.float32]) -> None:
    """Write the features of the weights of model ``m`` into ``out[0:8]``."""
    pieces = s.pieces[m]
    whole_s = load_seconds(s, m)
    out[0] = clip(weight_bytes(s, m, pieces) / s.budget_bytes)
    out[1] = squash(pieces - 1.0, 32.0)
    out[2] = s.landed[m] / pieces
    out[3] = s.target[m] / pieces
    out[4] = s.granted[m] / pieces
    out[5] = squash(load_left_ns(s, m) * 1e-9, 1.0)
    out[6] = squash(whole_s, 1.0)
    if s.target[m] > 0 and s.loaded_ns[m] >= 0 and s.landed[m] >= s.target[m]:
        out[7] = squash((s.now_ns - s.loaded_ns[m]) * 1e-9, whole_s)


@jit
def observe_queue(
    s: Record, r: Nodes, m: int, prefill_tables: CostTable, out: npt.NDArray[np.float32]
) -> None:
    """Write the features of the queue of model ``m`` into ``out[8:14]``."""
    out[8] = squash(s.queue_len[m], 8.0)
    head = head_request(s, r, m)
    if head < 0:
        return
    oldest = r[s.queue[m, 0]]
    out[9] = squash((s.now_ns - oldest.arrival_ns) / oldest.ttft_ns, 1.0)
    request = r[head]
    prefill = prefill_chunk_ns(
        prefill_tables[s.profile[m]],
        s.prefill_scale[m],
        0,
        request.prompt + request.generated,
    )
    slack = request.arrival_ns + request.ttft_ns - s.now_ns
    out[10] = clip(slack / request.ttft_ns)
    out[11] = clip((slack - load_ns(s, m) - prefill) / request.ttft_ns)
    out[12] = slack < 0
    out[13] = squash(prefill * 1e-9, 1.0)


@jit
def observe_batch(
    s: Record, r: Nodes, m: int, decode_tables: CostTable, out: npt.NDArray[np.float32]
) -> None:
    """Write the features of the begun sequences of model ``m`` into ``out[14:26, 30:36]``."""
    step = batch_step_ns(s, r, m, decode_tables)
    least = NEVER
    least_suspended = NEVER
    total = 0.0
    generated = 0.0
    tpot = 0
    for k in range(s.begun_len[m]):
        request = r[s.begun[m, k]]
        if request.generated == 0:
            continue
        tokens = request.generated
        if request.state == DECODE:
            tokens += s.seg_steps[m]
            generated += tokens
        ahead = tpot_ahead_ns(s, request, tokens)
        if ahead < NEVER:
            tpot = request.tpot_ns
            if request.state == DECODE:
                total += ahead
                least = min(least, ahead)
            else:
                least_suspended = min(least_suspended, ahead)
    decoding = s.decoding[m]
    out[14] = squash(decoding, 8.0)
    out[15] = s.prefilling[m] >= 0
    out[16] = squash(s.begun_len[m] - decoding - (s.prefilling[m] >= 0), 8.0)
    out[17] = s.paused[m]
    out[18] = 1.0 if least == NEVER else squash(least * 1e-9, 1.0)
    out[20] = 1.0 if least_suspended == NEVER else squash(least_suspended * 1e-9, 1.0)
    mean_output = s.outputs_tokens[m] / max(1, s.outputs_done[m])
    if decoding > 0:
        generated /= decoding
        out[19] = 1.0 if least == NEVER else squash(total / decoding * 1e-9, 1.0)
        out[21] = squash(generated, 200.0)
        left = max(mean_output - generated, 0.25 * max(mean_output, generated))
        out[23] = squash(left * step * 1e-9, 1.0)
    out[22] = squash(mean_output, 200.0)
    kv_blocks = s.kv_blocks[m]
    out[24] = clip(kv_blocks * s.block_bytes[m] / s.budget_bytes)
    out[25] = squash(kv_blocks * s.save_block_ns[m] * 1e-9, 0.1)
    if tpot > 0:
        out[30] = squash(step / tpot, 1.0)
    out[31] = squash(step * 1e-9, 0.05)
    layers = s.pieces[m] - 1
    for level in range(4):
        missing = layers - (layers * level + 3) // 4
        bound = s.stream_fixed_ns[m] + missing * s.stream_layer_ns[m]
        out[32 + level] = squash(max(step, bound) * 1e-9, 0.25)


@jit
def observe_traffic(
    s: Record, m: int, rate_short: float, rate_long: float, out: npt.NDArray[np.float32]
) -> None:
    """Write the features of the traffic and the marks of model ``m`` into ``out[26:30, 36:44]``."""
    out[26] = squash(rate_short, 1.0)
    out[27] = squash(rate_long, 1.0)
    out[28] = squash((s.now_ns - s.used_ns[m]) * 1e-9, 10.0) if s.used_ns[m] >= 0 else 1.0
    out[29] = squash((s.now_ns - s.rate_ns[m]) * 1e-9, 10.0) if s.rate_ns[m] >= 0 else 1.0
    out[36] = s.focus == m
    out[37] = s.acted[m] & 1
    out[38] = (s.acted[m] & 2) >> 1
    out[39] = (s.acted[m] & 4) >> 2
    out[40] = is_idle(s, m)
    out[41] = lacks_weights(s, m)
    out[42] = squash(max(0.0, s.gdsf_priority[m] - s.gdsf_clock), 1.0)
    out[43] = s.lb_kind != IDLE and s.lb_model == m


@jit
def observe_room(s: Record, r: Nodes, m: int, out: npt.NDArray[np.float32]) -> None:
    """Write what model ``m`` lacks to serve its next request into ``out[44:47]``."""
    kv = waiting_kv_bytes(s, r, m)
    room = free_bytes(s) - promised_bytes(s) + idle_bytes(s, m)
    out[44] = squash(kv / s.budget_bytes, 0.05)
    out[45] = squash((room - kv) / s.budget_bytes, 0.05)
    resident = s.target[m] > 0 and s.landed[m] >= s.target[m]
    begun = s.saved[m] == 0 and (s.prefilling[m] >= 0 or s.begun_len[m] >= BATCH_LIMIT)
    out[46] = kv > room and resident and not begun


@jit
def observe(
    s: Record,
    r: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    out: npt.NDArray[np.float32],
) -> None:
    """Write the observation of a node.

    Args:
        s: The node.
        r: Its requests.
        decode_tables: float64[P, 65, 33], see ``mmrl.profiles.costs``.
        prefill_tables: float64[P, 257].
        out: float32[observation_size(max_models)], with ``max_models >= s.n_models``.
    """
    out[:] = 0.0
    filled_short = filled(s, RATE_SHORT_S)  # exponentials are dear: each is taken once
    filled_long = filled(s, RATE_LONG_S)
    arrivals = 0.0
    for m in range(s.n_models):
        block = out[N_GLOBAL + m * N_MODEL : N_GLOBAL + (m + 1) * N_MODEL]
        observe_weights(s, m, block)
        observe_queue(s, r, m, prefill_tables, block)
        observe_batch(s, r, m, decode_tables, block)
        rate_short = corrected_rate(s, m, s.rate_short[m], RATE_SHORT_S, filled_short)
        rate_long = corrected_rate(s, m, s.rate_long[m], RATE_LONG_S, filled_long)
        arrivals += rate_long
        observe_traffic(s, m, rate_short, rate_long, block)
        observe_room(s, r, m, block)
    observe_node(s, r, arrivals, out)
