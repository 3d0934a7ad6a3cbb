"""Random small nodes under stress, shared by the tests of the two simulators.

Constants are made up but of plausible proportions; budgets and host memory are small against them,
so that short episodes take every path: exhausted KV, dropped KV, waiting grants, abandoned
iterations, idle evictions, a blocked node.
"""

from typing import Any

import numpy as np

from mmrl.node.state import (
    BLOCK_TOKENS,
    DISPATCHES,
    CostTable,
    Record,
    new_nodes,
    new_requests,
)
from mmrl.profiles.costs import (
    CONTEXT_KNOTS,
    CONTEXT_STEP_TOKENS,
    DECODE_BATCHES,
    PREFILL_KNOTS,
    PREFILL_STEP_TOKENS,
)

MS = 1_000_000
Scene = tuple[Record, "np.recarray", CostTable, CostTable]


def decode_table(floor_s: float, per_sequence_s: float, per_token_s: float) -> CostTable:
    """Seconds of a decode step, linear in batch and in total context."""
    batch = np.arange(DECODE_BATCHES + 1.0)[:, None]
    context = np.arange(CONTEXT_KNOTS)[None, :] * CONTEXT_STEP_TOKENS
    return floor_s + per_sequence_s * batch + per_token_s * batch * context


def prefill_table(floor_s: float, per_token_s: float, per_square_s: float) -> CostTable:
    """Seconds of a prefill, quadratic in tokens."""
    tokens = np.arange(PREFILL_KNOTS) * PREFILL_STEP_TOKENS
    return floor_s + per_token_s * tokens + per_square_s * tokens**2


def random_scene(
    seed: int,
    n_models: int | None = None,
    full: bool | None = None,
    tight: bool | None = None,
    n_requests: int | None = None,
) -> Scene:
    """Draw a node, its requests and its cost tables; what is not given is drawn too.

    Args:
        seed: The same scene for the same seed and arguments.
        n_models: Size of the fleet, 1 to 16.
        full: Verb set ``full`` instead of ``core``.
        tight: A budget of one model and little KV, instead of one of several models.
        n_requests: Requests of the episode.

    Returns:
        ``NODE`` record, ``recarray[n_requests]`` of ``REQUEST``, ``float64[P, 65, 33]`` and
        ``float64[P, 257]`` seconds.
    """
    rng = np.random.default_rng(seed)
    m_count = int(rng.integers(1, 5)) if n_models is None else n_models
    r_count = int(rng.integers(1, 40)) if n_requests is None else n_requests
    tight = bool(rng.random() < 0.6) if tight is None else tight
    node = new_nodes(1)[0]
    node.n_models, node.n_requests = m_count, r_count
    node.full_verbs = rng.integers(2) if full is None else full
    node.prefetch = rng.random() < 0.7
    node.dispatch = rng.integers(len(DISPATCHES))
    node.interval_ns = rng.choice([20 * MS, 250 * MS])
    node.latency_ns = rng.choice([0, 2 * MS, 7 * MS + 1])
    node.gap_ns = rng.choice([0, 0, 3 * MS, 50 * MS])
    node.miss_weight, node.latency_weight = 1.0, 0.01
    decode_tables, prefill_tables = _draw_models(rng, node, m_count)

    requests = new_requests(1, r_count)[0]
    _draw_requests(rng, node, requests, decode_tables, prefill_tables)
    _draw_memory(rng, node, requests, tight)
    node.horizon_ns = rng.choice([1_000, 30_000, 3_000_000]) * MS
    return node, requests, decode_tables, prefill_tables


