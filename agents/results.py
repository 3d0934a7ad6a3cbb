"""`Results`: what an evaluation found, as tables on disk and as the summary that people read.

A results folder holds ``summary.json`` (figures with intervals, and where they come from),
``episodes.parquet`` and ``models.parquet`` (a row per episode, per episode and model),
``latencies.parquet`` (quantiles over all requests) and ``timelines.json``.
"""

import io
import itertools
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.contenders import Contender
from mmrl.agents.export import policy_hash
from mmrl.agents.play import LATENCIES, Board, Played
from mmrl.errors import InputError
from mmrl.files import atomic_write, finite, refuse_foreign, write_json
from mmrl.scenarios.registry import get_scenario
from mmrl.stats import bootstrap, holm, improvements, iqm, sign_flip_p

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
SUMMARY = "summary.json"
TABLES = ("episodes", "models", "latencies")
FILES = (SUMMARY, "timelines.json", *(f"{name}.parquet" for name in TABLES))
QUANTILES = np.linspace(0, 1, 201)
# Episodes that an interval takes. Of fewer, even differences that all have one sign come about by
# chance more often than 1 in 20 (2 ** (1 - n)), and resampling yields an interval all the same.
FEWEST = 6
MEANS = (  # over episodes
    "goodput",
    "goodput_worst_model",
    "fairness",
    "norm_latency",
    "missed_ttft",
    "missed_tpot",
    "refused",
    "unfinished",
    "requests",
    "loads_per_s",
    "preemptions_per_s",
    "outs_per_s",
    "kv_dropped_per_s",
    "load_bytes_per_s",
    "stream_bytes_per_s",
    "kv_save_bytes_per_s",
    "kv_restore_bytes_per_s",
    "decisions_per_s",
    "gpu_share",
    "link_in_share",
    "illegal_actions",
)


@dataclass
class Results:
    """What an evaluation found.

    Attributes:
        summary: Boards with their rows, policies and provenance.
        episodes: A row per board, load, policy and episode.
        models: A row per model of these.
        latencies: Quantiles of TTFT, TPOT and normalised latency over all requests.
        timelines: Some episodes as some policies played them, see ``mmrl.agents.recording``.
    """

    summary: dict[str, Any]
    episodes: "pd.DataFrame"
    models: "pd.DataFrame"
    latencies: "pd.DataFrame"
    timelines: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write all files; the folder takes its place only when all of them are whole.

        Raises:
            InputError: The folder holds something else, or nothing can be written there.
            MmrlError: The disk is full.
        """
        check_place(folder)
        new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        old = new.with_suffix(".old")
        try:
            for name in TABLES:
                buffer = io.BytesIO()
                getattr(self, name).to_parquet(buffer, index=False, compression="zstd")
                with atomic_write(new / f"{name}.parquet", "wb") as file:
                    file.write(buffer.getvalue())
            with atomic_write(new / "timelines.json") as file:  # thousands of small numbers
                json.dump(self.timelines, file, separators=(",", ":"), allow_nan=False)
            write_json(new / SUMMARY, self.summary)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Read what `write` wrote.

        Raises:
            InputError: It is not a results folder, is empty, or is of another version.
        """
        import pandas as pd

        remedy = "evaluate again: mmrl evaluate"
        try:
            summary = json.loads((folder / SUMMARY).read_text("utf-8"))
            version = summary["version"]
            if version != VERSION:
                raise InputError(
                    f"{folder} was written by another version of mmrl (format {version}, "
                    f"this one reads {VERSION})",
                    remedy,
                )
            tables = [pd.read_parquet(folder / f"{name}.parquet") for name in TABLES]
            timelines = json.loads((folder / "timelines.json").read_text("utf-8"))
        except FileNotFoundError:
            # All are there again where another process put new results in their place just now.
            missing = next((n for n in FILES if not (folder / n).is_file()), SUMMARY)
            raise InputError(f"{folder} holds no results: {missing} is missing", remedy) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: cannot read the results: {error}", remedy) from error
        if not summary["boards"] or tables[0].empty:
            raise InputError(f"{folder}: the results are empty", remedy)
        episodes, models, latencies = tables
        return cls(summary, episodes, models, latencies, timelines)


def is_results(folder: Path) -> bool:
    """Whether a folder holds results: its summary says so, and not its name alone."""
    return _summary(folder) is not None


