"""Every feature of an observation, worked by hand on small nodes.

Sizes are in gigabytes and times in seconds. In the tables a row is a feature, a column a node or a
model; where a number is not one of the state, a comment says where it comes from.
"""

from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

import numpy as np
import pytest

from mmrl.node import state as st
from mmrl.node.observe import GLOBAL_FEATURES, MODEL_FEATURES, observation_size, observe
from mmrl.node.state import (
    DECODE,
    PREFILL,
    QUEUED,
    RESTORING,
    SAVED,
    SAVING,
    new_nodes,
    new_requests,
)
from tests.sim.scenes import decode_table, prefill_table

GB = S = 10**9
MS = 10**6

# Both linear: a floor, then per sequence and per token; per token.
DECODE_TABLES = np.stack(
    [decode_table(0.02, 0.01, 1e-5), decode_table(0.01, 0.005, 2e-5), decode_table(0.03, 0.002, 0)]
)
PREFILL_TABLES = np.stack(
    [prefill_table(0.1, 0.001, 0), prefill_table(0.3, 0.001, 0), prefill_table(0.2, 0.0005, 0)]
)

Node = tuple[Any, Any]


def ns(seconds: float) -> int:
    return round(seconds * S)


def empty_node(n_models: int) -> Node:
    """All models out at time 0, of a budget of 100 GB, with the same constants."""
    s, r = new_nodes(1)[0], new_requests(1, 80)[0]
    s.n_models, s.budget_bytes, s.focus = n_models, 100 * GB, -1
    for name in ("prefilling", "head", "rate_ns", "used_ns", "loaded_ns"):
        s[name] = -1
    s.pieces[:n_models] = 5
    s.base_bytes[:n_models], s.layer_bytes[:n_models] = 2 * GB, 3 * GB
    s.block_bytes[:n_models] = GB // 10
    s.load_fixed_ns[:n_models], s.load_base_ns[:n_models] = 100 * MS, 300 * MS
    s.load_layer_ns[:n_models] = 150 * MS
    s.stream_fixed_ns[:n_models], s.stream_layer_ns[:n_models] = 10 * MS, 50 * MS
    s.save_fixed_ns[:n_models], s.save_block_ns[:n_models] = 10 * MS, 1 * MS
    s.decode_scale[:n_models] = s.prefill_scale[:n_models] = 1.0
    return s, r


def add(
    node: Node,
    m: int,
    state: int,
    arrival_s: float,
    ttft_s: float,
    tpot_s: float,
    first_s: float | None,
    prompt: int,
    generated: int,
    blocks: int,
) -> None:
    """Add a request, which has arrived after those before it, where its state says."""
    s, r = node
    i = int(s.n_requests)
    s.n_requests += 1
    request = r[i]
    request.model, request.state, request.prompt, request.generated = m, state, prompt, generated
    request.arrival_ns, request.ttft_ns, request.tpot_ns = ns(arrival_s), ns(ttft_s), ns(tpot_s)
    request.first_ns = -1 if first_s is None else ns(first_s)
    request.blocks = blocks
    if state == QUEUED:
        s.queue[m, s.queue_len[m]] = i
        s.queue_len[m] += 1
        return
    s.begun[m, s.begun_len[m]] = i
    s.begun_len[m] += 1
    s.decoding[m] += state == DECODE
    s.saved[m] += state == SAVED
    s.kv_blocks[m] += 0 if state == SAVED else blocks
    if state == PREFILL:
        s.prefilling[m] = i
    elif state == SAVING:
        s.saving_blocks[m] += blocks
        s.save_queue[s.save_len] = i
        s.save_len += 1
    elif state == RESTORING:
        s.restore_queue[s.restore_len] = i
        s.restore_len += 1


def seen(node: Node, names: Sequence[str]) -> dict[str, float]:
    """Observe a node: its features by name, those of its models by "name of the model: name"."""
    s, r = node
    assert s.n_models == len(names)
    out = np.full(observation_size(len(names) + 1), 7.0, np.float32)
    observe(s, r, DECODE_TABLES, PREFILL_TABLES, out)
    features = [*GLOBAL_FEATURES]
    for name in (*names, "nobody"):
        features += [f"{name}: {feature}" for feature in MODEL_FEATURES]
    return dict(zip(features, out.tolist(), strict=True))


