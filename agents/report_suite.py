"""A frozen benchmark's ``result.json`` in a report: its cells as places, its pools and targets.

The best rule of a cell is that of the stronger comparator there: the one with more goodput.
Training seeds of one policy stand in the pools one by one, in the cells as their mean.
"""

from pathlib import Path
from typing import Any

from mmrl.agents.headline import verdict
from mmrl.agents.results import Results
from mmrl.agents.suite import FORMAT, RESULT, read
from mmrl.agents.suite_policies import COMPARATORS
from mmrl.agents.suite_results import Row, rows_of
from mmrl.errors import InputError

SAME = (
    "episodes",
    "goodput",
    "goodput_worst_model",
    "norm_latency",
    "longest_wait_s",
    "ttft_p50_s",
    "loads_per_s",
    "preemptions_per_s",
)
BYTES = ("load", "stream", "kv_save", "kv_restore")


def is_suite(path: Path) -> bool:
    """Whether a folder holds the result of a benchmark, or a file is named like one."""
    return (path / RESULT).is_file() or (path.is_file() and path.name == RESULT)


def read_suite(path: Path) -> Results:
    """Read a benchmark's result as results without tables of episodes.

    Its summary has one thing more, ``suite``: name, pools and verdicts.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return _summed_up(read(path))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: no benchmark result: {error!r}", "name a result.json") from error


def _summed_up(result: dict[str, Any]) -> Results:
    import pandas as pd

    cells = rows_of(result["cells"])
    entered = rows_of(result["policies"])
    kinds = {  # who looks ahead played a few episodes of some cells: no rule to be measured by
        row["policy"]: "bound" if row["kind"] == "planner" else str(row["kind"]) for row in entered
    }
    compared = rows_of(result["compared"])
    members = _members(result)
    kinds |= dict.fromkeys([*(row["policy"] for row in compared), *members], "learned")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for cell in cells:
        names = ("platform", "family", "variation", "group", "origin", "trace")
        groups.setdefault(tuple(cell[name] for name in names), []).append(cell)
    figures = rows_of(result["figures"])
    boards = [_board(result, some, figures, compared, kinds, members) for some in groups.values()]
    placed = {row["policy"] for board in boards for row in board["rows"]}
    summary = {
        "version": FORMAT,
        "boards": boards,
        "policies": [
            {"name": name, "kind": kind, "path": None, "run": None}
            for name, kind in kinds.items()
            if name in placed
        ],
        "provenance": result["provenance"]
        | {"split": cells[0]["split"], "episodes": result["episodes"]}
        | {"bootstrap_seed": result["bootstrap"]["seed"]},
        "suite": {
            "name": str(result["suite"]),
            "complete": result["complete"],
            "cells": len(cells),
            "episodes": result["episodes"],
            "pools": [
                row | {"is_member": any(row["policy"] in names for names in members.values())}
                for row in rows_of(result["pools"])
                if row["stronger"]
            ],
            "targets": rows_of(result["verdicts"]),
        },
    }
    return Results(summary, pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), [])


def _members(result: dict[str, Any]) -> dict[str, list[str]]:
    """Return the training seeds of each learned policy that has several."""
    found: dict[str, list[str]] = {}
    for row in rows_of(result["policies"]):
        if row["kind"] == "learned":
            found.setdefault(row["group"], []).append(row["policy"])
    return {group: names for group, names in found.items() if len(names) > 1}


def _board(
    result: dict[str, Any],
    cells: list[Row],
    figures: list[Row],
    compared: list[Row],
    kinds: dict[str, str],
    members: dict[str, list[str]],
) -> dict[str, Any]:
    first = cells[0]
    about = [first["platform"], first["family"], first["variation"], first["trace"]]
    name = " ".join(str(part) for part in about if part)
    if first["group"] == "fixed":
        name = f"{name} ({first['cell']})"
    rows: list[Row] = []
    for cell in cells:
        mine = {row["policy"]: row for row in figures if row["cell"] == cell["cell"]}
        for group, names in members.items():
            if all(one in mine for one in names):
                seeds = [mine.pop(one) for one in names]
                mine[group] = _mean(seeds) | {"policy": group}
        versus = [row for row in compared if row["cell"] == cell["cell"]]
        rows += _rows(cell, mine, versus, kinds)
    loads = sorted({cell["load"] for cell in cells})
    return {
        "name": name,
        "scenario": first["cell"],
        "trace": first["trace"] or "",
        "platform": first["platform"],
        "family": first["family"],
        "notes": [],
        "loads": loads,
        "main_load": 1.0 if 1.0 in loads else loads[-1],
        "episodes": result["episodes"],
        "rows": rows,
        "models": [],
    }


def _rows(cell: Row, mine: dict[str, Row], compared: list[Row], kinds: dict[str, str]) -> list[Row]:
    rules = [row for name, row in mine.items() if kinds[name] == "rule"]
    best = max(rules, key=lambda row: row["goodput"] or 0.0, default=None)
    found = []
    for name, figure in mine.items():
        row: Row = {metric: figure.get(metric) for metric in SAME}
        row |= {"board": cell["cell"], "load": cell["load"], "policy": name, "kind": kinds[name]}
        row["requests"] = round(figure["requests"] * figure["episodes"])  # a mean of episodes
        low, high = figure.get("goodput_low"), figure.get("goodput_high")
        row["goodput_interval"] = None if low is None else [figure["goodput"], low, high]
        row["ttft_p99_s"] = figure.get("all_ttft_p99_s") or figure.get("ttft_p99_s")
        row["is_best_rule"] = figure is best
        row["verbs_per_min"] = {}
        row |= {f"{kind}_bytes_per_s": figure.get(f"{kind}_bytes_per_s") or 0.0 for kind in BYTES}
        against = [
            one for one in compared if one["policy"] == name and one["reference"] in COMPARATORS
        ]
        if against:
            one = max(against, key=lambda one: mine[one["rule"]]["goodput"] or 0.0)
            difference = [one["goodput"], one["goodput_low"], one["goodput_high"]]
            row["vs_best_rule"] = {
                "policy": one["rule"],
                "goodput": None if one["goodput"] is None else difference,
                "p_holm": one["p_holm"],
            }
        found.append(row)
    return found


def _mean(rows: list[Row]) -> Row:
    """Return the mean of several training seeds; the interval is that of the comparison."""
    found: Row = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if all(isinstance(value, int | float) for value in values):
            found[name] = sum(values) / len(values)
    for name in ("goodput_low", "goodput_high"):
        found.pop(name, None)
    return found | {"episodes": rows[0]["episodes"]}


def suite_headline(suite: dict[str, Any]) -> tuple[str, str] | None:
    """Return what a benchmark says of its first policy over all core cells; None without one."""
    core = [row for row in suite["pools"] if row["pool"] == "core"]
    if not core:
        return None
    row = max(core, key=lambda row: row["seeds"])
    interval = [row["goodput"], row["goodput_low"], row["goodput_high"]]
    points = [f"{100 * value:+.1f}".replace("-", "−") for value in interval]
    what = {
        "wins": f"{row['policy']} beats the best hand-written policies by {points[0]} points",
        "loses": f"{row['policy']} loses to the best hand-written policies by {points[0]} points",
        "ties": f"{row['policy']} and the best hand-written policies cannot be told apart",
    }[verdict(interval)]
    targets = [one for one in suite["targets"] if one["policy"] == row["policy"]]
    met = sum(one["met"] is True for one in targets)
    missed = sum(one["met"] is False for one in targets)
    detail = (
        f"Pooled over {row['cells']} core cells and {row['seeds']} training "
        f"{'seed' if row['seeds'] == 1 else 'seeds'} of benchmark "
        f"{suite['name']}: difference {points[0]} points of goodput, 95 % interval {points[1]} to "
        f"{points[2]}. Of {len(targets)} targets {met} are met, {missed} missed."
    )
    return f"{what} on benchmark {suite['name']}", detail
