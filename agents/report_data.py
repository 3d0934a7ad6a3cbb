"""What a report shows, as plain data: an index that is read at once, and files read when wanted.

A *place* is a scenario or trace that policies were compared on; evaluations of the same place (same
scenario, split and number of episodes, hence the same arrivals) are shown as one. A *cell* is one
policy at one place and load. Tables are columns, names are numbers of the lists beside them.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmrl.agents import runs
from mmrl.agents.contenders import CHAMPION
from mmrl.agents.export import DEFAULT
from mmrl.agents.figures import policy_styles
from mmrl.agents.headline import CHALLENGERS
from mmrl.agents.report_suite import is_suite, read_suite
from mmrl.agents.results import VERSION, Results, family, is_results
from mmrl.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Groups = dict[Any, "pd.DataFrame"]  # by board, load and policy
RANK = ("learned", "live", "step0", "rule", "bound")
METRICS = (
    "goodput",
    "goodput_iqm",
    "goodput_worst_model",
    "norm_latency",
    "ttft_p50_s",
    "ttft_p99_s",
    "longest_wait_s",
    "loads_per_s",
    "preemptions_per_s",
    "decision_us",
    "episodes",
    "requests",
)
LINK = ("load", "stream", "kv_save", "kv_restore")
QUANTILES = (0, 0.01, 0.02, *np.linspace(0.05, 0.95, 19).round(2), 0.98, 0.99, 0.995, 1)
SHOWN = 8  # policies that figures show at first, and runs
POINTS = 160  # of a training curve
RECORDED = ("models", "end_s", "spans", "times_s", "waiting", "queues", "decisions")
CURVES = (  # title, unit, scalar of metrics.csv, the same of the prior rule, factor
    ("Goodput, development episodes", "%", "eval/goodput", "eval/champion_goodput", 100),
    ("Normalised latency, there", "×", "eval/norm_latency", "eval/champion_norm_latency", 1),
    ("TTFT p99, there", "s", "eval/ttft_p99_s", "eval/champion_ttft_p99_s", 1),
    ("Longest wait, there", "s", "eval/longest_wait_s", "eval/champion_longest_wait_s", 1),
    ("Loads, there", "1/s", "eval/loads_per_s", "eval/champion_loads_per_s", 1),
    ("Goodput, training episodes", "%", "serving/goodput", "", 100),
    ("Decisions as the rule suggests", "%", "decisions/as_suggested", "", 100),
    ("Entropy of decisions", "nats", "train/entropy_loss", "", -1),
    ("Explained variance of the critic", "share", "train/explained_variance", "", 1),
)


@dataclass
class Material:
    """What a report is made from.

    Attributes:
        results: Evaluations, by the folder or file they were read from.
        runs: Run folders whose training curves are shown.
    """

    results: dict[Path, Results] = field(default_factory=dict)
    runs: list[Path] = field(default_factory=list)


@dataclass
class Place:
    """A place, and the evaluations that were made there.

    Attributes:
        name: What it is called.
        boards: Each evaluation's source, results and board.
    """

    name: str
    boards: list[tuple[Path, Results, dict[str, Any]]]

    @property
    def first(self) -> dict[str, Any]:
        """The board of the first evaluation: what is said of the place is the same in all."""
        return self.boards[0][2]


class Report:
    """All data of a report.

    Args:
        material: What it is about.

    Attributes:
        places: All places.
        policies: Name, kind and identity of each policy: the rank of kinds decides their order.
    """

    def __init__(self, material: Material) -> None:
        self.material = material
        self.places = _places(material)
        self.policies = _policies(material)
        self._parts: dict[Path, list[Groups]] = {}
        self._number = {identity: k for k, (_, _, identity) in enumerate(self.policies)}

    @property
    def suites(self) -> list[dict[str, Any]]:
        """What frozen benchmarks say over all their cells."""
        every = [results.summary.get("suite") for results in self.material.results.values()]
        return [suite for suite in every if suite is not None]

    @property
    def boards(self) -> list[dict[str, Any]]:
        """The boards of all evaluations; a frozen benchmark's are summed up by its pools."""
        return [
            board
            for place in self.places
            for _, results, board in place.boards
            if "suite" not in results.summary
        ]

    def number(self, source: Path, results: Results, name: str) -> int:
        """Return the number of a policy that an evaluation names."""
        policy = next(p for p in results.summary["policies"] if p["name"] == name)
        return self._number[_identity(source, policy)]

    def index(self) -> dict[str, Any]:
        """Return what the page reads at once, without the names of files."""
        cells = self._cells()
        by_run = {place: name for name, kind, (_, place, _) in self.policies if kind == "learned"}
        trained_by = [by_run.get(_real(run), run.name) for run in self.material.runs]
        # Policies whose training is shown look the same there, and come first; the other runs
        # stand beside no other policies.
        trained = [(name, "learned") for name in trained_by if name in by_run.values()]
        styles = policy_styles([*trained, *((name, kind) for name, kind, _ in self.policies)])
        in_training = policy_styles([*trained, *((name, "learned") for name in trained_by)])
        shown = _shown(self.policies, cells)
        return {
            "policies": [
                {"name": name, "kind": kind, **styles[name]._asdict(), "shown": k in shown}
                for k, (name, kind, _) in enumerate(self.policies)
            ],
            "places": [_about(place) for place in self.places],
            "cells": cells,
            "suites": self.suites,
            "curves": [[title, unit] for title, unit, *_ in CURVES],
            "runs": [
                {
                    "name": run.name,
                    **in_training[name]._asdict(),
                    "shown": k < SHOWN,
                }
                for k, (run, name) in enumerate(zip(self.material.runs, trained_by, strict=True))
            ],
        }

    def _cells(self) -> dict[str, list[Any]]:
        """Return a table with a row per place, load and policy; the first evaluation counts."""
        found: dict[tuple[int, float, int], dict[str, Any]] = {}
        for k, place in enumerate(self.places):
            for source, results, board in place.boards:
                for row in board["rows"]:
                    key = k, row["load"], self.number(source, results, row["policy"])
                    found.setdefault(key, self._cell(key, row, source, results))
        rows = [found[key] for key in sorted(found)]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

    def _cell(
        self, key: tuple[int, float, int], row: dict[str, Any], source: Path, results: Results
    ) -> dict[str, Any]:
        versus = row.get("vs_best_rule", {})
        cell: dict[str, Any] = dict(zip(("place", "load", "policy"), key, strict=True))
        cell |= {name: short(row.get(name)) for name in METRICS}
        cell["interval"] = _shorts(row["goodput_interval"])
        cell["best"] = bool(row["is_best_rule"])
        cell["versus"] = self.number(source, results, versus["policy"]) if versus else None
        cell["difference"] = _shorts(versus.get("goodput"))
        cell["improvement"] = short((versus.get("improvement") or [None])[0])
        cell["p"] = short(versus.get("p_holm"))
        return cell

    def detail(self, place: Place) -> dict[str, Any]:
        """Return what is shown of one place: distributions, decisions, bytes and models."""
        found: dict[str, Any] = {"quantiles": QUANTILES, "latencies": [], "goodput": []}
        found |= {"work": [], "models": []}
        seen: set[tuple[float, int]] = set()
        for source, results, board in place.boards:
            numbers = {
                name: self.number(source, results, name)
                for name in dict.fromkeys(row["policy"] for row in board["rows"])
            }
            fresh = {
                (row["load"], row["policy"]): row
                for row in board["rows"]
                if (row["load"], numbers[row["policy"]]) not in seen
            }
            seen |= {(load, numbers[name]) for load, name in fresh}
            episodes, latencies, models = self._grouped(source, results)
            for (load, name), row in fresh.items():
                key = [load, numbers[name]]
                verbs = {verb: short(rate) for verb, rate in row["verbs_per_min"].items() if rate}
                moved = [short(row[f"{kind}_bytes_per_s"] * 60 / 1e9) for kind in LINK]
                found["work"].append([*key, verbs, moved])
                group = board["name"], load, name
                found["goodput"].append([*key, _sorted_goodput(episodes.get(group))])
                found["latencies"] += [
                    [*key, metric, values] for metric, values in _latencies(latencies.get(group))
                ]
                found["models"] += [
                    [*key, *values] for values in _models(board, load, name, models.get(group))
                ]
        return found

    def _grouped(self, source: Path, results: Results) -> list[Groups]:
        """Return tables of episodes, latencies and models in parts, parted once for all boards."""
        if source not in self._parts:
            tables = results.episodes, results.latencies, results.models
            self._parts[source] = [_groups(table) for table in tables]
        return self._parts[source]

    def episodes(self) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        """Return each recorded episode: what the index says of it, and the recording."""
        seen: set[tuple[int, float, str, int]] = set()
        for k, place in enumerate(self.places):
            for source, results, board in place.boards:
                for entry in results.timelines:
                    if entry["board"] != board["name"]:
                        continue
                    policy = self.number(source, results, entry["policy"])
                    key = k, float(entry["load"]), str(entry["episode"]), policy
                    if key not in seen:
                        seen.add(key)
                        names = "place", "load", "episode", "policy"
                        about = dict(zip(names, key, strict=True))
                        recorded = {name: entry[name] for name in RECORDED if name in entry}
                        yield about | {"why": entry.get("why", "")}, recorded


