"""`write_report`: the errors of all runs of a folder, as JSON and as one page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmrl.deploy.validate import figures
from mmrl.deploy.validate.compare import Compared, compare_folder, write_errors
from mmrl.files import atomic_write
from mmrl.pages import render_page

PAGE = "report.html"
TEMPLATE = Path(__file__).parent / "templates" / "fidelity.html"
# Name of a metric: what it is called, what its numbers are multiplied with, digits and unit.
LABELS: dict[str, tuple[str, float, int, str]] = {
    "ttft_mean_s": ("TTFT mean", 1e3, 1, "ms"),
    "ttft_p99_s": ("TTFT p99", 1e3, 1, "ms"),
    "tpot_mean_s": ("TPOT mean", 1e3, 2, "ms"),
    "e2e_mean_s": ("E2E mean", 1e3, 1, "ms"),
    "load_mean_s": ("load mean", 1e3, 1, "ms"),
    "loads": ("loads", 1, 0, ""),
    "preemptions": ("preemptions", 1, 0, ""),
    "evictions": ("idle evictions", 1, 0, ""),
    "outs": ("put out", 1, 0, ""),
    "kv_dropped": ("KV dropped", 1, 0, ""),
    "load_bytes": ("bytes loaded", 1e-9, 2, "GB"),
    "stream_bytes": ("bytes streamed", 1e-9, 2, "GB"),
    "kv_save_bytes": ("KV saved", 1e-9, 3, "GB"),
    "kv_restore_bytes": ("KV restored", 1e-9, 3, "GB"),
    "decode_step": ("decode step", 1e3, 3, "ms"),
    "prefill_step": ("prefill step", 1e3, 3, "ms"),
    "streamed_step": ("streamed step", 1e3, 3, "ms"),
}


def write_report(folder: Path, says: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Compare all runs of a folder, write ``report.json`` and ``report.html`` there.

    Args:
        folder: Of recordings.
        says: Told the name of each run before it is played.

    Returns:
        The content of ``report.json``.

    Raises:
        InputError: The folder holds no recordings, or one cannot be read.
    """
    runs, found = compare_folder(folder, says)
    write_errors(folder, found)
    with atomic_write(folder / PAGE) as file:
        file.write(render(runs, found))
    return found


def render(runs: Sequence[Compared], found: dict[str, Any]) -> str:
    """Return the page.

    Args:
        runs: The runs with their simulations.
        found: The content of ``report.json``.
    """
    from mmrl.metrics import episode_metrics

    first = runs[0].recording.header
    worst, missed = _verdict(found)
    sections = []
    for run, report in zip(runs, found["runs"], strict=True):
        sections.append(
            {
                "report": report,
                "goodput": episode_metrics(run.live.s, run.live.r)["goodput"],
                "duration_s": float(run.live.s.now_ns) * 1e-9,
                "cdfs": figures.cdfs(run),
                "scatters": figures.scatters(run),
                "steps": figures.step_curves(run),
                "timelines": figures.timelines(run),
            }
        )
    provenance = first["provenance"]
    return render_page(
        TEMPLATE,
        {
            "measure": measure,
            "percent": percent,
            "points": points,
            "error": error,
            "about_log": about_log,
        },
        title="mmrl: the simulator against the live node",
        date=provenance["time"][:10],
        lead=worst,
        more=missed,
        found=found,
        labels=LABELS,
        sections=sections,
        facts=[
            ("device", first["device"]),
            ("models", ", ".join(_model(model) for model in first["models"])),
            ("memory", f"{first['numbers']['budget_bytes'] / 1e9:.1f} GB"),
            ("when", provenance["time"]),
            ("command", provenance["command"]),
            ("commit", provenance["commit"] or "not in a git tree"),
            ("versions", ", ".join(f"{a} {b}" for a, b in provenance["versions"].items())),
        ],
    )


def lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table for the console: run, metric, live, simulated, error, ..."""
    table: list[tuple[str, ...]] = []
    for report in found["runs"]:
        for row in report["overall"]:
            if row["live"] is not None or row["simulated"] is not None:
                table.append(
                    (
                        report["run"],
                        LABELS[row["metric"]][0],
                        measure(row["live"], row["metric"]),
                        measure(row["simulated"], row["metric"]),
                        error(row),
                        "" if row["target"] is None else f"{row['target'] * 100:g} %",
                        {None: "", True: "met", False: "missed"}[row["met"]],
                    )
                )
        goodput = report["goodput"]
        table.append(
            (
                report["run"],
                "goodput, closed loop",
                f"{goodput['live']:.3f}",
                f"{goodput['mean']:.3f} ± {goodput['sd']:.3f}",
                points(goodput["apart"]),
                "2 points",
                "met" if goodput["met"] else "missed",
            )
        )
    return table


def about_log(report: dict[str, Any]) -> str:
    """Say in a line what became of the live node's verbs in the simulator."""
    log = report["log"]
    return (
        f"{log['verbs']} verbs in the log: {log['done']} done in the simulator, {log['late']} of "
        f"them late (by {log['late_mean_s'] * 1e3:.0f} ms on average), {log['void']} without "
        f"effect, {log['dropped']} never legal"
    )


def measure(value: float | None, metric: str) -> str:
    """Write a number of a metric with its unit."""
    if value is None:
        return "–"
    _, factor, digits, unit = LABELS[metric]
    return f"{value * factor:,.{digits}f} {unit}".strip()


def percent(value: float | None) -> str:
    """Write an error as a percentage with its sign."""
    return "–" if value is None else f"{value * 100:+.1f} %".replace("-", "−")


def error(row: dict[str, Any]) -> str:
    """Write the error of a row; of iterations the median absolute one and the signed one."""
    if row["error"] is None or "bias" not in row:
        return percent(row["error"])
    return f"{row['error'] * 100:.1f} % ({percent(row['bias'])})"


def points(value: float) -> str:
    """Write a difference of shares in points."""
    return f"{value * 100:+.1f} points".replace("-", "−")


def _verdict(found: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the headline and the sentences below it: what is met, and the largest misses."""
    judged = [
        (report["run"], row)
        for report in found["runs"]
        for row in report["overall"]
        if row["met"] is not None
    ]
    met = sum(row["met"] for _, row in judged)
    goodputs = [report["goodput"] for report in found["runs"]]
    lead = f"The simulator meets {met} of {len(judged)} targets against the live node"
    more = [
        f"Goodput, each deciding for itself: at most "
        f"{max(abs(goodput['apart']) for goodput in goodputs) * 100:.1f} points apart in "
        f"{len(goodputs)} {'run' if len(goodputs) == 1 else 'runs'}; policies ranked "
        + ("alike." if all(one["same"] for one in found["ranking"]) else "otherwise.")
    ]
    missed = [(run, row) for run, row in judged if not row["met"]]
    missed.sort(key=lambda one: -abs(one[1]["error"]) / one[1]["target"])
    for run, row in missed[:3]:
        more.append(
            f"Missed: {LABELS[row['metric']][0]} of {run}, {error(row)} where "
            f"{row['target'] * 100:g} % are allowed."
        )
    return lead, more


def _model(model: dict[str, Any]) -> str:
    return f"{model['name']} ({model['profile']['kind']} profile)"