def table(
    node: Mapping[str, float],
    models: Mapping[str, Sequence[float]],
    names: Sequence[str],
) -> dict[str, float]:
    """Name the numbers as ``seen`` does; the block of the model that is not there is zero."""
    named = {name: float(value) for name, value in node.items()}
    for feature, row in models.items():
        named |= {f"{n}: {feature}": value for n, value in zip(names, row, strict=True)}
    return named | {f"nobody: {feature}": 0.0 for feature in MODEL_FEATURES}


def squash(x: float, against: float) -> float:
    return x / (abs(x) + against)


def squashed(*values: float, against: float) -> tuple[float, ...]:
    return tuple(squash(x, against) for x in values)


# --- a busy node ----------------------------------------------------------------------------------

BUSY = ("chat", "loading", "out")


def busy_node() -> Node:
    """100 GB at 19 s: ``chat`` is resident, ``loading`` streams what it lacks, ``out`` is out."""
    s, _ = node = empty_node(3)
    s.now_ns, s.decided_ns = ns(19), ns(18.9)
    s.reserve_bytes, s.dispatch = 6 * GB, st.DISPATCH_EDF
    s.full_verbs = 1
    s.profile[:3] = 2, 0, 1
    s.pieces[:3] = 9, 11, 7
    s.base_bytes[:3] = np.array([2, 4, 6]) * GB
    s.layer_bytes[:3] = 5 * GB
    s.block_bytes[:3] = np.array([100, 40, 200]) * GB // 1000
    s.load_fixed_ns[:3] = np.array([200, 300, 100]) * MS
    s.load_base_ns[:3] = np.array([400, 500, 600]) * MS
    s.load_layer_ns[:3] = np.array([100, 160, 250]) * MS
    s.stream_fixed_ns[:3] = np.array([5, 40, 20]) * MS
    s.stream_layer_ns[:3] = np.array([10, 20, 50]) * MS
    s.save_block_ns[:3] = 1 * MS, 2 * MS, 0.5 * MS
    s.decode_scale[:3] = 1.0, 2.0, 0.5
    s.prefill_scale[:3] = 1.5, 2.0, 0.5

    s.target[:3], s.granted[:3], s.landed[:3] = (9, 9, 0), (9, 6, 0), (9, 4, 0)
    s.loaded_ns[:3] = ns(5), ns(2), ns(4)
    s.load_begun[1] = 1
    s.grant_queue[0], s.grant_len = 1, 1
    s.load_queue[0], s.load_len = 1, 1
    s.gpu_kind, s.gpu_model = st.DECODE_STEP, 0
    s.lb_kind, s.lb_model = st.DECODE_STEP, 1
    s.focus = 2
    s.acted[:3] = 2 + 4, 1, 4
    s.gdsf_clock, s.gdsf_priority[:3] = 2.0, (3.5, 1.0, 2.5)
    s.used_ns[:3] = ns(18.5), ns(17), ns(15)
    s.rate_ns[:3] = ns(18), ns(16), ns(17)
    s.rate_short[:3], s.rate_long[:3] = (0.5, 0.2, 0.1), (0.3, 0.25, 0.15)
    s.outputs_done[:3], s.outputs_tokens[:3] = (3, 4, 0), (300, 400, 0)

    # model, state, arrival, TTFT target, TPOT target (0: batch work), first token; prompt and
    # generated tokens; blocks
    add(node, 1, SAVED, 1, 2, 0.5, 3, 400, 20, 27)
    add(node, 2, QUEUED, 5, 12, 0.3, 8, 300, 20, 0)  # its KV was dropped
    add(node, 1, DECODE, 6, 60, 0, 7, 890, 90, 63)
    add(node, 0, DECODE, 8, 60, 0, 9, 400, 80, 31)
    add(node, 0, DECODE, 10, 2, 0.25, 11, 100, 32, 10)
    add(node, 0, QUEUED, 11, 3, 0.1, None, 100, 0, 0)  # too late
    add(node, 0, DECODE, 12, 2, 0.5, 14, 100, 2, 8)
    add(node, 0, RESTORING, 13, 2, 0.2, 14.5, 104, 25, 8)
    add(node, 0, SAVED, 14, 2, 0.4, 16, 150, 10, 10)
    add(node, 2, SAVING, 14.5, 2, 0.6, 15, 145, 5, 10)
    add(node, 1, QUEUED, 16, 10, 0.2, None, 600, 0, 0)
    add(node, 2, QUEUED, 17, 8, 0.1, None, 100, 0, 0)
    add(node, 0, PREFILL, 17.5, 3, 0.3, None, 160, 0, 11)
    add(node, 0, QUEUED, 18, 4, 0.1, None, 400, 0, 0)

    s.seg_steps[0], s.seg_left[0], s.step_ns[0] = 4, 12, 40 * MS
    s.step_ns[1:3] = 7 * MS  # of a segment that is over
    return node


