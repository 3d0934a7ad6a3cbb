"""The sentence above a report: who won, by how much, and how sure it is; true also of a loss.

Where episodes are too few, or policies do equally well, nobody is said to have won.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

from mmrl.agents.results import FEWEST

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

    Without one, or without a rule, the one headline says who is best.

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
    return [_among(rows, best, where)]


def _among(rows: list[dict[str, Any]], best: dict[str, Any] | None, where: str) -> Headline:
    """Say which rule is best, or without rules, which nobody is paired with, whose goodput is."""
    top = best or max(rows, key=lambda row: row["goodput"] or 0.0)
    others = [row for row in rows if row is not top and (best is None or row["kind"] == "rule")]
    episodes = _paired(others[0]) if others else top["episodes"]
    levels = f"Goodput {percent(top['goodput'])}, mean of {counted(episodes)}."
    if not others:
        rest = "nothing" if len(rows) == 1 else "no other rule"
        return Headline(f"{top['policy']} alone {where}: {rest} was compared", levels)
    compared = f"{len(rows)} policies"
    if best:
        compared = f"{len(others) + 1} hand-written policies"
    if episodes < FEWEST:
        return Headline(f"{compared} {where}: {_too_few(others[0])}", levels)
    equal = [row["policy"] for row in others if _is_equal(row, top)]
    if equal:
        names = f"{', '.join([top['policy'], *equal[:-1]])} and {equal[-1]}"
        title = f"{names} cannot be told apart, the best of {compared} {where}"
    elif best:
        title = f"{top['policy']} is the best of {compared} {where}"
    else:
        title = f"{top['policy']} has the highest goodput of {compared} {where}"
    return Headline(title, levels)


def _is_equal(row: dict[str, Any], top: dict[str, Any]) -> bool:
    """Whether a policy cannot be told from the best; unpaired, whether the same is printed."""
    if "vs_best_rule" in row:
        return verdict(row["vs_best_rule"]["goodput"]) == "ties"
    return percent(row["goodput"]) == percent(top["goodput"])


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
        levels += ", in every episode the same" if gain == [0, 0, 0] else ""
    few = _paired(row) < FEWEST
    about = "" if few else f", 95 % interval {points(interval[1])} to {points(interval[2])}"
    detail = (
        f"{levels}; difference {points(interval[0])} points{about}, "
        f"{counted(_paired(row), 'paired episode')}."
    )
    if row["kind"] == "live":
        detail += f" {name} was measured on a server, the rules were simulated."
    if few:
        return Headline(f"{name} and {title}, {rule}, {where}: {_too_few(row)}", detail)
    size = f"by {abs(interval[0]) * 100:.1f} points of goodput"
    found = verdict(interval)
    if found == "wins":
        return Headline(f"{name} beats {title}, {rule}, {size} {where}", detail)
    if found == "loses":
        return Headline(f"{name} loses to {title}, {rule}, {size} {where}", detail)
    return Headline(f"{name} and {title}, {rule}, cannot be told apart {where}", detail)


def _paired(row: dict[str, Any]) -> int:
    """Return of how many episodes a policy's difference to the best rule is the mean."""
    return int(row.get("vs_best_rule", {}).get("episodes", row["episodes"]))


def _too_few(row: dict[str, Any]) -> str:
    return f"too few episodes to tell ({_paired(row)} of at least {FEWEST})"


def overall(boards: Sequence[dict[str, Any]]) -> list[Headline]:
    """Return what all boards say together, at all their loads; the first one is the title.

    Args:
        boards: Boards of ``summary.json``.
    """
    if len(boards) == 1 and len(found := headlines(boards[0])) == 1:
        return found
    rows = [row for board in boards for row in board["rows"] if row["kind"] in CHALLENGERS]
    compared = [row for row in rows if row.get("vs_best_rule", {}).get("goodput") is not None]
    told = [row for row in compared if _paired(row) >= FEWEST]
    if not told:
        return [headline for board in boards for headline in headlines(board)]
    intervals = [row["vs_best_rule"]["goodput"] for row in told]
    counts = Counter(map(verdict, intervals))
    names = list(dict.fromkeys(row["policy"] for row in told))
    who = names[0] if len(names) == 1 else f"{len(names)} learned policies"
    if any(row["kind"] == "live" for row in told) and len(names) > 1:
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
        f"median {points(median(ahead))}."
    )
    if len(told) < len(compared):
        detail += f" {len(compared) - len(told)} more have too few episodes to tell."
    return [Headline(title, detail)]


def counted(number: int, what: str = "episode") -> str:
    """Write a number of things."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def percent(share: float | None) -> str:
    """Write a share as a percentage, ``–`` where there is none."""
    return "–" if share is None else f"{share * 100:.1f} %"


def points(difference: float | None) -> str:
    """Write a difference of shares in points, with its sign and a true minus."""
    if difference is None:
        return "–"
    text = f"{difference * 100:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")
