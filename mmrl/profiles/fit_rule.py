"""Fit the rule of derivation to measured profiles: what derives a model's costs from its shape.

Decode is linear in the rule's constants: least squares of relative errors, none of them negative.
Prefill has a floor, and is fitted on logarithms. ``benchmarks/fit_derivation.py`` runs this after
every measurement and writes ``data/rule.json``.
"""

from collections.abc import Sequence

import numpy as np

from mmrl.profiles.derive import Rule
from mmrl.profiles.schema import Array, Profile

PREFILL_START = np.log([0.5e-3, 0.5, 0.4])  # seconds per layer, shares of the rate
DIGITS = 4


def fit_rule(profiles: Sequence[Profile]) -> Rule:
    """Return the rule that comes nearest to the decode and prefill points of measured profiles.

    Constants are rounded to four digits before the errors are taken.
    """
    decode = _fit_decode(profiles)
    prefill = _fit_prefill(profiles, decode[2])
    names = (
        *("layer_s", "sequence_s", "weight_passes", "kv_passes", "expanded_kv_passes"),
        *("prefill_layer_s", "matrix_efficiency", "attention_efficiency"),
    )
    values = dict(zip(names, (_rounded(x) for x in (*decode, *prefill)), strict=True))
    fitted = tuple(f"{p.platform}/{p.model}" for p in profiles)
    found = Rule(**values, fitted_to=fitted, decode_error=0, prefill_error=0)
    return found.model_copy(
        update={
            "decode_error": _rounded(
                max(abs(e) for p in profiles for e in decode_errors(found, p))
            ),
            "prefill_error": _rounded(
                max(abs(e) for p in profiles for e in prefill_errors(found, p))
            ),
        }
    )


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


def _fit_decode(profiles: Sequence[Profile]) -> Array:
    """Return layer_s, sequence_s and passes over weights, KV and expanded KV."""
    from scipy.optimize import nnls

    rows = []
    for profile in profiles:
        shape, bandwidth = profile.architecture, profile.limits.memory_bytes_per_s
        for point in profile.decode:
            kv = point.batch * point.context_tokens * shape.kv_bytes_per_token / bandwidth
            expanded = kv * shape.attention_heads / shape.kv_heads
            costs = (shape.layers, point.batch, shape.read_bytes / bandwidth, kv, expanded)
            rows.append([cost / point.time_s for cost in costs])
    found: Array = nnls(np.array(rows), np.ones(len(rows)))[0]
    return found


def _fit_prefill(profiles: Sequence[Profile], weight_passes: float) -> Array:
    """Return prefill_layer_s and the efficiencies of matrices and of attention."""
    from scipy.optimize import least_squares

    columns = []
    for profile in profiles:
        shape, limits = profile.architecture, profile.limits
        read_s = weight_passes * shape.read_bytes / limits.memory_bytes_per_s
        for point in profile.prefill:
            attention = shape.attention_flop(point.tokens) / limits.compute_flop_per_s
            whole = shape.prefill_flop(point.tokens) / limits.compute_flop_per_s
            columns.append((shape.layers, read_s, whole - attention, attention, point.time_s))
    layers, read, matrix, attention_s, time = np.array(columns).T

    def errors(logs: Array) -> Array:
        layer_s, at_matrix, at_attention = np.exp(logs)
        floor = np.maximum(layers * layer_s, read)
        work = matrix / at_matrix + attention_s / at_attention
        found: Array = np.log(np.maximum(floor, work) / time)
        return found

    upper = [np.inf, 0.0, 0.0]
    return np.exp(
        least_squares(errors, PREFILL_START, bounds=(-np.inf, upper), diff_step=[1e-4] * 3).x
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