# Weights of 2 + 8 x 5 GB, 4 + 5 x 5 GB granted (of 4 + 10 x 5) and none (of 6 + 6 x 5); 68, 63 and
# 10 blocks of KV; 3 layers are promised.
BUSY_FREE = 100 - 6 - 42 - 29 - 68 * 0.1 - 63 * 0.04 - 10 * 0.2
BUSY_ROOM = BUSY_FREE - 15
BUSY_SHORT = 1 - exp(-20 / 10)  # the averages are those since 1 s before the start
BUSY_LONG = 1 - exp(-20 / 60)
BUSY_RATES = 0.3 * exp(-1 / 60), 0.25 * exp(-3 / 60), 0.15 * exp(-2 / 60)

BUSY_NODE = {
    "free": BUSY_FREE / 100,
    "releasing": 10 * 0.2 / 100,  # what is being saved
    "promised": 15 / 100,
    "evictable": 0,
    "link_backlog": squash(5 * 0.16, against=1),
    "kv_backlog": squash(1 + 1, against=8),  # a save and a restore
    "link_bound": 1,
    "lacking": squash(1, against=4),
    "running": squash(2, against=4),
    "models": 3 / 16,
    "pressure": squash((42 + 54 + 36) / 100, against=1),
    "arrivals": squash(sum(BUSY_RATES) / BUSY_LONG, against=4),
    "since_decision": squash(0.1, against=0.25),
    "dispatch_edf": 1,
    "dispatch_las": 0,
    "full_verbs": 1,
}
BUSY_MODELS: dict[str, Sequence[float]] = {
    "weights": (42 / 100, 54 / 100, 36 / 100),
    "layers": squashed(8, 10, 6, against=32),
    "resident": (1, 4 / 11, 0),
    "target": (1, 9 / 11, 0),
    "granted": (1, 6 / 11, 0),
    "load_left": squashed(0, 5 * 0.16, 0, against=1),  # its fixed part is paid, its base landed
    "load": squashed(0.2 + 0.4 + 8 * 0.1, 0.3 + 0.5 + 10 * 0.16, 0.1 + 0.6 + 6 * 0.25, against=1),
    "since_loaded": (squash(19 - 5, against=1.4), 0, 0),
    "queued": squashed(2, 1, 2, against=8),
    "oldest_wait": squashed((19 - 11) / 3, (19 - 16) / 10, (19 - 5) / 12, against=1),
    "head_slack": ((18 + 4 - 19) / 4, (16 + 10 - 19) / 10, (5 + 12 - 19) / 12),
    # Less what is left of the load, or all of one, and the prefill (see head_prefill).
    "head_slack_loaded": ((3 - 0.6) / 4, (7 - 0.8 - 1.4) / 10, (-2 - 2.2 - 0.31) / 12),
    # The head of the last is late for a first token, though it has had it: its KV was dropped.
    "head_expired": (0, 0, 1),
    "head_prefill": squashed(
        1.5 * (0.2 + 400 * 0.0005), 2 * (0.1 + 600 * 0.001), 0.5 * (0.3 + 320 * 0.001), against=1
    ),
    "decoding": squashed(3, 1, 0, against=8),
    "prefilling": (1, 0, 0),
    "suspended": squashed(2, 1, 1, against=8),
    "paused": (0, 0, 0),
    # 36 and 6 tokens with the 4 steps of the segment: 11 + 36 x 0.25 - 19 = 1 s ahead, and
    # 14 + 6 x 0.5 - 19 = 2 s behind; batch work has no target.
    "tpot_slack_min": (squash(-2, against=1), 1, 1),
    "tpot_slack_mean": (squash((1 - 2 + 0) / 3, against=1), 1, 0),  # over batch work too
    "suspended_slack_min": squashed(
        min(14.5 + 25 * 0.2 - 19, 16 + 10 * 0.4 - 19),
        3 + 20 * 0.5 - 19,
        15 + 5 * 0.6 - 19,
        against=1,
    ),
    "generated": squashed((84 + 36 + 6) / 3, 90, 0, against=200),
    "output": squashed(300 / 3, 400 / 4, 0, against=200),
    # Steps of 40 ms for 100 tokens less 42; of 108 ms for a quarter of 100, which is more than 10.
    "remaining": squashed((100 - 42) * 0.04, 25 * 0.108, 0, against=1),
    "kv": (68 * 0.1 / 100, 63 * 0.04 / 100, 10 * 0.2 / 100),
    "kv_move": squashed(68 * 0.001, 63 * 0.002, 10 * 0.0005, against=0.1),  # without fixed parts
    "rate_short": squashed(
        0.5 * exp(-1 / 10) / BUSY_SHORT,
        0.2 * exp(-3 / 10) / BUSY_SHORT,
        0.1 * exp(-2 / 10) / BUSY_SHORT,
        against=1,
    ),
    "rate_long": squashed(*(rate / BUSY_LONG for rate in BUSY_RATES), against=1),
    "since_used": squashed(0.5, 2, 4, against=10),
    "since_arrival": squashed(1, 3, 2, against=10),
    # The target is that of the last sequence that has one, suspended or not.
    "step_over_tpot": squashed(0.04 / 0.4, 0.108 / 0.5, 0.009 / 0.6, against=1),
    # As priced for the segment; 2 x (20 ms + 2 sequences + 1400 tokens), the saved one included;
    # 0.5 x (10 ms + 1 sequence + 150 tokens).
    "step": squashed(0.04, 2 * 0.054, 0.5 * 0.018, against=0.05),
    # Fixed part and missing layers: 8, 6, 4, 2 of 8; 10, 7, 5, 2 of 10; 6, 4, 3, 1 of 6.
    "step_level0": squashed(0.085, 0.24, 0.32, against=0.25),
    "step_level25": squashed(0.065, 0.18, 0.22, against=0.25),
    "step_level50": squashed(0.045, 0.14, 0.17, against=0.25),
    "step_level75": squashed(0.04, 0.108, 0.07, against=0.25),  # two of them: not below the step
    "focus": (0, 0, 1),
    "acted_residency": (0, 1, 0),
    "acted_run": (1, 0, 0),
    "acted_focus": (1, 0, 1),
    "idle": (0, 0, 0),
    "lacks_weights": (0, 0, 1),
    "gdsf": squashed(3.5 - 2, 0, 2.5 - 2, against=1),
    "in_link_bound": (0, 1, 0),
    # Saved ones go first, with a block more: 10 + 1, 27 + 1; then 320 tokens in 20 + 1.
    "head_kv": squashed(11 * 0.1 / 100, 28 * 0.04 / 100, 21 * 0.2 / 100, against=0.05),
    "head_room": squashed(
        (BUSY_ROOM - 11 * 0.1) / 100,
        (BUSY_ROOM - 28 * 0.04) / 100,
        (BUSY_ROOM - 21 * 0.2) / 100,
        against=0.05,
    ),
    "starved": (1, 0, 0),
}