def gather(sources: Sequence[Path]) -> Material:
    """Read results, and find the runs that their policies come from.

    Args:
        sources: Results folders; their ``summary.json`` alone; benchmark results or their
            ``result.json``; run folders, whose evaluations are found in them; folders of these.

    Raises:
        InputError: A source is none of these, or cannot be read.
    """
    material = Material()
    for source in sources:
        if not source.exists():
            raise InputError(f"there is no {source}", "name a run or a results folder")
        if not _take(source, material):
            inside = [path for path in sorted(source.glob("*/")) if _take(path, material)]
            if not inside:
                raise InputError(
                    f"{source} is neither a run nor results, and holds none",
                    "name what mmrl train or evaluate wrote",
                )
    for results in material.results.values():
        for policy in results.summary["policies"]:
            run = Path(policy["run"]) if policy["run"] else None
            if run is not None and runs.is_run(run):
                _add_run(run, material)
    return material


def curves(run: Path) -> dict[str, list[Any]]:
    """Return the training curves of a run: ``[steps, values, values of the rule]`` by title.

    Empty where it has not logged anything yet; a long curve is thinned.
    """
    import pandas as pd

    try:
        table = pd.read_csv(run / runs.METRICS)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{run / runs.METRICS}: cannot read the log: {error}", "train again"
        ) from error
    found: dict[str, list[Any]] = {}
    for title, _, scalar, of_rule, factor in CURVES:
        if scalar not in table:
            continue
        names = [name for name in (scalar, of_rule) if name in table]
        logged = table[["step", *names]].dropna()
        logged = logged.iloc[_spread(len(logged))]
        values = [[short(factor * value) for value in logged[name]] for name in names]
        found[title] = [logged["step"].tolist(), *values]
    return found


