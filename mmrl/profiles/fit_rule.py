"""Fit the rule of derivation to measured profiles: what derives a model's costs from its shape.

Times are linear in the rule's constants: least squares of relative errors, no constant below what
is possible. ``benchmarks/fit_derivation.py`` runs this after every measurement and writes
``data/rule.json``.
"""

from collections.abc import Sequence

import numpy as np

from mmrl.node.state import CHUNK_TOKENS
from mmrl.profiles.derive import Rule, activation_bytes
from mmrl.profiles.schema import Profile

DECODE = ("layer_s", "sequence_s", "weight_passes", "kv_passes", "expanded_kv_passes")
PREFILL = (
    *("prefill_layer_s", "chunk_layer_s", "prefill_weight_passes", "activation_passes"),
    *("matrix_efficiency", "attention_efficiency"),
)
DIGITS = 4


def fit_rule(profiles: Sequence[Profile]) -> Rule:
    """Return the rule that comes nearest to the decode and prefill points of measured profiles.

    Constants are rounded to four digits before the errors are taken.
    """
    found = dict(zip(DECODE, _fit_decode(profiles), strict=True))
    found |= zip(PREFILL, _fit_prefill(profiles), strict=True)
    values = {name: _rounded(value) for name, value in found.items()}
    fitted = tuple(f"{p.platform}/{p.model}" for p in profiles)
    rule = Rule(**values, fitted_to=fitted, decode_error=0, prefill_error=0)
    worst = {
        field: _rounded(max(abs(e) for profile in profiles for e in errors(rule, profile)))
        for field, errors in (("decode_error", decode_errors), ("prefill_error", prefill_errors))
    }
    return rule.model_copy(update=worst)


def decode_errors(rule: Rule, profile: Profile) -> list[float]:
    """Return the relative error of a rule at each decode point of a profile."""
    return [
        rule.decode_s(profile.architecture, profile.limits, p.batch, p.context_tokens) / p.time_s
        - 1
        for p in profile.decode
    ]


def prefill_errors(rule: Rule, profile: Profile) -> list[float]:
    """Return the relative error of a rule at each prefill point of a profile."""
    return [
        rule.prefill_s(profile.architecture, profile.limits, p.tokens) / p.time_s - 1
        for p in profile.prefill
    ]


def _fit_decode(profiles: Sequence[Profile]) -> list[float]:
    """Return layer_s, sequence_s and passes over weights, KV and expanded KV."""
    rows = []
    for profile in profiles:
        shape, bandwidth = profile.architecture, profile.limits.memory_bytes_per_s
        for point in profile.decode:
            kv = point.batch * point.context_tokens * shape.kv_bytes_per_token / bandwidth
            expanded = kv * shape.attention_heads / shape.kv_heads
            costs = (shape.layers, point.batch, shape.read_bytes / bandwidth, kv, expanded)
            rows.append([cost / point.time_s for cost in costs])
    return _fitted(rows, least=[0, 0, 1, 0, 0])


def _fit_prefill(profiles: Sequence[Profile]) -> list[float]:
    """Return the constants of a prefill, in the order of `PREFILL`."""
    rows = []
    for profile in profiles:
        shape, limits = profile.architecture, profile.limits
        for point in profile.prefill:
            chunks = max(1, -(-point.tokens // CHUNK_TOKENS))
            attention = shape.attention_flop(point.tokens)
            costs = (
                shape.layers,
                shape.layers * (chunks - 1),
                chunks * shape.read_bytes / limits.memory_bytes_per_s,
                activation_bytes(shape, point.tokens) / limits.memory_bytes_per_s,
                (shape.prefill_flop(point.tokens) - attention) / limits.compute_flop_per_s,
                attention / limits.compute_flop_per_s,
            )
            rows.append([cost / point.time_s for cost in costs])
    *rest, matrix, attention = _fitted(rows, least=[0, 0, 1, 0, 1, 1])
    return [*rest, 1 / matrix, 1 / attention]


def _fitted(rows: list[list[float]], least: list[float]) -> list[float]:
    """Return constants that bring each row's sum, a share of a measured time, nearest to 1."""
    from scipy.optimize import lsq_linear

    bounds = np.array(least), np.full(len(least), np.inf)
    found = lsq_linear(np.array(rows), np.ones(len(rows)), bounds, method="bvls")
    return [float(constant) for constant in found.x]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
