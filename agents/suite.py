"""`evaluate_suite`: run a frozen benchmark and write what others can read, submit and verify.

A result folder holds ``result.json`` (all tables, hashes, verdicts; docs/benchmark.md),
``episodes.parquet`` (a row per cell, policy and episode) and ``policies/`` (copies of the learned
policies, so that the folder is a submission).

>>> evaluate_suite("v1", ["runs/mine"], Path("runs/benchmark"), cells=["fast-chat-1.0"])
"""

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrl.agents.export import DESCRIPTION, WEIGHTS
from mmrl.agents.provenance import provenance
from mmrl.agents.results import FEWEST
from mmrl.agents.suite_policies import Entry, entries
from mmrl.agents.suite_results import (
    Results,
    Row,
    Tables,
    columns,
    entrants,
    make_tables,
)
from mmrl.agents.suite_run import Watch, code_hash, plan, play_suite, trace_cells
from mmrl.agents.suite_stats import Bootstrap
from mmrl.agents.suite_verdicts import judge
from mmrl.errors import InputError
from mmrl.files import atomic_write, refuse_foreign, write_json
from mmrl.scenarios.suite import Cell, Suite, get_suite
from mmrl.stats import CONFIDENCE

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
RESULT, EPISODES, POLICIES = "result.json", "episodes.parquet", "policies"
CACHE = "suite-cache"  # beside the result folders


def evaluate_suite(
    suite: str | Path,
    policies: Sequence[str],
    out: Path,
    *,
    cells: Sequence[str] = (),
    traces: Sequence[Path] = (),
    episodes: int | None = None,
    workers: int = 1,
    seed: int = 0,
    watch: Watch = lambda cell, done, total: None,
) -> dict[str, Any]:
    """Play a benchmark and write its result.

    Args:
        suite: Name or path of the suite.
        policies: See ``mmrl.agents.suite_policies.entries``.
        out: Folder of the result; what is played is kept beside it, in ``suite-cache``.
        cells: Patterns of cells; all unless given.
        traces: Files of a recorded trace, played on the suite's fixed fleets besides.
        episodes: Of each cell; the suite's number unless given.
        workers: How many processes.
        seed: Of the bootstrap; what is played is fixed.
        watch: Told the cell, and the episodes played and to play in all.

    Returns:
        The content of ``result.json``.

    Raises:
        InputError: Something named is wrong, a cell is not what was frozen, or the folder holds
            something else, the result of another suite or of policies that do not play now.
        MmrlError: The disk is full.
    """
    found = get_suite(suite)
    check_place(out)
    count = episodes or found.spec.episodes
    if not 1 <= count <= found.spec.episodes:
        raise InputError(
            f"{count} episodes, suite {found.name} has {found.spec.episodes} in a cell",
            "ask for no more",
        )
    chosen = found.choose(list(cells))
    found.check(chosen)
    fitted = trace_cells(found, traces, count) if traces else []
    played = [*chosen, *(cell for cell, _ in fitted)]
    windows = {cell.name: traces_ for cell, traces_ in fitted}
    who = entries(found, played, policies)
    _check_earlier(out, found, who)
    cache = out.resolve().parent / CACHE
    tasks, unsuited = plan(found, played, windows, who, count, cache)
    results = play_suite(found, tasks, workers, watch)
    tables = make_tables(played, who, results, Bootstrap(seed))
    full = not cells and count == found.spec.episodes
    result = document(found, played, who, tables, unsuited, count, full, seed, list(traces))
    write(out, result, episode_table(results), who)
    return result


def document(
    suite: Suite,
    cells: Sequence[Cell],
    who: Sequence[Entry],
    tables: Tables,
    unsuited: Sequence[tuple[str, str]],
    episodes: int,
    full: bool,
    seed: int,
    traces: Sequence[Path],
) -> dict[str, Any]:
    """Put together the content of ``result.json``, but for the hash of the episodes."""
    return {
        "format": FORMAT,
        "suite": suite.place,
        "suite_hash": suite.hash,
        "complete": full,
        "episodes": episodes,
        "code_hash": code_hash(),
        "bootstrap": {"seed": seed, "confidence": CONFIDENCE},
        "cells": columns([_cell_row(cell) for cell in cells]),
        "policies": columns([_policy_row(entry) for entry in who]),
        "params": {entry.name: _short(entry.params) for entry in who if entry.params},
        **{name: columns(rows) for name, rows in tables_of(suite, tables, cells, who).items()},
        "unsuited": columns([{"cell": cell, "policy": policy} for cell, policy in unsuited]),
        "provenance": provenance([], traces=[path.name for path in traces]),
    }


def tables_of(
    suite: Suite, tables: Tables, cells: Sequence[Cell], who: Sequence[Entry]
) -> dict[str, list[Row]]:
    """Return the tables of ``result.json`` by name, the verdicts among them."""
    about = {cell.name: {"platform": cell.platform, "group": cell.group} for cell in cells}
    compared = [{**row, **about[row["cell"]]} for row in tables.compared]
    found = {
        "figures": tables.figures,
        "compared": compared,
        "pools": tables.pools,
        "headroom": tables.headroom,
        "zero_shot": tables.zero_shot,
    }
    whole = whole_platforms(suite, tables.figures)
    return found | {"verdicts": judge([one.name for one in entrants(who)], found, whole)}