def _summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a folder of results; None of any other."""
    try:
        summary = json.loads((folder / SUMMARY).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(summary, dict) and {"version", "boards"} <= summary.keys()
    return summary if ours else None


def check_place(folder: Path, command: str | None = None) -> None:
    """Refuse a place for results that holds anything else: the folder is replaced whole.

    What was measured live cannot be had again, and is never replaced.

    Args:
        folder: It may not be there, or be empty.
        command: The one whose earlier results may be replaced, see `command_line`; None: those
            of any command.

    Raises:
        InputError: It does.
    """
    summary = _summary(folder)
    refuse_foreign(folder, summary is not None, "results")
    if summary is None:
        return
    others = sorted({path.name for path in folder.iterdir()} - set(FILES))
    if others:
        raise InputError(f"{folder} holds {others[0]} beside results", "choose another --out")
    about = summary.get("provenance", {})
    if "live" in about:
        raise InputError(f"{folder} holds results measured live", "choose another --out")
    if command is not None and command != about.get("command"):
        raise InputError(
            f"{folder} holds the results of another command", "choose another --out, or remove it"
        )


def free_place(folder: Path, command: str) -> Path:
    """Return a place for results: the folder, or the first like it with a number that is free.

    Args:
        folder: Where they should stand.
        command: See `check_place`.
    """
    place = folder
    for number in itertools.count(2):
        try:
            check_place(place, command)
            break
        except InputError:
            place = folder.with_name(f"{folder.name}-{number}")
    return place


def collect(
    boards: Sequence[Board],
    contenders: Sequence[Contender],
    played: Sequence[Played],
    decision_us: dict[tuple[str, str], float],
    timelines: list[dict[str, Any]],
    provenance: dict[str, Any],
    seed: int = 0,
) -> Results:
    """Put together what was played.

    Args:
        boards: What was played on.
        contenders: Who played.
        played: What came of it.
        decision_us: Decision latency by names of board and policy.
        timelines: See `Results`.
        provenance: Where the figures come from.
        seed: Of the bootstrap.
    """
    import pandas as pd

    episodes = pd.DataFrame([row for part in played for row in part.episodes])
    models = pd.DataFrame([row for part in played for row in part.models])
    latencies = _quantiles(played)
    order = {contender.name: k for k, contender in enumerate(contenders)}
    kinds = {contender.name: contender.kind for contender in contenders}
    rows = _rows(episodes, latencies, kinds, _started_from(contenders), seed)
    for row in rows:
        row["decision_us"] = decision_us.get((row["board"], row["policy"]))
    summary = {
        "version": VERSION,
        "boards": [_board(board, rows, episodes, models, order) for board in boards],
        "policies": [
            {
                "name": contender.name,
                "kind": contender.kind,
                "path": str(contender.path) if contender.path else None,
                "run": str(contender.run) if contender.run else None,
                "sha256": policy_hash(contender.path) if contender.path else None,
            }
            for contender in contenders
        ],
        "provenance": provenance,
    }
    return Results(finite(summary), episodes, models, latencies, timelines)


def _board(
    board: Board,
    rows: list[dict[str, Any]],
    episodes: "pd.DataFrame",
    models: "pd.DataFrame",
    order: dict[str, int],
) -> dict[str, Any]:
    mine = [row for row in rows if row["board"] == board.name]
    loads = sorted({row["load"] for row in mine})
    main = 1.0 if 1.0 in loads else loads[-1]
    at_main = episodes[(episodes.board == board.name) & (episodes.load == main)]
    return {
        "name": board.name,
        "scenario": board.scenario,
        "trace": board.trace,
        "platform": ", ".join(sorted(at_main.platform.unique())),
        "family": family(board.scenario, board.trace),
        "notes": board.windows[main].notes if board.trace else (),
        "loads": loads,
        "main_load": main,
        "episodes": int(at_main.episode.nunique()),
        "rows": mine,
        "models": _models(models[(models.board == board.name) & (models.load == main)], order),
    }


def family(scenario: str, trace: str) -> str:
    """Name the family of a workload: the recorded trace, or the lengths and the arrivals."""
    if trace or not scenario:
        return trace or "as recorded"
    workload = get_scenario(scenario).workload
    if workload is None:
        return "recorded"
    kinds = workload.lengths.family, workload.arrivals.kind
    return ", ".join("/".join(dict.fromkeys([k] if isinstance(k, str) else k)) for k in kinds)


def _started_from(contenders: Sequence[Contender]) -> dict[str, str]:
    """Name the step-0 policy of each learned policy that has one here."""
    steps = {c.run: c.name for c in contenders if c.kind == "step0"}
    return {c.name: steps[c.run] for c in contenders if c.kind == "learned" and c.run in steps}


def _rows(
    episodes: "pd.DataFrame",
    latencies: "pd.DataFrame",
    kinds: Mapping[str, str],
    started_from: dict[str, str],
    seed: int,
) -> list[dict[str, Any]]:
    """Return a row per board, load and policy: figures, and differences to the best rule."""
    rows = []
    for (board, load), group in episodes.groupby(["board", "load"], sort=False):
        tables = {
            str(policy): table.set_index("episode").sort_index()
            for policy, table in group.groupby("policy")
        }
        rules = [name for name in tables if kinds[name] == "rule"]
        best = max(rules, key=lambda name: _standing(tables[name]), default=None)
        for name in (name for name in kinds if name in tables):
            row = _row(tables[name], seed)
            row |= {"board": board, "load": load, "policy": name, "kind": kinds[name]}
            row["is_best_rule"] = name == best
            if best is not None and name != best:
                row["vs_best_rule"] = {"policy": best} | _compare(tables[name], tables[best], seed)
            step0 = started_from.get(name)
            if step0 in tables:
                row["vs_step0"] = {"policy": step0} | _compare(tables[name], tables[step0], seed)
            rows.append(row)
    by_key = latencies.set_index(["board", "load", "policy", "metric", "quantile"]).value
    for row in rows:
        key = row["board"], row["load"], row["policy"]
        for metric in ("ttft_s", "tpot_s"):
            for q in (50, 99):
                row[f"{metric[:-2]}_p{q}_s"] = float(by_key.get((*key, metric, q / 100), np.nan))
    _adjust(rows)
    return rows


def _standing(table: "pd.DataFrame") -> tuple[float, float]:
    return float(table.goodput.mean()), -float(table.norm_latency.mean())


def _row(table: "pd.DataFrame", seed: int) -> dict[str, Any]:
    goodput = table.goodput.dropna().to_numpy()
    return {
        "episodes": len(table),
        "requests": int(table.requests.sum()),
        **{name: float(table[name].mean()) for name in MEANS if name != "requests"},
        "goodput_interval": _interval(goodput, seed),
        "goodput_iqm": float(iqm(goodput)) if len(goodput) else None,
        "longest_wait_s": float(table.longest_wait_s.max()),
        "verbs_per_min": {
            name.removeprefix("verb_"): float((table[name] / table.elapsed_s).mean() * 60)
            for name in table.columns
            if name.startswith("verb_")
        },
    }


def _compare(ours: "pd.DataFrame", theirs: "pd.DataFrame", seed: int) -> dict[str, Any]:
    """Compare two policies episode by episode; an episode without requests says nothing."""
    both = ours.goodput.notna() & theirs.goodput.notna()
    found: dict[str, Any] = {"episodes": int(both.sum())}
    for metric in ("goodput", "norm_latency"):
        found[metric] = _interval((ours[metric] - theirs[metric]).dropna().to_numpy(), seed)
    better = improvements(ours.goodput[both].to_numpy(), theirs.goodput[both].to_numpy())
    if len(better):
        found["improvement"] = _interval(better, seed)
        difference = (ours.goodput - theirs.goodput)[both].to_numpy()
        found["p"] = sign_flip_p(difference, seed)
    return found


def _adjust(rows: list[dict[str, Any]]) -> None:
    """Adjust the p-values of all differences to the best rules at once (Holm)."""
    compared = [row["vs_best_rule"] for row in rows if "p" in row.get("vs_best_rule", {})]
    for entry, p in zip(compared, holm([entry["p"] for entry in compared]), strict=True):
        entry["p_holm"] = float(p)


def _quantiles(played: Sequence[Played]) -> "pd.DataFrame":
    import pandas as pd

    pooled: dict[tuple[str, float, str], list[Played]] = {}
    for part in played:
        key = part.piece.board, part.piece.load, part.piece.contender.name
        pooled.setdefault(key, []).append(part)
    tables = []
    for (board, load, policy), parts in pooled.items():
        for metric in LATENCIES:
            values = np.concatenate([part.latencies[metric] for part in parts])
            if len(values) == 0:
                continue
            tables.append(
                pd.DataFrame(
                    {
                        "board": board,
                        "load": load,
                        "policy": policy,
                        "metric": metric,
                        "quantile": QUANTILES.round(3),
                        "value": np.quantile(values.astype(np.float64), QUANTILES),
                    }
                )
            )
    return pd.concat(tables, ignore_index=True)


def _models(models: "pd.DataFrame", order: dict[str, int]) -> list[dict[str, Any]]:
    """Return figures per model and policy; of a drawn fleet, per architecture."""
    fleets = models.groupby(["policy", "episode"], sort=False).model.agg(tuple)
    fixed = fleets.nunique() == 1
    table = models.copy()
    if not fixed:
        table["model"] = table.model.str.partition("#")[0]
    names = list(dict.fromkeys(table.model))  # a fixed fleet in its order
    table = table[table.requests > 0]
    found = []
    for model in names if fixed else sorted(names):
        part = table[table.model == model]
        for policy in sorted(part.policy.unique(), key=order.__getitem__):
            mine = part[part.policy == policy]
            weights = mine.requests / mine.requests.sum()
            found.append(
                {
                    "model": model,
                    "policy": policy,
                    "requests": int(mine.requests.sum()),
                    **{
                        name: float((mine[name] * weights).sum())
                        for name in ("goodput", "norm_latency", "ttft_mean_s")
                    },
                    "loads": float(mine.loads.mean()),
                    "preemptions": float(mine.preemptions.mean()),
                    "gpu_share": float(mine.gpu_share.mean()),
                }
            )
    return found


def _interval(values: npt.NDArray[np.float64], seed: int) -> list[float | None] | None:
    """Return a mean and its interval's ends; no ends of too few values, nothing of no value."""
    if len(values) == 0:
        return None
    if len(values) < FEWEST:
        return [float(values.mean()), None, None]
    return list(bootstrap([values], seed=seed))