def test_a_busy_node() -> None:
    assert seen(busy_node(), BUSY) == pytest.approx(table(BUSY_NODE, BUSY_MODELS, BUSY))


# --- a node that swaps ----------------------------------------------------------------------------

SWAPPING = ("idle", "going", "coming")


def swapping_node() -> Node:
    """50 GB at 9 s: ``going`` is out but for the step that ends, ``coming`` waits for memory."""
    s, _ = node = empty_node(3)
    s.now_ns, s.decided_ns = ns(9), ns(9)
    s.budget_bytes, s.reserve_bytes = 50 * GB, 4 * GB
    s.dispatch, s.full_verbs = st.DISPATCH_LAS, 1
    s.profile[:3] = 2, 1, 0
    s.pieces[:3] = 5, 9, 4
    s.base_bytes[:3] = np.array([3, 1, 20]) * GB
    s.layer_bytes[:3] = np.array([2, 1, 14]) * GB
    s.block_bytes[:3] = np.array([100, 50, 20]) * GB // 1000
    s.load_fixed_ns[:3] = np.array([100, 100, 200]) * MS
    s.load_base_ns[:3] = np.array([300, 200, 3000]) * MS
    s.load_layer_ns[:3] = np.array([150, 50, 500]) * MS
    s.stream_fixed_ns[:3] = np.array([10, 2, 100]) * MS
    s.stream_layer_ns[:3] = np.array([20, 10, 150]) * MS
    s.save_block_ns[:3] = 3 * MS
    s.decode_scale[:3] = 2.0, 1.0, 1.0

    s.target[:3], s.granted[:3], s.landed[:3] = (5, 0, 2), (5, 5, 0), (5, 5, 0)
    s.loaded_ns[:2] = ns(6), ns(1)
    s.grant_queue[0], s.grant_len = 2, 1
    s.gpu_kind, s.gpu_model = st.DECODE_STEP, 1
    s.paused[2] = 1
    s.acted[:3] = 0, 1, 2
    s.gdsf_clock, s.gdsf_priority[:3] = 0.5, (0.75, 1.5, 0.0)
    s.used_ns[:2] = ns(7), ns(8.5)
    s.rate_ns[:3] = ns(5), ns(4), ns(2)
    s.rate_short[:3], s.rate_long[:3] = (0.05, 0.4, 0.2), (0.1, 0.3, 0.15)
    s.outputs_done[:3], s.outputs_tokens[:3] = (4, 0, 1), (200, 0, 60)

    add(node, 2, QUEUED, 1, 3, 0.1, None, 300, 0, 0)
    add(node, 1, DECODE, 1.5, 2, 0.1, 2, 60, 30, 7)
    add(node, 2, QUEUED, 2, 4, 0.1, None, 100, 0, 0)
    add(node, 1, DECODE, 3, 2, 0.4, 4, 90, 20, 8)
    add(node, 1, SAVING, 3.5, 2, 0.25, 5, 80, 15, 6)
    add(node, 1, PREFILL, 4, 2, 0.5, 5, 50, 5, 5)  # again: its KV was dropped

    s.seg_steps[1], s.seg_left[1], s.step_ns[1] = 5, 11, 25 * MS
    return node


