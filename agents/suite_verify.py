"""`verify`: play a random sample of a benchmark again and compare bit for bit.

With ``episodes.parquet`` beside the result the sample is of single episodes. Where that file was
left out, for it is large, it is of whole (cell, policy) and their means are compared.

Checked besides: the version of the suite, the hash of each cell, the rules' tuned parameters, the
learned policies' files, and that the tables follow from what was played.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrl.agents.export import policy_hash
from mmrl.agents.play import Piece, Played, play
from mmrl.agents.pool import side_by_side
from mmrl.agents.suite import EPISODES, RESULT, read
from mmrl.agents.suite_check import check_tables
from mmrl.agents.suite_policies import Entry, entries
from mmrl.agents.suite_results import Row, mean, rows_of
from mmrl.agents.suite_run import NUMBERS, Task, Watch, code_hash, gather, trace_cells
from mmrl.files import files_hash
from mmrl.scenarios.suite import Cell, Suite, get_suite
from mmrl.workloads.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

SAMPLE = 24
ALL = -1  # in place of an episode's number: the means of all


@dataclass(frozen=True)
class Verification:
    """What verifying found.

    Attributes:
        problems: What is wrong with the result, empty where nothing is.
        notes: What could not be checked, and why.
        replayed: A row per replayed sample: ``cell``, ``policy``, ``episode`` (`ALL` where the
            means of all were compared), ``same`` and, where it is not, the metric that differs
            first (``differs``).
    """

    problems: list[str]
    notes: list[str]
    replayed: list[Row]

    @property
    def passed(self) -> bool:
        """Whether everything that was checked is as the result says."""
        return not self.problems and all(row["same"] for row in self.replayed)


def verify(
    path: Path,
    *,
    traces: Sequence[Path] = (),
    sample: int = SAMPLE,
    seed: int | None = None,
    workers: int = 1,
    watch: Watch = lambda cell, done, total: None,
) -> Verification:
    """Verify a benchmark result.

    Args:
        path: Its ``result.json`` or folder.
        traces: Files of the trace, where the result has cells of one.
        sample: How many (cell, policy, episode) to play again, half of them of learned policies;
            how many (cell, policy) where the episodes are not there.
        seed: Of the sample; another one each time unless given.
        workers: How many processes.
        watch: Told the cell, and what is played and to play in all.

    Raises:
        InputError: There is no result, or the suite is unknown here.
    """
    import pandas as pd

    result = read(path)
    folder = path if path.is_dir() else path.parent
    suite = get_suite(result["suite"])
    problems, notes = _versions(result, suite)
    if (folder / EPISODES).exists():
        digest = files_hash([folder / EPISODES])
        if digest != result["episodes_sha256"]:
            problems.append(f"{EPISODES} is not the file that {RESULT} was made from")
        episodes = told = pd.read_parquet(folder / EPISODES)
    else:
        episodes, told = None, pd.DataFrame(result["figures"]).assign(episode=ALL)
        notes.append(
            f"there is no {EPISODES}: whole cells are played, and their means compared; "
            "intervals, p-values and head-room are not computed again"
        )
    cells = _cells(result, suite, traces, problems, notes)
    who = _entries(result, suite, [cell for cell, _ in cells.values()], folder, problems)
    if {*result["cells"]["cell"]} == {*cells} and {*result["policies"]["policy"]} == {*who}:
        everyone = [who[name] for name in result["policies"]["policy"]]
        problems += check_tables(
            suite, result, episodes, [cell for cell, _ in cells.values()], everyone
        )
    else:
        notes.append("the tables are not checked: there are cells or policies to be played first")
    told = told[told.cell.isin(list(cells)) & told.policy.isin(list(who))]
    drawn = _sample(told, who, sample, np.random.default_rng(seed))
    work = []
    for row in drawn:
        cell, windows = cells[row["cell"]]
        count = _count(result, row["cell"], row["policy"])
        indices = tuple(range(cell.first, cell.first + count))
        task = Task(cell, who[row["policy"]], indices, windows[:count], Path())
        work.append(_pieces(task, suite, row["episode"]))
    return Verification(problems, notes, _replay(drawn, work, workers, watch))


def _versions(result: dict[str, Any], suite: Suite) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    if result["suite_hash"] != suite.hash:
        problems.append(f"suite {suite.name} is another version here than that of the result")
    if result["code_hash"] != code_hash():
        notes.append("the simulator's source is another one here; episodes may differ for that")
    return problems, notes


def _cells(
    result: dict[str, Any],
    suite: Suite,
    traces: Sequence[Path],
    problems: list[str],
    notes: list[str],
) -> dict[str, tuple[Cell, tuple[Trace, ...]]]:
    """Return the cells that can be played here, and note what is wrong with others."""
    fitted = dict[str, tuple[Cell, tuple[Trace, ...]]]()
    if traces:
        windows = trace_cells(suite, traces, result["episodes"])
        fitted = {cell.name: (cell, parts) for cell, parts in windows}
    found = {}
    for row in rows_of(result["cells"]):
        name = row["cell"]
        if row["trace"] and name not in fitted:
            notes.append(f"cell {name} plays a trace: give its files with --trace")
            continue
        cell, parts = fitted[name] if row["trace"] else (suite.cell(name), ())
        if cell.hash != row["hash"]:
            problems.append(f"cell {name} is another one here")
        found[name] = cell, parts
    return found


def _entries(
    result: dict[str, Any],
    suite: Suite,
    cells: Sequence[Cell],
    folder: Path,
    problems: list[str],
) -> dict[str, Entry]:
    """Return who played: rules as the suite has them, learned policies from the result's folder."""
    rows = rows_of(result["policies"])
    names = list(dict.fromkeys(row["opponent"] for row in rows if row["opponent"]))
    found = {entry.name: entry for entry in entries(suite, cells, names)} if names else {}
    for name, told in result["params"].items():
        entry = found.get(name)
        if entry is None or any(
            told.get(cell, told.get("*")) != params for cell, params in entry.params.items()
        ):
            problems.append(f"{name}: its parameters are not those of suite {suite.name}")
    for row in [row for row in rows if row["kind"] == "learned"]:
        path = folder / row["folder"]
        if policy_hash(path) != row["sha256"]:
            problems.append(f"{row['policy']}: its files are not those that were evaluated")
        found[row["policy"]] = Entry(
            row["policy"],
            "learned",
            path=path.resolve(),
            group=row["group"],
            seed=row["seed"],
            sha256=row["sha256"],
        )
    return found


