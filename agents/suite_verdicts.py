"""`verdicts`: the targets of a learned policy, each met or missed, from the tables of a result.

A target that the cells played do not decide is ``null``, not missed.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from mmrl.agents.suite_policies import COMPARATORS
from mmrl.agents.suite_results import Row

FAST, OTHERS = "fast", ("slow", "consumer")
LEAST_HEADROOM = 0.02  # of a cell whose win counts
WINS = 0.7  # share of these cells
OVER = {"lru": 0.12, "full-swap": 0.50}  # on the fast link at load 1
NOT_WORSE = -0.005
WITHIN = 0.15  # worse than the best rule's at most
HEADROOM_SHARE = 0.5
LOST = -0.01  # at most, against a policy that was trained for the cells


def judge(
    policies: Iterable[str], tables: Mapping[str, Sequence[Row]], whole: Collection[str]
) -> list[Row]:
    """Judge learned policies; a platform of which not all was played decides nothing.

    Args:
        policies: Names, of a group that of the group.
        tables: By name, as in ``result.json``.
        whole: Platforms whose core cells were all played, and often enough.

    Returns:
        See `verdicts`.
    """
    pools, compared = (
        [row for row in tables[name] if row["platform"] in whole] for name in ("pools", "compared")
    )
    headroom = [
        row for row in tables["headroom"] if row["place"] not in {FAST, *OTHERS} - set(whole)
    ]
    others = tables["figures"], headroom, tables["zero_shot"]
    return [row for name in policies for row in verdicts(name, pools, compared, *others)]


def verdicts(
    policy: str,
    pools: Sequence[Row],
    compared: Sequence[Row],
    figures: Sequence[Row],
    headroom: Sequence[Row],
    zero_shot: Sequence[Row],
) -> list[Row]:
    """Judge a learned policy.

    Args:
        policy: Its name, of a group that of the group.
        pools: Rows of the table ``pools``.
        compared: Rows of ``compared``.
        figures: Rows of ``figures``.
        headroom: Rows of ``headroom``.
        zero_shot: Rows of ``zero_shot``.

    Returns:
        A row per target: ``policy``, ``target``, ``met`` (None: not decided by what was played),
        ``value``, ``low``, ``high`` (None without an interval), ``limit`` and ``detail``.
    """
    mine = [row for row in pools if row["policy"] == policy]
    own = [row for row in compared if row["policy"] == policy]
    found = [_wins_pooled(mine), _wins_cells(own, figures, headroom)]
    found += [_over(mine, rule, least) for rule, least in OVER.items()]
    found += [_not_worse(mine, platform) for platform in OTHERS]
    found += [
        _latency(mine),
        _within(mine, "pooled p99 TTFT", _p99),
        _within(mine, "worst-model goodput", _with_reference("goodput_worst_model"), more=True),
        _within(mine, "longest wait", _with_reference("longest_wait_s")),
        _half_of_headroom(policy, headroom),
        *_zero_shot([row for row in zero_shot if row["policy"] == policy]),
    ]
    return [{"policy": policy, **row} for row in found]


def _row(
    target: str,
    met: bool | None,
    value: float | None = None,
    low: float | None = None,
    high: float | None = None,
    limit: float | None = None,
    detail: str = "",
) -> Row:
    return {
        "target": target,
        "met": met,
        "value": value,
        "low": low,
        "high": high,
        "limit": limit,
        "detail": detail,
    }


def _stronger(pools: Sequence[Row], pool: str) -> Row | None:
    """Return the comparison of a pool with the best rules of the stronger comparator."""
    return next((row for row in pools if row["pool"] == pool and row["stronger"]), None)


def _wins_pooled(pools: Sequence[Row]) -> Row:
    target = "fast link, pooled: goodput above the best rule, interval above 0"
    row = _stronger(pools, FAST)
    if row is None:
        return _row(target, None, limit=0.0)
    low, high = row["goodput_low"], row["goodput_high"]
    detail = f"{row['cells']} cells, rules tuned {row['reference']}"
    return _row(target, low > 0, row["goodput"], low, high, 0.0, detail)


def _wins_cells(compared: Sequence[Row], figures: Sequence[Row], headroom: Sequence[Row]) -> Row:
    """Count cells won among core cells of the fast link that have head-room.

    Head-room is what who knows the future gains over the best rule; where nobody of the kind
    played, what is left to a goodput of 1.
    """
    target = f"fast link: cells won of those with {LEAST_HEADROOM * 100:g} points of head-room"
    goodput = {(row["cell"], row["policy"]): row["goodput"] for row in figures}
    known = {row["place"]: row["headroom"] for row in headroom if row["policy"] == ""}
    cells = [row["cell"] for row in compared if row["platform"] == FAST and row["group"] == "core"]
    with_room, won = 0, []
    for cell in dict.fromkeys(cells):
        rows = [r for r in compared if r["cell"] == cell and r["reference"] in COMPARATORS]
        best = max(rows, key=lambda r: float(goodput[cell, r["rule"]]))
        if known.get(cell, 1 - goodput[cell, best["rule"]]) >= LEAST_HEADROOM:
            with_room += 1
            if best["goodput"] > 0:
                won.append(cell)
    if with_room == 0:
        return _row(target, None, limit=WINS)
    share = len(won) / with_room
    detail = f"{len(won)} of {with_room} cells: {', '.join(won) or 'none'}"
    return _row(target, share >= WINS, share, limit=WINS, detail=detail)


def _over(pools: Sequence[Row], rule: str, least: float) -> Row:
    target = f"fast link at load 1: points over {rule}"
    row = _find(pools, f"{FAST} 1", rule)
    if row is None:
        return _row(target, None, limit=least)
    bounds = row["goodput"], row["goodput_low"], row["goodput_high"]
    return _row(target, row["goodput"] >= least, *bounds, least)


def _not_worse(pools: Sequence[Row], platform: str) -> Row:
    target = f"{platform}, pooled: goodput not worse than the best rule, interval above -0.5 points"
    row = _stronger(pools, platform)
    if row is None:
        return _row(target, None, limit=NOT_WORSE)
    low, high = row["goodput_low"], row["goodput_high"]
    detail = f"rules tuned {row['reference']}" + ("; a win" if low > 0 else "")
    return _row(target, low > NOT_WORSE, row["goodput"], low, high, NOT_WORSE, detail)


def _latency(pools: Sequence[Row]) -> Row:
    """Judge latency: no platform's mean is worse, and no load's beyond its interval."""
    target = "normalised latency no worse on any platform or load"
    rows = [row for name in (FAST, *OTHERS) if (row := _stronger(pools, name)) is not None]
    if not rows:
        return _row(target, None, limit=0.0)
    loads = [row for row in pools if row["stronger"] and row["load"] is not None]
    beyond = [row["pool"] for row in loads if row["norm_latency_low"] > 0]
    worst = max(rows, key=lambda row: float(row["norm_latency"]))
    bounds = worst["norm_latency"], worst["norm_latency_low"], worst["norm_latency_high"]
    reference = f"{worst['norm_latency_reference']:.2f}"
    detail = f"worst on {worst['pool']}, where the best rule has {reference}" + (
        f"; worse beyond the interval: {', '.join(beyond)}" if beyond else ""
    )
    return _row(target, worst["norm_latency"] <= 0 and not beyond, *bounds, 0.0, detail)


def _within(
    pools: Sequence[Row], what: str, ours: Callable[[Row], tuple[float, float]], more: bool = False
) -> Row:
    """Judge a tail by its worst platform: at most 15 % worse than the best rule's.

    Args:
        pools: Of the policy.
        what: Which tail.
        ours: Gives the policy's value and the best rule's.
        more: Whether more is better.
    """
    target = f"{what} within 15 % of the best rule on every platform"
    limit = 1 - WITHIN if more else 1 + WITHIN
    found = []
    for name in (FAST, *OTHERS):
        row = _stronger(pools, name)
        values = (math.nan, math.nan) if row is None else ours(row)
        if math.isfinite(values[0]) and values[1] > 0:
            found.append((values[0] / values[1], name))
    if not found:
        return _row(target, None, limit=limit)
    value, name = min(found) if more else max(found)
    met = value >= limit if more else value <= limit
    return _row(target, met, value, limit=limit, detail=f"worst on {name}")


def _p99(row: Row) -> tuple[float, float]:
    return row["all_ttft_p99_s"], row["all_ttft_p99_s_reference"]


def _with_reference(name: str) -> Callable[[Row], tuple[float, float]]:
    """Return what gives a metric of a pool and the best rule's, from their difference."""
    return lambda row: (row[f"{name}_reference"] + row[name], row[f"{name}_reference"])


