"""What a scheduler should therefore consider: elasticities and break-even points.

An elasticity is the relative change of a result for a relative change of one factor, all others
at the reference point: ``ln(y2 / y1) / ln(x2 / x1)`` between the ends of an interval around it. At
-1, twice the factor halves the result.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmrl.profiles.costs import DECODE_BATCHES
from mmrl.study.formulas import Case, preemption, with_link

BATCH, CONTEXT, RESIDENCY = 8, 2048, 0.75  # the reference point
FACTORS = {  # factor: the interval around the reference
    "residency": (0.675, 0.825),
    "link rate": (0.8, 1.25),  # of the platform's
    "context": (1638, 2560),
    "batch": (6, 10),
}
MODEL_SIZE = "model size"  # of the models of one platform: least squares of the logarithms
RESULTS = ("decode throughput", "preemption cost")
OVERHEAD = 0.1  # of the time that may go into swapping, or of the step into streaming

Point = tuple[Case, float, int, int]  # case, residency, context, batch


def _throughput(point: Point) -> float:
    case, residency, context, batch = point
    return batch / case.step_s(residency * case.layers, batch, context)


def _pause(point: Point) -> float:
    case, residency, context, batch = point
    return preemption(case, batch, context, residency * case.layers).total_s


MEASURES: dict[str, Callable[[Point], float]] = dict(
    zip(RESULTS, (_throughput, _pause), strict=True)
)


def _point(case: Case, factor: str, value: float) -> Point:
    """Return the reference point with one factor at another value."""
    if factor == "residency":
        return case, value, CONTEXT, BATCH
    if factor == "link rate":
        return with_link(case, case.platform.link_bytes_per_s * value), RESIDENCY, CONTEXT, BATCH
    if factor == "context":
        return case, RESIDENCY, int(value), BATCH
    return case, RESIDENCY, CONTEXT, int(value)


def elasticities(cases: Sequence[Case]) -> pd.DataFrame:
    """Elasticities at the reference point of each model and platform, ranked by size.

    ``rank`` 1 is the factor that matters most to that result. Where a platform has one model, the
    size of the model is left out.
    """
    by_size = _by_size(cases)
    rows = []
    for case in cases:
        for result, measure in MEASURES.items():
            found = {}
            for factor, (low, high) in FACTORS.items():
                ends = [measure(_point(case, factor, value)) for value in (low, high)]
                found[factor] = math.log(ends[1] / ends[0]) / math.log(high / low)
            if case.platform.name in by_size:
                found[MODEL_SIZE] = by_size[case.platform.name][result]
            ranking = sorted(found, key=lambda factor: -abs(found[factor]))
            rows += [
                {
                    "platform": case.platform.name,
                    "model": case.profile.model,
                    "result": result,
                    "factor": factor,
                    "elasticity": elasticity,
                    "rank": ranking.index(factor) + 1,
                }
                for factor, elasticity in found.items()
            ]
    return pd.DataFrame(rows)


def _by_size(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Return the elasticity to the weights' bytes over each platform's models, by result."""
    found = {}
    for name in dict.fromkeys(case.platform.name for case in cases):
        mine = [case for case in cases if case.platform.name == name]
        sizes = np.log([case.profile.weight_bytes for case in mine])
        if len(set(sizes.tolist())) < 2:
            continue
        found[name] = {
            result: float(
                np.polyfit(
                    sizes, np.log([measure((c, RESIDENCY, CONTEXT, BATCH)) for c in mine]), 1
                )[0]
            )
            for result, measure in MEASURES.items()
        }
    return found


def preemption_pays(cases: Sequence[Case]) -> pd.DataFrame:
    """How many decode steps a model must run for another's preemption to pay.

    ``model`` is put out and later comes back, ``other`` is loaded in its place; both decode at the
    reference point.

    - ``steps_10_percent``: from so many steps of the other on, swapping takes at most a tenth of
      the time: ``9 * (pause of the model + load of the other) / step of the other``.
    - ``steps_vs_streaming``: from so many on, it is faster than leaving the model where it is and
      streaming all layers of the other, whose steps then take longer. Empty where streaming costs
      nothing.
    """
    rows = []
    for case in cases:
        pause_s = preemption(case, BATCH, CONTEXT, case.layers).total_s
        for other in cases:
            if other.platform.name != case.platform.name:
                continue
            cost_s = pause_s + other.costs.load_s(other.profile.weight_bytes)
            step_s = other.step_s(other.layers, BATCH, CONTEXT)
            streamed_s = other.step_s(0, BATCH, CONTEXT)
            rows.append(
                {
                    "platform": case.platform.name,
                    "model": case.profile.model,
                    "other": other.profile.model,
                    "pause_s": pause_s,
                    "load_s": cost_s - pause_s,
                    "step_s": step_s,
                    "steps_10_percent": math.ceil((1 / OVERHEAD - 1) * cost_s / step_s),
                    "steps_vs_streaming": _ceil_ratio(cost_s, streamed_s - step_s),
                }
            )
    return pd.DataFrame(rows).astype({"steps_vs_streaming": "Int64"})


def _ceil_ratio(cost: float, gain: float) -> int | None:
    return math.ceil(cost / gain) if gain > 0 else None


def hidden_batches(cases: Sequence[Case]) -> pd.DataFrame:
    """The smallest batch from which streaming costs less than a tenth of the resident throughput.

    By level; empty where even the largest batch does not hide it.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        row: dict[str, Any] = {"platform": case.platform.name, "model": case.profile.model}
        for level in (0, 25, 50, 75):
            row[f"batch_at_{level}"] = _hidden_from(case, level / 100)
        rows.append(row)
    columns = {f"batch_at_{level}": "Int64" for level in (0, 25, 50, 75)}
    return pd.DataFrame(rows).astype(columns)


def _hidden_from(case: Case, residency: float) -> int | None:
    for batch in range(1, DECODE_BATCHES + 1):
        resident_s = case.step_s(case.layers, batch, CONTEXT)
        if resident_s >= (1 - OVERHEAD) * case.step_s(residency * case.layers, batch, CONTEXT):
            return batch
    return None