def trained_on(run: Path) -> list[str]:
    """Return the scenarios of a run, as they were named when it began.

    Raises:
        InputError: Its configuration cannot be read.
    """
    path = run / runs.CONFIG
    try:
        return [str(name) for name in json.loads(path.read_text("utf-8"))["scenarios"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the configuration of a run", "train again") from error


def short(value: float | None) -> float | None:
    """Return a number in four digits; None where there is none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}") if abs(value) < 10_000 else round(value)


def _shorts(values: Sequence[float] | None) -> list[float | None] | None:
    return None if values is None else [short(value) for value in values]


def _take(source: Path, material: Material) -> bool:
    """Read a source, if it is one."""
    if source.is_file():
        read = read_suite if is_suite(source) else _summary
        material.results.setdefault(source, read(source))
    elif is_suite(source):
        material.results.setdefault(source, read_suite(source))
    elif is_results(source):
        material.results.setdefault(source, Results.read(source))
    elif runs.is_run(source):
        _add_run(source, material)
        for folder in sorted(source.glob("*/")):
            if is_results(folder):
                material.results.setdefault(folder, Results.read(folder))
    else:
        return False
    return True


def _summary(path: Path) -> Results:
    """Read the summary of results whose tables are not there."""
    import pandas as pd

    try:
        summary = json.loads(path.read_text("utf-8"))
        if summary["version"] != VERSION or not summary["boards"]:
            raise ValueError(f"format {summary['version']}, {len(summary['boards'])} boards")
        if not all("rows" in board and "loads" in board for board in summary["boards"]):
            raise ValueError("a board has no rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not the summary of results: {error}", "name a summary.json of mmrl evaluate"
        ) from error
    return Results(summary, pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), [])


def _add_run(run: Path, material: Material) -> None:
    if not any(run.samefile(other) for other in material.runs):
        material.runs.append(run)


def _places(material: Material) -> list[Place]:
    found: dict[tuple[Any, ...], Place] = {}
    for source, results in material.results.items():
        about = results.summary["provenance"]
        for board in results.summary["boards"]:
            name = board["name"].removesuffix(f", {board['trace']}")
            scenario = about["scenarios"].get(name, str(source))
            # A measurement is not repeated by another.
            live = str(source) if about.get("live") else ""
            trace = about.get("trace_sha256", "") if board["trace"] else ""
            key = board["name"], scenario, trace, about["split"], board["episodes"], live
            place = found.setdefault(key, Place(board["name"], []))
            place.boards.append((source, results, board))
    names = [place.name for place in found.values()]
    for place in found.values():
        if names.count(place.name) > 1:
            source = place.boards[0][0]
            folder = source.parent if runs.is_run(source.parent) else source
            place.name = f"{place.name} ({folder.name})"
    return list(found.values())


def _about(place: Place) -> dict[str, Any]:
    board, provenance = place.first, place.boards[0][1].summary["provenance"]
    notes = dict.fromkeys(note for _, _, board in place.boards for note in board["notes"])
    platform = board.get("platform") or _platform(board["scenario"])
    return {
        "name": place.name,
        "platform": platform,
        "family": board.get("family") or _family(board),
        "main_load": board["main_load"],
        "episodes": board["episodes"],
        "source": f"windows of {board['trace']}"
        if board["trace"]
        else f"unseen {provenance['split']} episodes",
        "notes": list(notes),
    }


def _platform(scenario: str) -> str:
    """Return the platform of a scenario, for results that do not say it."""
    from mmrl.scenarios.registry import get_scenario

    try:
        return ", ".join(get_scenario(scenario).platform)
    except InputError:
        return "unknown"


def _family(board: dict[str, Any]) -> str:
    try:
        return family(board["scenario"], board["trace"])
    except InputError:
        return "unknown"


Identity = tuple[str, str, str]


def _identity(source: Path, policy: dict[str, Any]) -> Identity:
    """Return what makes a policy the same in two evaluations: name, place and files' hash."""
    if policy["kind"] == "live":
        return policy["name"], str(source), ""
    place = policy["run"] or policy["path"]
    if not place or place == DEFAULT:
        return policy["name"], "", ""
    return policy["name"], _real(Path(place)), policy.get("sha256") or ""


def _real(path: Path) -> str:
    return str(path.resolve())


def _policies(material: Material) -> list[tuple[str, str, Identity]]:
    """Return all policies, the learned ones first, each once under a name of its own."""
    kinds: dict[Identity, str] = {}
    for source, results in material.results.items():
        for policy in results.summary["policies"]:
            kinds.setdefault(_identity(source, policy), policy["kind"])
    origins = {identity[:2] for identity in kinds}
    names = [name for name, _ in origins]
    found: list[tuple[str, str, Identity]] = []
    for identity, kind in kinds.items():
        name, origin, _ = identity
        if names.count(name) > 1 and origin:
            path = Path(origin)
            name = f"{name} ({path.parent.name if path.name == name else path.name})"
        same = sum(other.partition(" #")[0] == name for other, _, _ in found)
        found.append((f"{name} #{same + 1}" if same else name, kind, identity))
    return sorted(found, key=lambda policy: RANK.index(policy[1]))


def _shown(policies: list[tuple[str, str, Identity]], cells: dict[str, list[Any]]) -> set[int]:
    """Choose what figures show at first: the champion, the best rules, and the best learned."""
    if len(policies) <= SHOWN:
        return set(range(len(policies)))
    best = {p for p, is_best in zip(cells["policy"], cells["best"], strict=True) if is_best}
    chosen = {k for k, (name, _, _) in enumerate(policies) if name == CHAMPION} | best
    gains: dict[int, list[float]] = {}
    for policy, difference in zip(cells["policy"], cells["difference"], strict=True):
        if policies[policy][1] in CHALLENGERS:
            gains.setdefault(policy, []).append(difference[0] if difference else 0.0)
    # Gains at other places cannot be compared: who played at the most comes first.
    order = sorted(gains, key=lambda k: (-len(gains[k]), -sum(gains[k]) / len(gains[k])))
    chosen |= set(order[: max(SHOWN // 2, SHOWN - len(chosen))])
    rules = [k for k, (_, kind, _) in enumerate(policies) if kind == "rule" and k not in chosen]
    return chosen | set(rules[: max(0, SHOWN - len(chosen))])


def _groups(table: "pd.DataFrame") -> Groups:
    """Return the rows of each board, load and policy."""
    if table.empty:
        return {}
    return dict(iter(table.groupby(["board", "load", "policy"], sort=False)))


def _latencies(part: "pd.DataFrame | None") -> Iterable[tuple[str, list[float | None]]]:
    if part is None:
        return
    for metric, mine in part.groupby("metric", sort=False):
        values = np.interp(QUANTILES, mine["quantile"], mine["value"])
        yield str(metric), [short(value) for value in values.tolist()]


def _models(
    board: dict[str, Any], load: float, policy: str, part: "pd.DataFrame | None"
) -> list[list[Any]]:
    """Return name, requests and goodput of each model; the board knows them at its main load."""
    if load == board["main_load"]:
        mine = [entry for entry in board["models"] if entry["policy"] == policy]
        return [[one["model"], one["requests"], short(one["goodput"])] for one in mine]
    if part is None:
        return []
    part = part[part.requests > 0]
    named = part.model.isin([entry["model"] for entry in board["models"]])
    names = part.model.where(named, part.model.str.partition("#")[0])  # of a drawn fleet
    met = (part.goodput * part.requests).groupby(names, sort=False).sum()
    requests = part.requests.groupby(names, sort=False).sum()
    return [[name, int(requests[name]), short(met[name] / requests[name])] for name in met.index]


def _sorted_goodput(part: "pd.DataFrame | None") -> list[float | None]:
    if part is None:
        return []
    return [short(value) for value in np.sort(part.goodput.dropna().to_numpy()).tolist()]


def _spread(length: int) -> npt.NDArray[np.int64]:
    """Return the places of at most `POINTS` rows, the first and the last among them."""
    return np.unique(np.linspace(0, max(0, length - 1), min(length, POINTS)).round().astype(int))
