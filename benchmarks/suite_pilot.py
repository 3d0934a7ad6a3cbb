"""How many episodes a cell of a benchmark needs, from the spread of paired differences.

    python benchmarks/suite_pilot.py v1 --out benchmarks/results/suite_pilot.json

On development episodes that no tuning has seen, strong rules (and learned policies, where named)
play each core cell. The paired difference of goodput to the slack rule has a standard deviation s
per episode; to see a difference d with a two-sided test at 5 % and a power of 80 %, a pool of k
cells needs

    n = (1.960 + 0.842)^2 s^2 / (k d^2)

episodes in each. d is 1 point of goodput for a platform at one load (k = 2 cells) and s the upper
quartile over cells and rivals, so that three of four comparisons are as sharp; the result also
tells which differences the suite's number of episodes shows elsewhere.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mmrl.agents.play import SIDE_BY_SIDE, Piece, play
from mmrl.agents.suite_policies import Entry, entries
from mmrl.files import write_json
from mmrl.rules import get_rule
from mmrl.scenarios.suite import Cell, Suite, get_suite

Z = 1.960 + 0.842
DIFFERENCE, POOLED = 0.01, 2
CHAMPION, RIVALS = "slack", ("partial", "setup-index", "gdsf")
FIRST = 5000  # of the development episodes: behind those of tuning and calibration


def rivals(suite: Suite, cells: list[Cell], names: list[str]) -> list[Entry]:
    """Return the champion and who is compared with it: tuned once, or by default where not."""
    if suite.tuned:
        wanted = [CHAMPION, *RIVALS, *names]
        found = entries(suite, cells, wanted)
        return [entry for entry in found if entry.comparator != "cell"]
    return [
        Entry(
            name,
            "rule",
            opponent=name,
            rule=name,
            params={cell.name: get_rule(name).model_dump() for cell in cells},
        )
        for name in (CHAMPION, *RIVALS)
    ]


def goodput(suite: Suite, cell: Cell, entry: Entry, episodes: int) -> np.ndarray:
    """Return the goodput of each pilot episode."""
    found = []
    for start in range(0, episodes, SIDE_BY_SIDE):
        count = min(SIDE_BY_SIDE, episodes - start)
        indices = tuple(range(FIRST + start, FIRST + start + count))
        scenario = f"{suite.place}:{cell.name}"
        piece = Piece(cell.name, scenario, cell.load, "dev", indices, entry.contender(cell))
        found += [row["goodput"] for row in play(piece).episodes]
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suite")
    parser.add_argument("--policies", default="", help="learned policies to compare, too")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    suite = get_suite(options.suite)
    cells = suite.choose(["core"])
    who = rivals(suite, cells, [name for name in options.policies.split(",") if name])
    rows = []
    for cell in cells:
        played = {
            entry.name: goodput(suite, cell, entry, options.episodes)
            for entry in who
            if entry.plays(cell)
        }
        (champion, base), *others = played.items()
        for name, values in others:
            difference = values - base
            difference = difference[np.isfinite(difference)]
            rows.append(
                {
                    "cell": cell.name,
                    "champion": champion,
                    "rival": name,
                    "difference": round(float(difference.mean()), 5),
                    "sd": round(float(difference.std(ddof=1)), 5),
                }
            )
            print(f"{cell.name:20} {name:24} sd {rows[-1]['sd']:.3f}", flush=True)
    low, sd, high = np.quantile([row["sd"] for row in rows], (0.25, 0.75, 0.9)).tolist()
    needed = Z**2 * sd**2 / (POOLED * DIFFERENCE**2)
    n = suite.spec.episodes
    seen = {f"{k} cells": round(Z * sd / (n * k) ** 0.5, 5) for k in (1, POOLED, 8, 24)}
    result = {
        "suite": suite.name,
        "frozen": suite.frozen.get("suite_hash"),
        "pilot_episodes": options.episodes,
        "sd_lower_quartile": round(low, 5),
        "sd_upper_quartile": round(sd, 5),
        "sd_ninth_decile": round(high, 5),
        "smallest_difference_of_interest": DIFFERENCE,
        "pooled_cells": POOLED,
        "episodes_needed": round(needed, 1),
        "episodes": n,
        "smallest_difference_seen": seen,
        "cells": rows,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "cells"}, indent=2))
    if options.out is not None:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
