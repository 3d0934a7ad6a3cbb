"""Freeze a benchmark suite: the one command behind its rates, tuned rules and cell hashes.

    python benchmarks/suite_freeze.py v1 --workers 16

Runs on the profiles as they are, in processes; interrupted, the same command goes on. The budget of
the tuning stands in the suite's file. The frozen and the tuned file are written beside it.
"""

import argparse
import os
import time

from mmrl.agents.suite_freeze import freeze, tuning_jobs
from mmrl.scenarios.suite import get_suite


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suite", help="name of a suite, or its .toml file")
    parser.add_argument("--cells", default="", help="patterns of cells; all unless given")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    only = [name for name in options.cells.split(",") if name]
    jobs, begun = len(tuning_jobs(get_suite(options.suite), only)), time.monotonic()
    print(f"{jobs} tunings in all, those that are there not repeated", flush=True)

    def told(what: str, number: int, total: int) -> None:
        minutes = (time.monotonic() - begun) / 60
        print(f"{minutes:6.1f} min  {number}/{total}  {what}", flush=True)

    suite = freeze(options.suite, options.workers, told, only)
    print(f"frozen: suite {suite.name}, hash {suite.hash}")


if __name__ == "__main__":
    main()
