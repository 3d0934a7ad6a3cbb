"""`check_tables`: whether a result's tables follow from what was played.

With all episodes every table is computed again. From the means alone follow the rules that are
compared with, the differences of goodput and, from the tables as they are told, the verdicts: then
intervals, p-values and head-room stay unchecked.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrl.agents.suite import tables_of, whole_platforms
from mmrl.agents.suite_policies import COMPARATORS, Entry
from mmrl.agents.suite_results import Row, make_tables, mean, pools_of, rows_of
from mmrl.agents.suite_run import BINS, NUMBERS, CellResult
from mmrl.agents.suite_stats import Bootstrap
from mmrl.agents.suite_verdicts import judge
from mmrl.scenarios.suite import Cell, Suite

if TYPE_CHECKING:
    import pandas as pd

P99 = "all_ttft_p99_s"  # over requests, of which there is no file
# Draws are sums of float32, the last digits of which are the processor's.
DRAWN, CLOSE = {"rel_tol": 1e-3, "abs_tol": 1e-5}, {"rel_tol": 1e-9, "abs_tol": 1e-12}
P_VALUE = {"rel_tol": 0.05, "abs_tol": 2e-3}


def check_tables(
    suite: Suite,
    result: dict[str, Any],
    episodes: "pd.DataFrame | None",
    cells: Sequence[Cell],
    who: Sequence[Entry],
) -> list[str]:
    """Return what in a result's tables does not follow, a sentence for each table.

    Args:
        suite: Of the result.
        result: Content of ``result.json``.
        episodes: Those of ``episodes.parquet``; None: from the means.
        cells: All cells of the result, in its order.
        who: All policies of the result, in its order.
    """
    if episodes is None:
        expected = _from_means(suite, result)
    else:
        results = {
            (str(cell), str(policy)): CellResult(
                part.episode.to_numpy(),
                {name: part[name].to_numpy() for name in NUMBERS},
                np.zeros(BINS, np.int64),
            )
            for (cell, policy), part in episodes.groupby(["cell", "policy"], observed=True)
        }
        lacking = {(row["cell"], row["policy"]) for row in rows_of(result["figures"])} - set(
            results
        )
        if lacking:
            cell, policy = min(lacking)
            return [f"there are no episodes of {policy} on {cell}"]
        tables = make_tables(cells, who, results, Bootstrap(result["bootstrap"]["seed"]))
        for rows, name in ((tables.figures, "figures"), (tables.pools, "pools")):
            _take_p99(rows, rows_of(result[name]))
        expected = tables_of(suite, tables, cells, who)
    problems = [_difference(name, rows_of(result[name]), rows) for name, rows in expected.items()]
    return [problem for problem in problems if problem]


def _take_p99(rows: Sequence[Row], told: Sequence[Row]) -> None:
    """Take the p99 of TTFT over requests as it was told."""
    for row, other in zip(rows, told, strict=False):
        row |= {name: other[name] for name in (P99, f"{P99}_reference") if name in row}


def _from_means(suite: Suite, result: dict[str, Any]) -> dict[str, list[Row]]:
    """Return those columns of the tables that follow from the means of cells."""
    figures = rows_of(result["figures"])
    goodput = {(row["cell"], row["policy"]): row["goodput"] for row in figures}
    latency = {(row["cell"], row["policy"]): row["norm_latency"] for row in figures}
    policies = rows_of(result["policies"])
    seeds: dict[str, list[str]] = {row["policy"]: [row["policy"]] for row in policies}
    for row in policies:
        if row["kind"] == "learned" and row["group"] not in seeds:
            seeds[row["group"]] = [r["policy"] for r in policies if r["group"] == row["group"]]
    rules = {c: [r["policy"] for r in policies if r["comparator"] == c] for c in COMPARATORS}

    def points(cell: str, policy: str, against: Sequence[str]) -> float:
        ours, theirs = (
            [goodput[cell, name] for name in names] for names in (seeds[policy], against)
        )
        return mean(ours) - mean(theirs)

    compared = []
    for row in rows_of(result["compared"]):
        cell, reference, rule = row["cell"], row["reference"], row["rule"]
        if reference in COMPARATORS:
            played = [name for name in rules[reference] if (cell, name) in goodput]
            rule = max(played, key=lambda name: (goodput[cell, name], -latency[cell, name]))
        known = {name: row[name] for name in ("cell", "policy", "reference")}
        compared.append({**known, "rule": rule, "goodput": points(cell, row["policy"], [rule])})
    pools = {
        row["cell"]: [name for name, *_ in pools_of(row["group"], row["platform"], row["load"])]
        for row in rows_of(result["cells"])
    }
    pooled = []
    for row in rows_of(result["pools"]):
        members = [
            one["goodput"]
            for one in compared
            if (one["policy"], one["reference"]) == (row["policy"], row["reference"])
            and row["pool"] in pools[one["cell"]]
        ]
        known = {name: row[name] for name in ("pool", "policy", "reference")}
        pooled.append({**known, "cells": len(members), "goodput": mean(members)})
    zero_shot = []
    for row in rows_of(result["zero_shot"]):
        there = [cell for cell, policy in goodput if policy == seeds[row["against"]][0]]
        lost = [points(cell, row["policy"], seeds[row["against"]]) for cell in there]
        known = {name: row[name] for name in ("policy", "against")}
        zero_shot.append({**known, "cells": len(there), "goodput": mean(lost)})
    names = "figures", "compared", "pools", "headroom", "zero_shot"
    told = {name: rows_of(result[name]) for name in names}
    judged = judge(
        dict.fromkeys(row["policy"] for row in rows_of(result["verdicts"])),
        told,
        whole_platforms(suite, figures),
    )
    return {"compared": compared, "pools": pooled, "zero_shot": zero_shot, "verdicts": judged}


def _difference(name: str, told: Sequence[Row], expected: Sequence[Row]) -> str:
    """Say the first thing in a table that is not as expected; columns of the latter alone."""
    if len(told) != len(expected):
        return (
            f"{name}: {len(expected)} rows follow from what was played, the result has {len(told)}"
        )
    for row, ours in zip(told, expected, strict=True):
        for column, value in ours.items():
            if column != "detail" and not _same(column, row.get(column), value):
                where = ", ".join(
                    str(row[key])
                    for key in ("place", "pool", "cell", "policy", "reference", "target")
                    if row.get(key)
                )
                return f"{name}, {where}: {column} is {value}, the result says {row.get(column)}"
    return ""


def _same(column: str, told: Any, value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return told is None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return bool(told == value)
    if not isinstance(told, int | float):
        return False
    if column in ("p", "p_holm"):
        return math.isclose(told, value, **P_VALUE)
    drawn = column in ("low", "high") or column.endswith(("_low", "_high"))
    return math.isclose(told, value, **(DRAWN if drawn else CLOSE))
