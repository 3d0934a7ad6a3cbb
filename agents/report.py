"""`write_report`: one HTML page about evaluations and the runs behind them, readable offline.

Everything the page says is worked out from results folders (``mmrl.agents.results``) and from the
logs of run folders; the template in ``templates/`` only lays it out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrl.agents import figures
from mmrl.agents.contenders import CHAMPION, is_run
from mmrl.agents.headline import headlines, points, verdict
from mmrl.agents.results import Results, is_results
from mmrl.errors import InputError
from mmrl.files import atomic_write
from mmrl.pages import render_page

TEMPLATES = Path(__file__).parent / "templates"


CURVES = (  # title, scalar of metrics.csv, the same of the prior rule, factor
    ("Goodput on development episodes, %", "eval/goodput", "eval/champion_goodput", 100),
    ("Normalised latency there", "eval/norm_latency", "eval/champion_norm_latency", 1),
    ("TTFT p99 there, s", "eval/ttft_p99_s", "eval/champion_ttft_p99_s", 1),
    ("Longest wait there, s", "eval/longest_wait_s", "eval/champion_longest_wait_s", 1),
    ("Loads per second there", "eval/loads_per_s", "eval/champion_loads_per_s", 1),
    ("Goodput of training episodes, %", "serving/goodput", "", 100),
    ("Decisions as the rule suggests, %", "decisions/as_suggested", "", 100),
    ("Entropy of decisions", "train/entropy_loss", "", -1),
    ("Explained variance of the critic", "train/explained_variance", "", 1),
)


@dataclass
class Material:
    """What a report is made from.

    Attributes:
        results: Evaluations, by the folder they were read from.
        runs: Run folders whose training curves are shown.
    """

    results: dict[Path, Results] = field(default_factory=dict)
    runs: list[Path] = field(default_factory=list)


def write_report(sources: Sequence[Path], out: Path) -> Path:
    """Write the report about results folders and run folders, and return its path.

    Args:
        sources: Results folders; run folders, whose evaluations are found in them.
        out: The page to write.

    Raises:
        InputError: A source is neither, or cannot be read.
        MmrlError: The disk is full.
    """
    page = render(gather(sources))
    with atomic_write(out) as file:
        file.write(page)
    return out


def gather(sources: Sequence[Path]) -> Material:
    """Read results, and find the runs that their policies come from.

    Raises:
        InputError: A source is neither results nor a run, or cannot be read.
    """
    material = Material()
    for source in sources:
        if not source.exists():
            raise InputError(f"there is no {source}", "name a run or a results folder")
        if is_results(source):
            material.results.setdefault(source, Results.read(source))
        elif is_run(source):
            material.runs.append(source)
            for folder in sorted(source.glob("*/")):
                if is_results(folder):
                    material.results.setdefault(folder, Results.read(folder))
        else:
            raise InputError(
                f"{source} is neither a run nor results", "name what mmrl train or evaluate wrote"
            )
    for results in material.results.values():
        for policy in results.summary["policies"]:
            run = Path(policy["run"]) if policy["run"] else None
            if run is not None and run.exists() and not any(run.samefile(r) for r in material.runs):
                material.runs.append(run)
    return material


def render(material: Material) -> str:
    """Return the page."""
    filters: dict[str, Callable[..., Any]] = {
        "share": lambda value: "–" if value is None else f"{value * 100:.1f}",
        "points": points,
        "number": _number,
        "cell": lambda value, reach: max(-48.0, min(48.0, value / reach * 48)),
        "p_value": _p_value,
        "heat": lambda value: f"{max(0.0, min(1.0, (1 - value) * 2)):.3f}",
    }
    every = list(material.results.values())
    policies = _policies(every)
    colours = figures.policy_colours(policies)
    boards = [(results, board) for results in every for board in results.summary["boards"]]
    shown = _shown(policies, [board for _, board in boards])
    lead, more = _lead([board for _, board in boards], material.runs)
    curves = {run.name: _curves(run) for run in material.runs}
    curves = {run: found for run, found in curves.items() if found}
    return render_page(
        TEMPLATES / "report.html",
        filters,
        title=f"mmrl: {lead}",
        date=_dates(every),
        lead=lead,
        more=more,
        legend=[
            {"name": name, "colour": colours[name], "shown": name in shown} for name in colours
        ],
        boards=[_board(results, board, colours, shown) for results, board in boards],
        training=figures.training_curves(curves),
        training_about=", ".join(curves),
        missing=_missing(material),
        sources=_sources(material),
    )


def _lead(boards: list[dict[str, Any]], runs: list[Path]) -> tuple[str, list[str]]:
    """Return the headline and the sentences below it."""
    found = [headline for board in boards for headline in headlines(board)]
    if not found:
        return f"Training of {', '.join(run.name for run in runs)}", []
    return found[0].title, [found[0].detail, *(f"{h.title}. {h.detail}" for h in found[1:])]


def _policies(every: list[Results]) -> list[dict[str, Any]]:
    """Return all policies, the learned ones first, each once."""
    rank = {"learned": 0, "step0": 1, "rule": 2, "bound": 3}
    found = {policy["name"]: policy for results in every for policy in results.summary["policies"]}
    return sorted(found.values(), key=lambda policy: rank[policy["kind"]])


def _shown(policies: list[dict[str, Any]], boards: list[dict[str, Any]]) -> list[str]:
    """Choose what figures show at first: what was learned, the best rules and the champion."""
    wanted = {policy["name"] for policy in policies if policy["kind"] != "rule"} | {CHAMPION}
    wanted |= {row["policy"] for board in boards for row in board["rows"] if row["is_best_rule"]}
    names = [policy["name"] for policy in policies]
    chosen = [name for name in names if name in wanted]
    return names if len(names) <= 4 else chosen


def _board(
    results: Results, board: dict[str, Any], colours: dict[str, str], shown: list[str]
) -> dict[str, Any]:
    main = [row for row in board["rows"] if row["load"] == board["main_load"]]
    rows = sorted((_row(row, colours) for row in main), key=lambda row: -(row["goodput"] or 0.0))
    best = next((row["policy"] for row in rows if row["is_best_rule"]), None)
    overview = [figures.profiles(results.episodes, board, colours, shown)]
    if len(board["loads"]) > 1:
        overview.insert(0, figures.load_curves(board, colours, shown))
    recorded = [entry for entry in results.timelines if entry["board"] == board["name"]]
    most = max((max(entry["waiting"]) for entry in recorded), default=0)
    split = results.summary["provenance"]["split"]
    source = f"windows of {board['trace']}" if board["trace"] else f"unseen {split} episodes"
    return {
        "name": board["name"],
        "about": f"{board['episodes']} {source}, load {board['main_load']:g}, "
        f"{sum(model['requests'] for model in board['models']) // max(1, len(rows)):,} requests.",
        "notes": board["notes"],
        "best": best,
        "reach": _reach([row["difference"] for row in rows if row["difference"]]),
        "rows": rows,
        "overview": overview,
        "cdfs": figures.latency_cdfs(results.latencies, board, colours, shown),
        "timelines": [
            figures.timeline(entry, colours, most, max(other["end_s"] for other in recorded))
            for entry in recorded
        ],
        "episode": recorded[0]["episode"] if recorded else "",
        "work": [figures.decision_mix(board), figures.moved_bytes(board)],
        "models": _models(board, [row["policy"] for row in rows]),
    }


def _row(row: dict[str, Any], colours: dict[str, str]) -> dict[str, Any]:
    versus = row.get("vs_best_rule", {})
    difference = versus.get("goodput")
    return row | {
        "colour": colours[row["policy"]],
        "difference": difference,
        "verdict": verdict(difference) if difference else "",
        "improvement": versus.get("improvement", [None])[0],
        "p": versus.get("p_holm"),
    }


def _reach(differences: list[list[float]]) -> float:
    """Return what the edge of the picture of an interval stands for.

    Rules that lose by far would flatten the others: the middle of all decides.
    """
    ends = sorted(max(abs(low), abs(high)) for _, low, high in differences)
    return max(1.5 * ends[len(ends) // 2], 0.005) if ends else 0.01


def _models(board: dict[str, Any], policies: list[str]) -> list[dict[str, Any]]:
    cells = {(entry["model"], entry["policy"]): entry for entry in board["models"]}
    names = dict.fromkeys(entry["model"] for entry in board["models"])
    return [
        {
            "name": name,
            "requests": max(
                cells[name, policy]["requests"] for policy in policies if (name, policy) in cells
            ),
            "cells": [cells.get((name, policy), {}).get("goodput") for policy in policies],
        }
        for name in names
    ]


def _curves(run: Path) -> dict[str, list[figures.Curve]]:
    """Return the training curves of a run, by title; none where it has not logged anything yet."""
    from mmrl.agents.runs import METRICS, read_metrics

    if not (run / METRICS).is_file():
        return {}
    table = read_metrics(run)
    found: dict[str, list[figures.Curve]] = {}
    for title, *scalars, factor in CURVES:
        for scalar, dashed in zip(scalars, (False, True), strict=True):
            if scalar in table:
                logged = table[["step", scalar]].dropna()
                curve = figures.Curve(
                    logged["step"].tolist(), (factor * logged[scalar]).tolist(), dashed
                )
                found.setdefault(title, []).append(curve)
    return found


def _missing(material: Material) -> list[str]:
    """Say what a reader may look for and does not find."""
    lines = []
    if not material.results:
        lines.append(
            "These runs have not been evaluated: mmrl evaluate --policies slack,"
            + ",".join(map(str, material.runs))
        )
    return lines


def _sources(material: Material) -> list[dict[str, Any]]:
    found = []
    for folder, results in material.results.items():
        about = results.summary["provenance"]
        facts = [
            ("when", about["time"]),
            ("command", about["command"]),
            ("commit", about["commit"] or "not in a git tree"),
            ("versions", _pairs(about["versions"])),
            ("machine", _pairs(about["machine"])),
            ("scenarios", _pairs(about["scenarios"])),
            ("episodes", _episodes(about)),
            ("bootstrap", f"10,000 resamples of episodes, seed {about['bootstrap_seed']}"),
        ]
        facts += [
            (policy["name"], policy["path"])
            for policy in results.summary["policies"]
            if policy["path"]
        ]
        found.append({"name": str(folder), "facts": facts})
    return found


def _episodes(about: dict[str, Any]) -> str:
    if "live" in about:  # one, or a trace that is no episode of anything
        return str(about["live"])
    return f"{about['split']} 0 to {about['episodes'] - 1}"


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _dates(every: list[Results]) -> str:
    days = sorted({results.summary["provenance"]["time"][:10] for results in every})
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0")
