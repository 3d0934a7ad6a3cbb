"""What a benchmark found: the tables of ``result.json``; docs/benchmark.md describes each.

The best rule of a comparator is chosen in each cell by its goodput on the test episodes
themselves. That favours the rules: a learned policy is compared with the best of all of them, cell
by cell, which nobody could have known before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.suite_policies import COMPARATORS, Entry
from mmrl.agents.suite_run import NUMBERS, CellResult, ttft_quantile
from mmrl.agents.suite_stats import Bootstrap, Draws, interval, p_value
from mmrl.errors import InputError
from mmrl.files import finite
from mmrl.scenarios.suite import Cell
from mmrl.stats import holm

COMPARED = ("goodput", "norm_latency", "goodput_worst_model", "longest_wait_s")
NAMED = ("lru", "full-swap")  # rules that a policy is also compared with one by one
Floats = npt.NDArray[np.float64]
Results = dict[tuple[str, str], CellResult]
Row = dict[str, Any]


@dataclass(frozen=True)
class Entrant:
    """A learned policy in the comparisons: one training seed, or all seeds of a group."""

    name: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Comparison:
    """An entrant against a reference on one cell.

    Attributes:
        cell: The cell.
        entrant: Who is compared.
        reference: ``once`` or ``cell``, the best rule tuned so, or the name of a rule.
        against: Name of the entry that it is there.
        differences: For each of `COMPARED` float64[S, n].
        draws: For each of `COMPARED` the bootstrap's means over seeds and episodes.
    """

    cell: Cell
    entrant: Entrant
    reference: str
    against: Entry
    differences: dict[str, Floats]
    draws: dict[str, Draws]


@dataclass
class Tables:
    """The tables of a result, rows as dictionaries."""

    figures: list[Row]
    compared: list[Row]
    pools: list[Row]
    headroom: list[Row]
    zero_shot: list[Row]


def make_tables(
    cells: Sequence[Cell], entries: Sequence[Entry], results: Results, bootstrap: Bootstrap
) -> Tables:
    """Compute all figures of a benchmark.

    Args:
        cells: What was played.
        entries: Who played.
        results: By names of cell and policy.
        bootstrap: Where the intervals come from.

    Raises:
        InputError: No rule was played.
    """
    figures: list[Row] = []
    comparisons: list[Comparison] = []
    for number, cell in enumerate(cells):
        played = [entry for entry in entries if (cell.name, entry.name) in results]
        figures += _figures(cell, played, results, bootstrap, number)
        best = best_rules(cell, played, results)
        comparisons += _comparisons(cell, played, results, best, bootstrap, number)
    compared = [_compared_row(one, bootstrap.seed) for one in comparisons]
    adjust(compared)
    pools = _pools(comparisons, results, bootstrap)
    adjust([row for row in pools if row["load"] is not None])
    headroom = _headroom(cells, entries, results, bootstrap)
    zero_shot = _zero_shot(cells, entries, results, bootstrap)
    return Tables(figures, compared, pools, headroom, zero_shot)


def entrants(entries: Iterable[Entry]) -> list[Entrant]:
    """Return the learned policies, each seed alone and, where there are several, all together.

    Those that were trained for some cells do not compete: the others are compared with them.
    """
    found = []
    for group, members in _groups(entries).items():
        if members[0].trained_for:
            continue
        if len(members) > 1:
            found.append(Entrant(group, tuple(members)))
        found += [Entrant(entry.name, (entry,)) for entry in members]
    return found


def _groups(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Return the training seeds of each learned policy."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind == "learned":
            groups.setdefault(entry.group, []).append(entry)
    return groups


def best_rules(cell: Cell, played: Sequence[Entry], results: Results) -> dict[str, Entry]:
    """Return the best entry of each reference on a cell by goodput, then by latency.

    Raises:
        InputError: No rule was played.
    """

    def standing(entry: Entry) -> tuple[float, float]:
        numbers = results[cell.name, entry.name].numbers
        return mean(numbers["goodput"]), -mean(numbers["norm_latency"])

    rules = [entry for entry in played if entry.kind == "rule"]
    if not rules:
        raise InputError(f"no rule plays cell {cell.name}", "name rules among --policies")
    found = {}
    for reference in (*COMPARATORS, *NAMED):
        ours = [rule for rule in rules if reference in (rule.comparator, rule.rule)]
        if ours:
            found[reference] = max(ours, key=standing)
    return found


def _figures(
    cell: Cell, played: Sequence[Entry], results: Results, bootstrap: Bootstrap, number: int
) -> list[Row]:
    rows = []
    by_length: dict[int, list[Entry]] = {}
    for entry in played:
        by_length.setdefault(len(results[cell.name, entry.name].episode), []).append(entry)
    for members in by_length.values():
        goodput = [results[cell.name, entry.name].numbers["goodput"] for entry in members]
        draws = bootstrap.cell_means(number, np.stack(goodput, axis=1))
        for k, entry in enumerate(members):
            result = results[cell.name, entry.name]
            found = interval(mean(goodput[k]), draws[:, k])
            rows.append(
                {
                    "cell": cell.name,
                    "policy": entry.name,
                    "episodes": len(result.episode),
                    **{name: mean(result.numbers[name]) for name in NUMBERS},
                    "goodput_low": found.low,
                    "goodput_high": found.high,
                    "longest_wait_max_s": float(result.numbers["longest_wait_s"].max()),
                    "all_ttft_p99_s": ttft_quantile(result.ttft_counts, 0.99),
                }
            )
    return rows


def _comparisons(
    cell: Cell,
    played: Sequence[Entry],
    results: Results,
    best: dict[str, Entry],
    bootstrap: Bootstrap,
    number: int,
) -> list[Comparison]:
    present = {entry.name for entry in played}
    found, columns = [], []
    for entrant in entrants(played):
        if not {entry.name for entry in entrant.entries} <= present:
            continue
        for reference, against in best.items():
            theirs = results[cell.name, against.name].numbers
            differences = {
                name: np.stack(
                    [
                        results[cell.name, e.name].numbers[name] - theirs[name]
                        for e in entrant.entries
                    ]
                )
                for name in COMPARED
            }
            columns += list(differences.values())
            found.append((entrant, reference, against, differences))
    if not found:
        return []
    means = bootstrap.cell_means(number, np.concatenate(columns).T)
    comparisons, first = [], 0
    for entrant, reference, against, differences in found:
        draws = {}
        for name in COMPARED:
            draws[name] = bootstrap.over_seeds(means[:, first : first + len(entrant.entries)])
            first += len(entrant.entries)
        comparisons.append(Comparison(cell, entrant, reference, against, differences, draws))
    return comparisons


def _compared_row(one: Comparison, seed: int) -> Row:
    row: Row = {
        "cell": one.cell.name,
        "policy": one.entrant.name,
        "seeds": len(one.entrant.entries),
        "reference": one.reference,
        "rule": one.against.name,
    }
    for name in COMPARED:
        row |= _interval_columns(name, mean(one.differences[name]), one.draws[name])
    row["p"] = p_value([one.differences["goodput"]], one.draws["goodput"], seed)
    return row


def pools_of(group: str, platform: str, load: float) -> list[tuple[str, str, float | None]]:
    """Return the pools that hold a cell: name, platform and load, where it is of one."""
    if group != "core":
        return [(f"{platform} variations", platform, None)]
    return [
        (f"{platform} {load:g}", platform, load),
        (platform, platform, None),
        ("core", "", None),
    ]


def _pools(comparisons: Sequence[Comparison], results: Results, bootstrap: Bootstrap) -> list[Row]:
    """Pool comparisons by platform and load, by platform, and over core cells and variations."""
    pools: dict[tuple[str, str, float | None, str, str], list[Comparison]] = {}
    for one in comparisons:
        cell = one.cell
        for about in pools_of(cell.group, cell.platform, cell.load):
            pools.setdefault((*about, one.entrant.name, one.reference), []).append(one)
    rows = []
    for (pool, platform, load, policy, reference), members in pools.items():
        row: Row = {
            "pool": pool,
            "platform": platform,
            "load": load,
            "policy": policy,
            "seeds": len(members[0].entrant.entries),
            "reference": reference,
            "cells": len(members),
        }
        draws = {name: np.mean([one.draws[name] for one in members], axis=0) for name in COMPARED}
        for name in COMPARED:
            estimate = mean([mean(one.differences[name]) for one in members])
            row |= _interval_columns(name, estimate, draws[name])
            row[f"{name}_reference"] = mean(
                [mean(results[one.cell.name, one.against.name].numbers[name]) for one in members]
            )
        ours = [(one.cell.name, e.name) for one in members for e in one.entrant.entries]
        theirs = [(one.cell.name, one.against.name) for one in members]
        row["all_ttft_p99_s"] = _pooled_p99(ours, results)
        row["all_ttft_p99_s_reference"] = _pooled_p99(theirs, results)
        differences = [one.differences["goodput"] for one in members]
        row["p"] = p_value(differences, draws["goodput"], bootstrap.seed)
        rows.append(row)
    _mark_stronger(rows)
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    # By policy; what is pooled over most comes first.
    return sorted(rows, key=lambda row: (policies.index(row["policy"]), -row["cells"]))


def _mark_stronger(rows: list[Row]) -> None:
    """Mark, for each pool and policy, the comparator whose best rules have the higher goodput."""
    for row in rows:
        rivals = [
            other
            for other in rows
            if (other["pool"], other["policy"]) == (row["pool"], row["policy"])
            and other["reference"] in COMPARATORS
        ]
        best = max(rivals, key=lambda other: other["goodput_reference"], default=None)
        row["stronger"] = row is best


def _pooled_p99(keys: Sequence[tuple[str, str]], results: Results) -> float:
    return ttft_quantile(np.sum([results[key].ttft_counts for key in keys], axis=0), 0.99)


def _headroom(
    cells: Sequence[Cell], entries: Sequence[Entry], results: Results, bootstrap: Bootstrap
) -> list[Row]:
    """Compare gains over the best rule with those of who knows the future, on its episodes."""
    gains: dict[str, list[tuple[Cell, Floats, Floats]]] = {}
    for cell in cells:
        played = [entry for entry in entries if (cell.name, entry.name) in results]
        bounds = [entry for entry in played if entry.kind == "bound"]
        if not bounds:
            continue
        bound = results[cell.name, bounds[0].name].numbers["goodput"]
        best = best_rules(cell, played, results)
        rule = max(
            (mean(results[cell.name, best[c].name].numbers["goodput"]), best[c].name)
            for c in COMPARATORS
            if c in best
        )[1]
        theirs = results[cell.name, rule].numbers["goodput"][: len(bound)]
        gains.setdefault("", []).append((cell, bound - theirs, bound - theirs))
        for entrant in entrants(played):
            ours = np.mean(
                [
                    results[cell.name, e.name].numbers["goodput"][: len(bound)]
                    for e in entrant.entries
                ],
                axis=0,
            )
            gains.setdefault(entrant.name, []).append((cell, ours - theirs, bound - theirs))
    rows = []
    for policy, members in gains.items():
        rows += [
            _headroom_row(cell.name, policy, [one], bootstrap)
            for one in members
            for cell in one[:1]
        ]
        for platform in dict.fromkeys(cell.platform for cell, _, _ in members):
            mine = [one for one in members if one[0].platform == platform]
            rows.append(_headroom_row(platform, policy, mine, bootstrap))
    return rows


def _headroom_row(
    place: str,
    policy: str,
    members: Sequence[tuple[Cell, Floats, Floats]],
    bootstrap: Bootstrap,
) -> Row:
    """Return gain, head-room and how much of it the gain is, with an interval for the share."""
    draws = np.mean(
        [
            bootstrap.cell_means(k, np.stack([gain, room], axis=1))
            for k, (_, gain, room) in enumerate(members)
        ],
        axis=0,
    )
    gain = mean([mean(one[1]) for one in members])
    room = mean([mean(one[2]) for one in members])
    # The share of a head-room near zero says nothing; gain - half of it always does.
    excess = interval(gain - room / 2, draws[:, 0] - draws[:, 1] / 2)
    room_interval = interval(room, draws[:, 1])
    return {
        "place": place,
        "policy": policy,
        "cells": len(members),
        "episodes": sum(len(one[1]) for one in members),
        "gain": gain,
        "headroom": room,
        "headroom_low": room_interval.low,
        "headroom_high": room_interval.high,
        "share": gain / room if room > 0 else float("nan"),
        "over_half": excess.estimate,
        "over_half_low": excess.low,
        "over_half_high": excess.high,
    }


def _zero_shot(
    cells: Sequence[Cell], entries: Sequence[Entry], results: Results, bootstrap: Bootstrap
) -> list[Row]:
    """Compare goodput with that of policies trained for some of the cells, on these."""
    rows = []
    for against, trained in _groups(entries).items():
        for entrant in entrants(entries) if trained[0].trained_for else []:
            differences, draws = [], []
            for number, cell in enumerate(cells):
                keys = [(cell.name, entry.name) for entry in (*entrant.entries, *trained)]
                if not trained[0].wanted(cell) or any(key not in results for key in keys):
                    continue
                goodput = np.stack([results[key].numbers["goodput"] for key in keys])
                means, split = bootstrap.cell_means(number, goodput.T), len(entrant.entries)
                ours, theirs = means[:, :split], means[:, split:]
                differences.append(mean(goodput[:split]) - mean(goodput[split:]))
                draws.append(bootstrap.over_seeds(ours) - bootstrap.over_seeds(theirs, side=1))
            if differences:
                row = {"policy": entrant.name, "against": against, "cells": len(draws)}
                row |= {"seeds": len(entrant.entries), "seeds_against": len(trained)}
                row |= _interval_columns("goodput", mean(differences), np.mean(draws, axis=0))
                rows.append(row)
    return rows


def adjust(rows: list[Row]) -> None:
    """Add p-values adjusted by Holm's method within each policy and reference."""
    for row in rows:
        row["p_holm"] = row["p"]
    families = {(row["policy"], row["reference"]) for row in rows}
    for family in families:
        mine = [row for row in rows if (row["policy"], row["reference"]) == family]
        for row, p in zip(mine, holm([row["p"] for row in mine]), strict=True):
            row["p_holm"] = float(p)


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Turn rows into columns, with None for NaN and for what a row has not."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [finite(row.get(name)) for row in rows] for name in names}


def rows_of(table: dict[str, list[Any]]) -> list[Row]:
    """Turn columns back into rows."""
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def _interval_columns(name: str, estimate: float, draws: Draws) -> Row:
    found = interval(estimate, draws)
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def mean(values: npt.ArrayLike) -> float:
    """Return the mean of what is not NaN."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    return float(array.mean()) if array.size else float("nan")
