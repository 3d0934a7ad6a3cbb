"""The sentence above a report: who won, by how much, and how sure it is; true also of a loss."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Verdict = Literal["wins", "ties", "loses"]
CHALLENGERS = ("learned", "live")  # kinds of policies that are held against the rules


class Headline(NamedTuple):
    """What a board says.

    Attributes:
        title: Who is better, and by how much.
        detail: The levels behind it and the interval.
    """

    title: str
    detail: str


def verdict(interval: Sequence[float]) -> Verdict:
    """Return what an interval of a difference (estimate, low, high) says; ours minus theirs."""
    _, low, high = interval
    if low > 0:
        return "wins"
    return "loses" if high < 0 else "ties"


def headlines(board: dict[str, Any]) -> list[Headline]:
    """Return a headline for each learned policy and live run of a board at its main load.

    Without one, the one headline says which rule is best.

    Args:
        board: A board of ``summary.json``.
    """
    rows = [row for row in board["rows"] if row["load"] == board["main_load"]]
    learned = [row for row in rows if row["kind"] in CHALLENGERS]
    best = next((row for row in rows if row["is_best_rule"]), None)
    where = f"on {board['name']} at load {board['main_load']:g}"
    if learned and best:
        rules = sum(row["kind"] == "rule" for row in rows)
        return [_against(row, best, rules, where) for row in learned]
    top = best or max(rows, key=lambda row: row["goodput"] or 0.0)
    levels = f"Goodput {percent(top['goodput'])}, mean of {top['episodes']} episodes."
    if len(rows) == 1:
        return [Headline(f"{top['policy']} alone {where}: nothing was compared", levels)]
    rules = sum(row["kind"] == "rule" for row in rows)
    compared = f"{rules} hand-written policies" if best else f"{len(rows)} policies"
    return [Headline(f"{top['policy']} is the best of {compared} {where}", levels)]


def _against(row: dict[str, Any], best: dict[str, Any], rules: int, where: str) -> Headline:
    name, rule = row["policy"], best["policy"]
    interval = row["vs_best_rule"]["goodput"]
    title = "the best hand-written policy" if rules > 1 else "a hand-written policy"
    levels = f"Goodput {percent(row['goodput'])} against {percent(best['goodput'])} of {rule}"
    if interval is None:
        return Headline(f"{name} and {rule} cannot be compared {where}", "No episode had requests.")
    levels += f", the best of {rules} rules" if rules > 1 else ""
    if "vs_step0" in row and row["vs_step0"]["goodput"] is not None:
        gain = row["vs_step0"]["goodput"]
        levels += f"; before training {percent(row['goodput'] - gain[0])}"
        levels += ", in every episode the same" if not any(gain) else ""
    detail = (
        f"{levels}; difference {points(interval[0])} points, 95 % interval {points(interval[1])} "
        f"to {points(interval[2])}, {row['episodes']} paired episodes."
    )
    if row["kind"] == "live":
        detail += f" {name} was measured on a server, the rules were simulated."
    size = f"by {abs(interval[0]) * 100:.1f} points of goodput"
    found = verdict(interval)
    if found == "wins":
        return Headline(f"{name} beats {title}, {rule}, {size} {where}", detail)
    if found == "loses":
        return Headline(f"{name} loses to {title}, {rule}, {size} {where}", detail)
    return Headline(f"{name} and {title}, {rule}, cannot be told apart {where}", detail)


def overall(boards: Sequence[dict[str, Any]]) -> list[Headline]:
    """Return what all boards say together, at all their loads; the first one is the title.

    Args:
        boards: Boards of ``summary.json``.
    """
    if len(boards) == 1 and len(found := headlines(boards[0])) == 1:
        return found
    rows = [row for board in boards for row in board["rows"] if row["kind"] in CHALLENGERS]
    intervals = [row["vs_best_rule"]["goodput"] for row in rows if "vs_best_rule" in row]
    intervals = [interval for interval in intervals if interval is not None]
    if not intervals:
        return [headline for board in boards for headline in headlines(board)]
    counts = dict.fromkeys(("wins", "ties", "loses"), 0)
    for interval in intervals:
        counts[verdict(interval)] += 1
    names = list(dict.fromkeys(row["policy"] for row in rows))
    who = names[0] if len(names) == 1 else f"{len(names)} learned policies"
    if any(row["kind"] == "live" for row in rows) and len(names) > 1:
        who = f"{len(names)} learned policies and live runs"
    beats, loses = ("beats", "loses") if len(names) == 1 else ("beat", "lose")
    ahead = sorted(interval[0] for interval in intervals)
    title = (
        f"{who} {beats} the best hand-written policy in {counts['wins']} of "
        f"{len(intervals)} comparisons and {loses} in {counts['loses'] or 'none'}"
    )
    if counts["loses"] and not counts["wins"]:
        title = (
            f"{who} {loses} to the best hand-written policy in {counts['loses']} of "
            f"{len(intervals)} comparisons and {beats} it in none"
        )
    if not counts["wins"] and not counts["loses"]:
        title = (
            f"{who} and the best hand-written policies cannot be told apart "
            f"in any of {len(intervals)} comparisons"
        )
    detail = (
        f"A comparison is one policy at one place and load; in {counts['ties']} the 95 % interval "
        f"holds zero. Differences of goodput: {points(ahead[0])} to {points(ahead[-1])} points, "
        f"median {points(ahead[len(ahead) // 2])}."
    )
    return [Headline(title, detail)]


def percent(share: float | None) -> str:
    """Write a share as a percentage, ``–`` where there is none."""
    return "–" if share is None else f"{share * 100:.1f} %"


def points(difference: float | None) -> str:
    """Write a difference of shares in points, with its sign and a true minus."""
    if difference is None:
        return "–"
    text = f"{difference * 100:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")