def _count(result: dict[str, Any], cell: str, policy: str) -> int:
    """Return how many episodes of a cell a policy played."""
    figures = result["figures"]
    at = list(zip(figures["cell"], figures["policy"], strict=True)).index((cell, policy))
    return int(figures["episodes"][at])


def _sample(
    told: "pd.DataFrame", who: dict[str, Entry], sample: int, rng: np.random.Generator
) -> list["pd.Series[Any]"]:
    """Draw rows, half of them of learned policies."""
    learned = told.policy.isin([name for name, entry in who.items() if entry.kind == "learned"])
    parts = [part for part in (told[learned], told[~learned]) if len(part)]
    drawn = []
    for part in parts:
        count = min(len(part), -(-sample // len(parts)))
        drawn += [part.iloc[k] for k in rng.choice(len(part), count, replace=False)]
    return drawn


def _pieces(task: Task, suite: Suite, episode: int) -> list[Piece]:
    """Return what plays an episode, or `ALL`, as it was played.

    A learned policy decides for episodes side by side: its matrix products depend in the last bit
    on how many there are, so that all of them are played. A rule decides for each by itself.
    """
    pieces = task.pieces(suite)
    if episode == ALL:
        return pieces
    piece = next(piece for piece in pieces if episode in piece.episodes)
    if task.entry.kind == "rule":
        k = piece.episodes.index(episode)
        piece = replace(piece, episodes=(episode,), traces=piece.traces[k : k + 1])
    return [piece]


def _replay(
    drawn: Sequence["pd.Series[Any]"], work: Sequence[list[Piece]], workers: int, watch: Watch
) -> list[Row]:
    """Play what was drawn and compare."""
    pieces = [piece for part in work for piece in part]
    owner = [k for k, part in enumerate(work) for _ in part]
    parts: list[list[Played]] = [[] for _ in work]
    watch("", 0, len(pieces))
    for done, (index, played) in enumerate(side_by_side(play, pieces, workers), 1):
        parts[owner[index]].append(played)
        watch(played.piece.board, done, len(pieces))
    return [_compared(told, part) for told, part in zip(drawn, parts, strict=True)]


def _compared(told: "pd.Series[Any]", parts: Sequence[Played]) -> Row:
    found = gather(parts)
    if told["episode"] == ALL:
        numbers = {name: mean(values) for name, values in found.numbers.items()}
    else:
        (k,) = np.flatnonzero(found.episode == told["episode"])
        numbers = {name: values[k] for name, values in found.numbers.items()}
    differs = [
        name
        for name in NUMBERS
        if not np.array_equal(np.float64(numbers[name]), np.float64(told[name]), equal_nan=True)
    ]
    return {
        "cell": told["cell"],
        "policy": told["policy"],
        "episode": int(told["episode"]),
        "same": not differs,
        "differs": differs[0] if differs else "",
    }