# Weights of 3 + 4 x 2 GB, 1 + 4 x 1 GB still (of 9) and none (20 + 14 GB promised, of 62).
SWAPPING_FREE = 50 - 4 - 11 - 5 - 26 * 0.05
SWAPPING_ROOM = SWAPPING_FREE - 34
SWAPPING_SHORT = 1 - exp(-10 / 10)
SWAPPING_LONG = 1 - exp(-10 / 60)
SWAPPING_RATES = 0.1 * exp(-4 / 60), 0.3 * exp(-5 / 60), 0.15 * exp(-7 / 60)

SWAPPING_NODE = {
    "free": SWAPPING_FREE / 50,
    # Weights of the second, what it saves, and what it will save or drop when its step ends.
    "releasing": (5 + 6 * 0.05 + (7 + 8 + 5) * 0.05) / 50,
    "promised": 34 / 50,
    "evictable": 11 / 50,
    "link_backlog": squash(0.2 + 3 + 0.5, against=1),
    "kv_backlog": squash(1, against=8),
    "link_bound": 0,
    "lacking": squash(1, against=4),
    "running": squash(1, against=4),
    "models": 3 / 16,
    "pressure": squash((11 + 9 + 62) / 50, against=1),
    "arrivals": squash(sum(SWAPPING_RATES) / SWAPPING_LONG, against=4),
    "since_decision": 0,
    "dispatch_edf": 0,
    "dispatch_las": 1,
    "full_verbs": 1,
}
SWAPPING_MODELS: dict[str, Sequence[float]] = {
    "weights": (11 / 50, 9 / 50, 1),  # the last is larger than the budget
    "layers": squashed(4, 8, 3, against=32),
    "resident": (1, 5 / 9, 0),
    "target": (1, 0, 2 / 4),
    "granted": (1, 5 / 9, 0),
    "load_left": squashed(0, 0, 0.2 + 3 + 0.5, against=1),
    "load": squashed(0.1 + 0.3 + 4 * 0.15, 0.1 + 0.2 + 8 * 0.05, 0.2 + 3 + 3 * 0.5, against=1),
    "since_loaded": (squash(9 - 6, against=1), 0, 0),
    "queued": squashed(0, 0, 2, against=8),
    "oldest_wait": (0, 0, squash((9 - 1) / 3, against=1)),
    "head_slack": (0, 0, -1),  # cut
    "head_slack_loaded": (0, 0, -1),
    "head_expired": (0, 0, 1),
    "head_prefill": squashed(0, 0, 0.1 + 300 * 0.001, against=1),
    "decoding": squashed(0, 2, 0, against=8),
    "prefilling": (0, 1, 0),
    "suspended": squashed(0, 1, 0, against=8),
    "paused": (0, 0, 1),
    # 35 and 25 tokens: 2 + 35 x 0.1 - 9 = 3.5 s behind, and 4 + 25 x 0.4 - 9 = 5 s ahead.
    "tpot_slack_min": (1, squash(-3.5, against=1), 1),
    "tpot_slack_mean": (0, squash((5 - 3.5) / 2, against=1), 0),
    # The sequence in prefill for the second time counts as a suspended one.
    "suspended_slack_min": (1, squash(min(5 + 15 * 0.25 - 9, 5 + 5 * 0.5 - 9), against=1), 1),
    "generated": squashed(0, (35 + 25) / 2, 0, against=200),
    "output": squashed(200 / 4, 0, 60, against=200),
    "remaining": squashed(0, 0.25 * 30 * 0.025, 0, against=1),
    "kv": (0, 26 * 0.05 / 50, 0),
    "kv_move": squashed(0, 26 * 0.003, 0, against=0.1),
    "rate_short": squashed(
        0.05 * exp(-4 / 10) / SWAPPING_SHORT,
        0.4 * exp(-5 / 10) / SWAPPING_SHORT,
        0.2 * exp(-7 / 10) / SWAPPING_SHORT,
        against=1,
    ),
    "rate_long": squashed(*(rate / SWAPPING_LONG for rate in SWAPPING_RATES), against=1),
    "since_used": (*squashed(2, 0.5, against=10), 1),  # the last never was
    "since_arrival": squashed(4, 5, 7, against=10),
    "step_over_tpot": squashed(0, 0.025 / 0.5, 0, against=1),
    # 2 x (30 ms + 1 sequence) and 20 ms + 1 sequence, for one without context.
    "step": squashed(2 * 0.032, 0.025, 0.03, against=0.05),
    # Missing layers: 4, 3, 2, 1; 8, 6, 4, 2; 3, 2, 1, 0.
    "step_level0": squashed(0.09, 0.082, 0.55, against=0.25),
    "step_level25": squashed(0.07, 0.062, 0.4, against=0.25),
    "step_level50": squashed(0.064, 0.042, 0.25, against=0.25),
    "step_level75": squashed(0.064, 0.025, 0.1, against=0.25),  # the fixed part even for no layer
    "focus": (0, 0, 0),
    "acted_residency": (0, 1, 0),
    "acted_run": (0, 0, 1),
    "acted_focus": (0, 0, 0),
    "idle": (1, 0, 0),
    "lacks_weights": (0, 1, 0),
    "gdsf": squashed(0.25, 1, 0, against=1),
    "in_link_bound": (0, 0, 0),
    "head_kv": squashed(0, 0, 20 * 0.02 / 50, against=0.05),
    # The others could have the memory of the idle one.
    "head_room": squashed(
        SWAPPING_ROOM / 50,
        (SWAPPING_ROOM + 11) / 50,
        (SWAPPING_ROOM + 11 - 20 * 0.02) / 50,
        against=0.05,
    ),
    "starved": (1, 0, 0),  # with nobody waiting: more is promised than free
}


