"""How long a report of 50 runs takes to write and to open: made-up runs, a real browser.

    PYTHONPATH=. python benchmarks/report_page.py [--runs 50] [--out benchmarks/results/report.json]

Each run has logged 400 rows and was evaluated on three scenarios at four loads. Opening is measured
from the navigation to the verdict on the screen, and to the last figure in view; the best and the
median of several times, each in a page of its own.
"""

import argparse
import csv
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from mmrl.agents.evaluate import evaluate
from mmrl.agents.report import write_report
from mmrl.agents.report_data import CURVES
from mmrl.agents.results import Results
from mmrl.files import write_json
from tests.agents.made_up import make_run
from tests.deploy.browser import Browser, find

SCENARIOS = ("h200-24", "fast", "slow")
LOADS = (0.5, 0.8, 1.0, 1.3)
RULES = ("slack", "gdsf", "lru", "full-swap")
ROWS = 400
TIMES = 5
VERDICT = "document.querySelectorAll('#verdicts tbody tr').length > 0"
DRAWN = (
    "typeof drawn !== 'undefined' && window.Plotly"
    " && [...drawn.values()].some((figure) => figure.visible)"
    " && [...drawn.values()].every((figure) => !figure.visible || figure.plot.data)"
)


def make_runs(folder: Path, count: int) -> None:
    """Write runs: one real evaluation, told again of other runs with other goodput."""
    first = make_run(folder / "first")
    results = evaluate([f"learned={first}", *RULES], SCENARIOS, loads=LOADS, episodes=4)
    shutil.rmtree(first)
    rng = np.random.default_rng(0)
    for k in range(count):
        run = make_run(folder / f"run-{k}")
        log(run, rng)
        tell_again(results, run, float(rng.normal(0.0, 0.01))).write(run / "evaluation")


def log(run: Path, rng: np.random.Generator) -> None:
    """Write a training's log of the usual length."""
    scalars = [name for _, _, *pair, _ in CURVES for name in pair if name]
    values = rng.normal(0.8, 0.05, (ROWS, len(scalars)))
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *scalars])
        writer.writerows([16_384 * k, *row] for k, row in enumerate(values.tolist()))


def tell_again(results: Results, run: Path, better: float) -> Results:
    """Return results as those of another run."""
    summary = json.loads(json.dumps(results.summary))
    for policy in summary["policies"]:
        policy["run"] = policy["run"] and str(run)
    for board in summary["boards"]:
        for row in board["rows"]:
            if row["kind"] == "learned":
                row["goodput"] = min(1.0, row["goodput"] + better)
    tables = results.episodes, results.models, results.latencies
    return Results(summary, *tables, results.timelines)


def opening(page: Path) -> tuple[float, float]:
    """Return the seconds to the verdict and to the last figure in view, of a browser just begun."""
    path = find()
    assert path is not None, "no Chromium is installed"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(path, Path(profile))
        try:
            browser.size(1400, 1000)
            began_s = time.perf_counter()
            browser.call("Page.navigate", url=page.as_uri())
            browser.until(VERDICT)
            verdict_s = time.perf_counter() - began_s
            browser.until(DRAWN)
            return verdict_s, time.perf_counter() - began_s
        finally:
            browser.close()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_runs(folder / "runs", options.runs)
        began_s = time.perf_counter()
        page = write_report([folder / "runs"], folder / "report")
        written_s = time.perf_counter() - began_s
        sizes = [path.stat().st_size for path in (folder / "report" / "data").iterdir()]
        opened = [opening(page) for _ in range(TIMES)]
        found = {
            "runs": options.runs,
            "write_s": round(written_s, 2),
            "page_kb": round(page.stat().st_size / 1e3),
            "data_files": len(sizes),
            "data_mb": round(sum(sizes) / 1e6, 1),
            **{
                f"{what}_{how.__name__}_s": round(how(one[k] for one in opened), 2)
                for k, what in enumerate(("verdict", "figures"))
                for how in (min, median)
            },
        }
    print(json.dumps(found, indent=2))
    if options.out:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