def _half_of_headroom(policy: str, headroom: Sequence[Row]) -> Row:
    target = "fast link: at least half of the clairvoyant head-room"
    row = next((r for r in headroom if (r["place"], r["policy"]) == (FAST, policy)), None)
    if row is None or row["headroom"] <= 0:
        return _row(target, None, limit=HEADROOM_SHARE)
    detail = (
        f"gain {row['gain'] * 100:+.1f} of {row['headroom'] * 100:.1f} points over "
        f"{row['cells']} cells; gain less half of it {row['over_half_low'] * 100:+.1f} to "
        f"{row['over_half_high'] * 100:+.1f}"
    )
    share = row["share"]
    return _row(target, share >= HEADROOM_SHARE, share, limit=HEADROOM_SHARE, detail=detail)


def _zero_shot(rows: Sequence[Row]) -> list[Row]:
    """Judge what is lost against each policy that was trained there; nothing without one."""
    target = "zero-shot: at most 1 point below a policy trained there"
    found = []
    for row in rows:
        bounds = row["goodput"], row["goodput_low"], row["goodput_high"]
        detail = f"{row['cells']} cells, {row['seeds_against']} training seeds of {row['against']}"
        found.append(_row(target, row["goodput"] >= LOST, *bounds, LOST, detail))
    return found or [_row(target, None, limit=LOST)]


def _find(pools: Sequence[Row], pool: str, reference: str) -> Row | None:
    return next((r for r in pools if (r["pool"], r["reference"]) == (pool, reference)), None)