def test_a_node_that_swaps() -> None:
    expected = table(SWAPPING_NODE, SWAPPING_MODELS, SWAPPING)
    assert seen(swapping_node(), SWAPPING) == pytest.approx(expected)


# --- an empty node, and cases apart ---------------------------------------------------------------

EMPTY = ("one", "two")


def test_an_empty_node_shows_its_size_and_that_nothing_ever_happened() -> None:
    node = dict.fromkeys(GLOBAL_FEATURES, 0.0)
    node |= {"free": 1, "models": 2 / 16, "pressure": squash(2 * 14 / 100, against=1)}
    models: dict[str, Sequence[float]] = dict.fromkeys(MODEL_FEATURES, (0, 0))
    alike = {
        "weights": (2 + 4 * 3) / 100,
        "layers": squash(4, against=32),
        "load": squash(0.1 + 0.3 + 4 * 0.15, against=1),
        "tpot_slack_min": 1,
        "suspended_slack_min": 1,
        "since_used": 1,
        "since_arrival": 1,
        "step": squash(0.02 + 0.01, against=0.05),
        "step_level0": squash(0.01 + 4 * 0.05, against=0.25),
        "step_level25": squash(0.01 + 3 * 0.05, against=0.25),
        "step_level50": squash(0.01 + 2 * 0.05, against=0.25),
        "step_level75": squash(0.01 + 1 * 0.05, against=0.25),
        "head_room": squash(1, against=0.05),
    }
    models |= {name: (value, value) for name, value in alike.items()}
    assert seen(empty_node(2), EMPTY) == pytest.approx(table(node, models, EMPTY))