def whole_platforms(suite: Suite, figures: Sequence[Row]) -> set[str]:
    """Return the platforms all of whose core cells were played, in `FEWEST` episodes or more."""
    played = {row["cell"] for row in figures if row["episodes"] >= FEWEST}
    core = [cell for cell in suite.cells if cell.group == "core"]
    lacking = {cell.platform for cell in core if cell.name not in played}
    return {cell.platform for cell in core} - lacking


def _cell_row(cell: Cell) -> dict[str, Any]:
    scenario = cell.scenario
    return {
        "cell": cell.name,
        "group": cell.group,
        "platform": cell.platform,
        "platforms": list(scenario.platform),
        "family": cell.family,
        "variation": cell.variation,
        "load": cell.load,
        "utilisation_at_load_1": scenario.utilisation_at_load_1,
        "verbs": scenario.verbs,
        "models": scenario.largest_fleet,
        "split": cell.split,
        "first_episode": cell.first,
        "origin": cell.origin,
        "trace": cell.trace,
        "hash": cell.hash,
    }


def _policy_row(entry: Entry) -> dict[str, Any]:
    return {
        "policy": entry.name,
        "kind": entry.kind,
        "comparator": entry.comparator,
        "opponent": entry.opponent,
        "rule": entry.rule,
        "group": entry.group,
        "seed": entry.seed if entry.kind == "learned" else None,
        "sha256": entry.sha256,
        "folder": f"{POLICIES}/{folder_name(entry)}" if entry.path else "",
    }


def _short(params: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return parameters by cell; those that are the same in all once, under ``*``."""
    first, *others = params.values()
    return params if any(other != first for other in others) else {"*": first}


def folder_name(entry: Entry) -> str:
    """Return where a learned policy is copied to: its name, as far as a folder can have it."""
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in entry.name)
    return f"{plain}-{entry.sha256[:8]}"


def episode_table(results: Results) -> "pd.DataFrame":
    """Return what was measured, a row per cell, policy and episode."""
    import pandas as pd

    parts = []
    for (cell, policy), result in results.items():
        head = {"cell": cell, "policy": policy, "episode": result.episode}
        parts.append(pd.DataFrame({**head, **result.numbers}))
    table = pd.concat(parts, ignore_index=True)
    return table.astype({"cell": "category", "policy": "category"})


def check_place(folder: Path) -> None:
    """Refuse a place for a result that holds something else.

    Raises:
        InputError: It does.
    """
    try:
        ours = "suite_hash" in json.loads((folder / RESULT).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    refuse_foreign(folder, ours, "benchmark result")


def _check_earlier(out: Path, suite: Suite, who: Sequence[Entry]) -> None:
    """Refuse to replace the result of another suite, or of policies that do not play now.

    The folder holds copies of their files, perhaps the only ones.

    Raises:
        InputError: It holds one.
    """
    if not (out / RESULT).is_file():
        return
    earlier = read(out)
    others = set(earlier["policies"]["policy"]) - {entry.name for entry in who}
    if earlier["suite_hash"] != suite.hash or others:
        what = f"of {min(others)}" if others else "of another suite"
        raise InputError(f"{out} holds the result {what}", "choose another --out")


def write(
    out: Path, result: dict[str, Any], episodes: "pd.DataFrame", who: Sequence[Entry]
) -> None:
    """Write a result folder; ``result.json`` comes last and names the hash of the episodes."""
    buffer = io.BytesIO()
    episodes.to_parquet(buffer, index=False, compression="zstd")
    for entry in [entry for entry in who if entry.path is not None]:
        assert entry.path is not None
        for name in (DESCRIPTION, WEIGHTS):
            with atomic_write(out / POLICIES / folder_name(entry) / name, "wb") as file:
                file.write((entry.path / name).read_bytes())
    with atomic_write(out / EPISODES, "wb") as file:
        file.write(buffer.getvalue())
    result["episodes_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_json(out / RESULT, result, indent=None)
    kept = {folder_name(entry) for entry in who if entry.path is not None}
    for folder in (out / POLICIES).glob(f"*-{'[0-9a-f]' * 8}"):  # as `folder_name` has them
        if folder.name not in kept:
            shutil.rmtree(folder)


def read(path: Path) -> dict[str, Any]:
    """Read a ``result.json``, by its path or that of its folder.

    Raises:
        InputError: There is none, or it is of another format.
    """
    path = path / RESULT if path.is_dir() else path
    try:
        result = json.loads(path.read_text("utf-8"))
        version = result["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no benchmark result: {error}", "name a result.json") from error
    if version != FORMAT or not isinstance(result, dict):
        raise InputError(f"{path}: format {version}, this version reads {FORMAT}")
    return result