def _draw_models(rng: np.random.Generator, node: Any, count: int) -> tuple[CostTable, CostTable]:
    tables: list[tuple[CostTable, CostTable]] = []
    for m in range(count):
        layers = int(rng.integers(1, 9))
        node.profile[m] = m
        node.pieces[m] = layers + 1
        node.base_bytes[m] = rng.integers(50_000, 400_000)
        node.layer_bytes[m] = rng.integers(50_000, 300_000)
        node.block_bytes[m] = rng.choice([1_000, 4_000, 7_777])
        node.load_fixed_ns[m] = rng.integers(1, 20 * MS)
        node.load_base_ns[m] = rng.integers(MS, 20 * MS)
        node.load_layer_ns[m] = rng.integers(MS, 10 * MS)
        node.stream_fixed_ns[m] = rng.integers(1, MS)
        node.stream_layer_ns[m] = rng.integers(MS, 10 * MS)
        node.save_fixed_ns[m] = rng.integers(1, 2 * MS)
        node.save_block_ns[m] = rng.random() * MS
        node.restore_fixed_ns[m] = rng.integers(1, 2 * MS)
        node.restore_block_ns[m] = rng.random() * MS
        node.beside_load[m], node.beside_stream[m], node.beside_save[m] = rng.uniform(0, 0.3, 3)
        node.settle_ns[m] = (m + 1) * MS // 4
        node.decode_scale[m], node.prefill_scale[m] = rng.uniform(0.85, 1.15, 2)
        scale = rng.uniform(0.3, 3.0)
        tables.append(
            (
                decode_table(0.004 * scale, 1e-4 * scale, 2e-7 * scale),
                prefill_table(0.006 * scale, 2e-5 * scale, 1e-9 * scale),
            )
        )
    return np.stack([d for d, _ in tables]), np.stack([p for _, p in tables])


def _draw_requests(
    rng: np.random.Generator,
    node: Any,
    requests: Any,
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> None:
    count = len(requests)
    gaps = rng.exponential(rng.choice([2, 20, 100]) * MS, count)
    gaps[rng.random(count) < 0.3] = 0  # some arrive together
    requests.arrival_ns = np.cumsum(gaps.astype(np.int64))
    share = rng.dirichlet(np.full(node.n_models, 0.7))
    requests.model = rng.choice(node.n_models, count, p=share)
    requests.prompt = 1 + rng.integers(1, rng.choice([40, 400, 3_000]), count)
    requests.output = 1 + rng.integers(0, rng.choice([4, 40, 150]), count)
    requests.output[rng.random(count) < 0.15] = 1
    requests.ttft_ns = rng.choice([30 * MS, 300 * MS, 3_000 * MS], count)
    requests.tpot_ns = rng.choice([0, 10 * MS, 50 * MS], count)
    prefill_s = prefill_tables[requests.model, requests.prompt // PREFILL_STEP_TOKENS]
    step_s = decode_tables[requests.model, 1, 0]
    requests.isolated_ns = 1e9 * (prefill_s + step_s * (requests.output - 1))


def _draw_memory(rng: np.random.Generator, node: Any, requests: Any, tight: bool) -> None:
    """Give room for the largest model with its largest request, and more or less on top."""
    m = np.arange(node.n_models)
    weights = node.base_bytes[m] + (node.pieces[m] - 1) * node.layer_bytes[m]
    blocks = (requests.prompt + requests.output) // BLOCK_TOKENS + 3
    kv = blocks * node.block_bytes[requests.model]
    # a level may have to fit beside the KV of a model that is leaving: none of it is ever stuck
    alone = int((weights[requests.model] + kv).max(initial=int(weights.max())))
    node.reserve_bytes = 2 * node.layer_bytes[m].max() if node.full_verbs else 100_000
    spare = rng.uniform(0.0, 0.2) if tight else rng.uniform(0.3, 1.0)
    everything = int(weights.sum() + kv.sum())
    budget = alone + int(spare * (everything - alone))
    if tight and rng.random() < 0.5:  # all weights, and too little KV beside them
        budget = max(alone, int(weights.sum() + 0.2 * kv.max()))
    node.budget_bytes = node.reserve_bytes + budget
    limit = rng.choice([0.0, 0.3, 2.0, 2.0])
    node.host_kv_limit_bytes = int(limit * kv.max(initial=0))