@pytest.mark.parametrize(
    ("dispatch", "edf", "las"),
    [(st.DISPATCH_RR, 0, 0), (st.DISPATCH_EDF, 1, 0), (st.DISPATCH_LAS, 0, 1)],
)
def test_the_dispatch_rule_has_two_marks(dispatch: int, edf: int, las: int) -> None:
    node = empty_node(1)
    node[0].dispatch = dispatch
    now = seen(node, ["one"])
    assert (now["dispatch_edf"], now["dispatch_las"]) == (edf, las)


@pytest.mark.parametrize(
    ("target", "landed", "begun", "left_s"),
    [
        (5, 0, 0, 0.1 + 0.3 + 4 * 0.15),
        (5, 0, 1, 0.3 + 4 * 0.15),
        (1, 0, 0, 0.1 + 0.3),
        (5, 1, 1, 4 * 0.15),
        (5, 3, 0, 0.1 + 2 * 0.15),
        (5, 5, 1, 0),
        (3, 5, 0, 0),
        (0, 0, 0, 0),
    ],
)
def test_what_is_left_of_a_load(target: int, landed: int, begun: int, left_s: float) -> None:
    s, _ = node = empty_node(1)
    s.target[0], s.granted[0], s.landed[0], s.load_begun[0] = target, 5, landed, begun
    add(node, 0, QUEUED, 0, 10, 0, None, 100, 0, 0)
    now = seen(node, ["one"])
    assert now["one: load_left"] == pytest.approx(squash(left_s, against=1))
    assert now["link_backlog"] == pytest.approx(squash(left_s, against=1))
    to_come_s = left_s if target else 0.1 + 0.3 + 4 * 0.15  # a whole load where there is none
    assert now["one: head_slack_loaded"] == pytest.approx((10 - to_come_s - 0.2) / 10)


@pytest.mark.parametrize(
    ("target", "landed", "loaded_s", "since_s"),
    [(5, 5, 0, 4), (3, 5, 1, 3), (3, 3, 1, 3), (1, 1, 1, 3), (5, 4, 1, 0), (0, 5, 1, 0)],
)
def test_a_residency_lasts_from_the_end_of_a_load_to_the_next_change(
    target: int, landed: int, loaded_s: float, since_s: float
) -> None:
    s, _ = node = empty_node(1)
    s.now_ns, s.loaded_ns[0] = ns(4), ns(loaded_s)
    s.target[0], s.granted[0], s.landed[0] = target, 5, landed
    assert seen(node, ["one"])["one: since_loaded"] == pytest.approx(squash(since_s, against=1))


def test_without_a_load_that_ended_there_is_no_residency() -> None:
    s, _ = node = empty_node(1)
    s.now_ns = ns(4)
    s.target[0] = s.granted[0] = s.landed[0] = 2  # lowered to what had landed
    assert seen(node, ["one"])["one: since_loaded"] == 0


