"""`play_suite`: play cells of a benchmark; what is finished stays on disk.

A *result* is one policy on one cell. Its file's name is a hash of everything that decides about it:
the cell (scenario, profiles, seeds), the policy, the episodes and the source of the simulator. A
run that was interrupted goes on where it stopped, and a new policy finds the rules played.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import mmrl
from mmrl.agents.play import PLANNED, SIDE_BY_SIDE, Piece, Played, play
from mmrl.agents.pool import side_by_side
from mmrl.agents.suite_policies import Entry
from mmrl.agents.windows import cut, fit, label
from mmrl.errors import InputError
from mmrl.files import atomic_write, files_hash
from mmrl.scenarios.suite import Cell, Suite, digest
from mmrl.workloads.readers import read_trace
from mmrl.workloads.trace import Trace

# What decides about an episode: folders and modules of the package.
SOURCES = (
    *("node", "sim", "rules", "bounds", "scenarios", "workloads", "profiles", "envs"),
    *("metrics.py", "rollout.py", "agents/export.py", "agents/runner.py", "agents/play.py"),
    "agents/windows.py",
)
# Bins of TTFT, one per cent wide, from 1 ms on; with them p99 can be had over many cells.
BIN, FIRST_S, BINS = 0.01, 1e-3, 1500
NUMBERS = (
    "requests",
    "goodput",
    "goodput_worst_model",
    "fairness",
    "norm_latency",
    "missed_ttft",
    "missed_tpot",
    "refused",
    "unfinished",
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "tpot_p99_s",
    "longest_wait_s",
    "loads_per_s",
    "evictions_per_s",
    "outs_per_s",
    "preemptions_per_s",
    "stream_bytes_per_s",
    "gpu_share",
    "link_in_share",
    "decisions_per_s",
    "illegal_actions",
)
Floats = npt.NDArray[np.float64]
Watch = Callable[[str, int, int], None]  # the cell; episodes played and to play in all


@dataclass(frozen=True)
class CellResult:
    """What came of one policy on one cell.

    Attributes:
        episode: int64[n], indices within the cell's split.
        numbers: For each of `NUMBERS` float64[n].
        ttft_counts: int64[BINS], requests by TTFT.
    """

    episode: npt.NDArray[np.int64]
    numbers: dict[str, Floats]
    ttft_counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """One policy on one cell: what is played, and where the result goes."""

    cell: Cell
    entry: Entry
    episodes: tuple[int, ...]
    traces: tuple[Trace, ...]
    path: Path

    def pieces(self, suite: Suite) -> list[Piece]:
        """Cut the task into what a process plays at a time."""
        contender, found = self.entry.contender(self.cell), []
        size = PLANNED if contender.planner else SIDE_BY_SIDE
        for start in range(0, len(self.episodes), size):
            part = slice(start, start + size)
            scenario = f"{suite.place}:{self.cell.source}"
            found.append(
                Piece(
                    self.cell.name,
                    scenario,
                    self.cell.load,
                    self.cell.split,
                    self.episodes[part],
                    contender,
                    self.traces[part],
                )
            )
        return found


def trace_cells(
    suite: Suite, traces: Sequence[Path], episodes: int
) -> list[tuple[Cell, tuple[Trace, ...]]]:
    """Fit a recorded trace to the suite's fixed fleets and cut it into episodes.

    Args:
        suite: The suite.
        traces: Files of one trace.
        episodes: The most that a cell plays.

    Returns:
        A cell for each fixed fleet, with its episodes.

    Raises:
        InputError: A file cannot be read, or the suite has no fixed fleet.
    """
    bases = [cell for cell in suite.cells if cell.group == "fixed"]
    if not bases:
        raise InputError(f"suite {suite.name} has no fixed fleet for traces", "leave --trace out")
    raw = read_trace(list(traces))
    told = files_hash(traces)[:16]
    found = []
    for base in bases:
        sampler = base.scenario.sampler()
        windows = cut(fit(raw, sampler), sampler, base.load, episodes)
        name = f"{base.platform}-trace-{label(traces)}"
        about = {"name": name, "variation": "trace", "origin": base.name, "first": 0}
        cell = replace(base, **about, trace=f"{label(traces)} {told}")  # type: ignore[arg-type]
        found.append((cell, windows.traces))
    return found


def plan(
    suite: Suite,
    cells: Sequence[Cell],
    traces: dict[str, tuple[Trace, ...]],
    entries: Sequence[Entry],
    episodes: int,
    cache_folder: Path,
) -> tuple[list[Task], list[tuple[str, str]]]:
    """Say what there is to play.

    Args:
        suite: The suite.
        cells: Which cells.
        traces: By cell the windows of those that play a trace.
        entries: Who plays.
        episodes: Of each cell; planners play no more than the suite wants.
        cache_folder: Where results are kept.

    Returns:
        (the tasks, and the cells and policies that do not suit each other).
    """
    tasks, unsuited = [], []
    for cell in cells:
        windows = traces.get(cell.name, ())
        for entry in entries:
            if not entry.plays(cell):
                if entry.path is not None and entry.wanted(cell):
                    unsuited.append((cell.name, entry.name))
                continue
            count = min(episodes, len(windows)) if cell.trace else episodes
            if entry.kind in ("bound", "planner"):
                count = min(count, suite.spec.lookahead.episodes)
            indices = tuple(range(cell.first, cell.first + count))
            key = digest([cell.hash, entry.identity(cell), count, NUMBERS, code_hash()])
            path = cache_folder / f"{cell.name}-{key}.npz"
            tasks.append(Task(cell, entry, indices, windows[:count], path))
    return tasks, unsuited


def play_suite(
    suite: Suite, tasks: Sequence[Task], workers: int, watch: Watch
) -> dict[tuple[str, str], CellResult]:
    """Play what has not been played yet.

    Args:
        suite: The suite.
        tasks: What `plan` found.
        workers: How many processes.
        watch: Told the cell, and the episodes played and to play in all.

    Returns:
        Results by names of cell and policy.
    """
    # Two policies that do the same, such as a rule whose defaults are best, have one file.
    by_path = {task.path: task for task in tasks if not task.path.exists()}
    open_tasks = list(by_path.values())
    # What looks ahead takes longest and comes first; the rest cell by cell.
    open_tasks.sort(key=lambda task: task.entry.kind not in ("bound", "planner"))
    work: list[Piece] = []
    owner: list[int] = []
    missing: list[int] = []
    for k, task in enumerate(open_tasks):
        pieces = task.pieces(suite)
        work += pieces
        owner += [k] * len(pieces)
        missing.append(len(pieces))
    total = sum(len(task.episodes) for task in {task.path: task for task in tasks}.values())
    done = total - sum(len(task.episodes) for task in open_tasks)
    watch("", done, total)
    parts: dict[int, list[Played]] = {}
    for index, played in side_by_side(play, work, workers):
        k = owner[index]
        parts.setdefault(k, []).append(played)
        done += len(played.episodes)
        missing[k] -= 1
        if missing[k] == 0:
            save(open_tasks[k].path, gather(parts.pop(k)))
        watch(played.piece.board, done, total)
    return {(task.cell.name, task.entry.name): load(task.path) for task in tasks}


def gather(parts: Sequence[Played]) -> CellResult:
    """Put together what was played of one task, in the order of episodes."""
    rows = [row for part in parts for row in part.episodes]
    rows.sort(key=lambda row: row["episode"])
    counts = np.zeros(BINS, np.int64)
    for part in parts:
        counts += ttft_counts(part.latencies["ttft_s"])
    return CellResult(
        np.array([row["episode"] for row in rows], np.int64),
        {name: np.array([row[name] for row in rows], np.float64) for name in NUMBERS},
        counts,
    )


def ttft_counts(ttft_s: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Count requests by TTFT, int64[BINS]: bin 0 is below 1 ms, each next one 1 % wider."""
    values = np.maximum(ttft_s.astype(np.float64), FIRST_S)
    bins = np.ceil(np.log(values / FIRST_S) / np.log1p(BIN)).astype(np.int64)
    return np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)


def ttft_quantile(counts: npt.NDArray[np.int64], share: float) -> float:
    """Return the TTFT that a share of requests does not exceed, to 1 %, s; NaN without requests."""
    total = int(counts.sum())
    if total == 0:
        return float("nan")
    index = int(np.searchsorted(np.cumsum(counts), share * total))
    return float(FIRST_S * (1 + BIN) ** index)


def save(path: Path, result: CellResult) -> None:
    """Write a result, whole or not at all."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "episode": result.episode,
        "ttft_counts": result.ttft_counts,
        **{f"number_{name}": values for name, values in result.numbers.items()},
    }
    with atomic_write(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> CellResult:
    """Read a result.

    Raises:
        InputError: The file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            numbers = {name: arrays[f"number_{name}"] for name in NUMBERS}
            return CellResult(arrays["episode"], numbers, arrays["ttft_counts"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged: {error}", "delete it and evaluate again") from error


@cache
def code_hash() -> str:
    """Return a hash of the source that decides about an episode, 16 hexadecimal digits."""
    root, found = Path(mmrl.__file__).parent, hashlib.sha256()
    for source in SOURCES:
        place = root / source
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]
