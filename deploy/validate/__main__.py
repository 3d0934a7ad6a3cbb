"""Measure without the command line's libraries: ``python -m mmrl.deploy.validate``.

For machines that have only what serves; the report is made elsewhere, by ``mmrl validate report``.
"""

import argparse
import sys
from pathlib import Path

from mmrl.deploy.validate.measure import DURATION_S, Plan, measure, read_fleet
from mmrl.errors import MmrlError


def main() -> int:
    """Make the runs that the arguments ask for; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mmrl.deploy.validate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("models", nargs="+", metavar="CONFIG.toml | MODEL")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--memory", help="device memory for everything, as in 40GB")
    parser.add_argument("--profiles", help="folder of measured profiles")
    parser.add_argument("--policies", nargs="+", default=["slack", "lru"])
    parser.add_argument("--loads", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--duration", type=float, default=DURATION_S, help="seconds of a run")
    parser.add_argument("--rate", type=float, help="requests per second at load 1")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        plan = Plan(
            read_fleet(given.models, given.device, given.memory, given.profiles),
            tuple(given.policies),
            tuple(given.loads),
            given.duration,
            given.seed,
            given.rate,
        )
        measure(plan, given.out, lambda words: print(words, flush=True))
    except MmrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