@pytest.mark.parametrize(("now_ns", "expired"), [(3 * S, 0), (3 * S + 1, 1)])
def test_a_head_expires_after_its_last_instant(now_ns: int, expired: int) -> None:
    s, _ = node = empty_node(1)
    s.now_ns = now_ns
    add(node, 0, QUEUED, 1, 2, 0, None, 100, 0, 0)
    now = seen(node, ["one"])
    assert now["one: head_slack"] == pytest.approx(0, abs=1e-9)
    assert now["one: head_expired"] == expired


@pytest.mark.parametrize(("steps_left", "step_s"), [(0, 0.02 + 0.01 + 101 * 1e-5), (1, 0.04)])
def test_a_step_is_priced_anew_where_the_segment_is_over(steps_left: int, step_s: float) -> None:
    s, _ = node = empty_node(1)
    s.now_ns = ns(5)
    s.seg_left[0], s.step_ns[0] = steps_left, 40 * MS
    add(node, 0, PREFILL, 1, 2, 0.1, None, 500, 0, 33)  # no part of a step
    add(node, 0, DECODE, 2, 2, 0.5, 3, 100, 1, 8)
    now = seen(node, ["one"])
    assert now["one: step"] == pytest.approx(squash(step_s, against=0.05))
    assert now["one: step_over_tpot"] == pytest.approx(squash(step_s / 0.5, against=1))
    assert now["one: tpot_slack_min"] == pytest.approx(squash(3 + 0.5 - 5, against=1))
    assert now["one: suspended_slack_min"] == 1
    assert (now["one: prefilling"], now["one: suspended"]) == (1, 0)


def test_what_happened_at_the_very_start_has_happened() -> None:
    s, _ = node = empty_node(1)
    s.now_ns = ns(9)
    s.used_ns[0] = s.rate_ns[0] = 0
    s.rate_short[0] = 0.1
    now = seen(node, ["one"])
    assert now["one: since_used"] == pytest.approx(squash(9, against=10))
    assert now["one: since_arrival"] == pytest.approx(squash(9, against=10))
    rate = 0.1 * exp(-9 / 10) / (1 - exp(-10 / 10))
    assert now["one: rate_short"] == pytest.approx(squash(rate, against=1))


def short_of_memory(begun: Sequence[int], missing_bytes: int) -> Node:
    """A resident model with sequences that have begun, and a request that waits for two blocks."""
    s, _ = node = empty_node(1)
    s.target[0] = s.granted[0] = s.landed[0] = 5
    for state in begun:
        add(node, 0, state, 0, 1, 0, 0, 16, 1, 1)
    add(node, 0, QUEUED, 0, 1, 0, None, 16, 0, 0)
    s.reserve_bytes = (100 - 14) * GB - (s.kv_blocks[0] + 2) * s.block_bytes[0] + missing_bytes
    return node


@pytest.mark.parametrize(
    ("begun", "missing_bytes", "starved"),
    [
        ([], 1, 1),
        ([], 0, 0),
        ([PREFILL], 1, 0),
        ([DECODE] * 63, 1, 1),
        ([DECODE] * 64, 1, 0),
        ([DECODE] * 63 + [RESTORING], 1, 0),
        ([SAVED], 1, 1),
        ([SAVED], 0, 0),
        ([SAVED, PREFILL], 1, 1),
        ([SAVED] + [DECODE] * 63, 1, 1),
    ],
)
def test_a_model_starves_where_its_next_request_could_begin_but_for_memory(
    begun: list[int], missing_bytes: int, starved: int
) -> None:
    assert seen(short_of_memory(begun, missing_bytes), ["one"])["one: starved"] == starved


@pytest.mark.parametrize(
    ("target", "landed", "starved"), [(5, 5, 1), (3, 3, 1), (1, 1, 1), (5, 4, 0), (0, 5, 0)]
)
def test_a_model_starves_only_with_the_weights_that_it_wants(
    target: int, landed: int, starved: int
) -> None:
    s, _ = node = short_of_memory([], 1)
    s.target[0], s.landed[0] = target, landed
    assert seen(node, ["one"])["one: starved"] == starved


def test_no_share_exceeds_the_whole() -> None:
    s, _ = node = swapping_node()
    s.budget_bytes = GB
    now = seen(node, SWAPPING)
    for name in ("releasing", "promised", "evictable", "going: weights", "going: kv"):
        assert now[name] == 1
