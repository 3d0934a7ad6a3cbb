"""`mmrl evaluate --suite`: a frozen benchmark; its tables here, its result on disk, verified."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrl.errors import MmrlError

if TYPE_CHECKING:
    from mmrl.agents.suite_run import Watch

STATISTICS = "played, now intervals and tables"
MARKS = {True: "[green]met   [/]", False: "[red]missed[/]", None: "[dim]open  [/]"}
POOL_NOTE = (
    "points: goodput over the best rule of each cell (of the stronger comparator),\n"
    "paired by episode; interval over seeds and episodes; p: adjusted by Holm"
)


def run(
    suite: str,
    policies: list[str],
    out: Path,
    cells: list[str],
    traces: list[Path],
    episodes: int | None,
    workers: int,
    seed: int,
) -> None:
    """Play a benchmark, write its result and print what it says."""
    from mmrl.agents.suite import evaluate_suite

    console = Console(highlight=False)
    with progress(console) as watch:
        result = evaluate_suite(
            suite,
            policies,
            out,
            cells=cells,
            traces=traces,
            episodes=episodes,
            workers=workers,
            seed=seed,
            watch=watch,
        )
    print_result(result, console)
    console.print(f"\nwrote {escape(str(out))}", soft_wrap=True)


def verify(
    path: Path, traces: list[Path], sample: int | None, seed: int | None, workers: int
) -> None:
    """Verify a result and print what was found.

    Raises:
        MmrlError: The result is not what the suite gives here.
    """
    from mmrl.agents.suite_verify import ALL, SAMPLE, verify

    console = Console(highlight=False)
    with progress(console, "parts", "comparing") as watch:
        found = verify(
            path,
            traces=traces,
            sample=sample or SAMPLE,
            seed=seed,
            workers=workers,
            watch=watch,
        )
    for note in found.notes:
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
    for row in found.replayed:
        told = "[green]the same[/]" if row["same"] else f"[red]{row['differs']} differs[/]"
        which = "means" if row["episode"] == ALL else f"episode {row['episode']}"
        where = f"{row['cell']}, {row['policy']}, {which}"
        console.print(f"{escape(where)}: {told}", soft_wrap=True)
    for problem in found.problems:
        console.print(f"[red]{escape(problem)}[/]", soft_wrap=True)
    same = sum(row["same"] for row in found.replayed)
    console.print(f"{same} of {len(found.replayed)} played again are the same, bit for bit")
    if not found.passed:
        raise MmrlError(f"{path} is not verified", "see what differs above")


def print_result(result: dict[str, Any], console: Console) -> None:
    """Print each cell's goodput, the pools and the verdicts."""
    from mmrl.agents.suite_results import rows_of

    console.print(_cell_table(result))
    groups = {row["group"] for row in rows_of(result["policies"]) if row["kind"] == "learned"}
    pools = [row for row in rows_of(result["pools"]) if row["stronger"]]
    if pools:
        # Of a single training seed only what is pooled over all loads.
        told = [row for row in pools if row["policy"] in groups or row["load"] is None]
        console.print()
        console.print(_pool_table(told))
        console.print(f"[dim]{POOL_NOTE}[/]")
    verdicts: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(result["verdicts"]):
        verdicts.setdefault(row["policy"], []).append(row)
    for policy, rows in verdicts.items():
        _print_verdicts(policy, rows, policy in groups, console)
    unsuited: dict[str, list[str]] = {}
    for row in rows_of(result["unsuited"]):
        unsuited.setdefault(row["policy"], []).append(row["cell"])
    for policy, cells in unsuited.items():
        text = f"{policy} has other verbs than these cells, not played: {', '.join(cells)}"
        console.print(f"\n[dim]{escape(text)}[/]", soft_wrap=True)
    if not result["complete"]:
        console.print("[dim]a part of the benchmark: not a result to submit[/]")


def _cell_table(result: dict[str, Any]) -> Table:
    """Tabulate goodput: cells down; the best rules, then who learned or looks ahead, across."""
    from mmrl.agents.suite_results import rows_of

    policies = rows_of(result["policies"])
    kinds = {row["policy"]: row["kind"] for row in policies}
    others = [row["policy"] for row in policies if row["kind"] != "rule"]
    comparators = {row["policy"]: row["comparator"] for row in policies}
    table = Table(title="Goodput, %", title_justify="left", box=None, pad_edge=False)
    table.add_column("cell", no_wrap=True)
    for heading in ("best rule, once", "best rule, here", *others):
        table.add_column(escape(heading).replace(" ", "\n", 1), justify="right", no_wrap=True)
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows_of(result["figures"]):
        figures.setdefault(row["cell"], {})[row["policy"]] = row
    for cell, rows in figures.items():
        texts = []
        for comparator in ("once", "cell"):
            rules = [
                row
                for name, row in rows.items()
                if kinds[name] == "rule" and comparators[name] == comparator
            ]
            best = max(rules, key=lambda row: row["goodput"])
            name = best["policy"].partition(" (")[0]
            texts.append(f"{name} {best['goodput'] * 100:.1f}")
        texts += [f"{rows[name]['goodput'] * 100:.1f}" if name in rows else "–" for name in others]
        table.add_row(cell, *texts)
    return table


def _pool_table(pools: list[dict[str, Any]]) -> Table:
    table = Table(title="Pooled", title_justify="left", box=None, pad_edge=False)
    for heading in ("policy", "pool"):
        table.add_column(heading, no_wrap=True)
    for heading in ("cells", "best rule", "points", "95 % interval", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in pools:
        p = row.get("p_holm")
        table.add_row(
            escape(row["policy"]),
            row["pool"],
            str(row["cells"]),
            f"{row['goodput_reference'] * 100:.1f}",
            f"{row['goodput'] * 100:+.1f}",
            f"{row['goodput_low'] * 100:+.1f} to {row['goodput_high'] * 100:+.1f}",
            "" if p is None else f"{p:.3f}",
        )
    return table


def _print_verdicts(
    policy: str, rows: list[dict[str, Any]], in_full: bool, console: Console
) -> None:
    """Print the targets of a policy: how many it meets, and where wanted each of them."""
    met, missed = (sum(row["met"] is value for row in rows) for value in (True, False))
    counts = f"{met} targets met, {missed} missed, {len(rows) - met - missed} open"
    console.print(f"\n[bold]{escape(policy)}[/]: {counts}")
    if not in_full:
        return
    for row in rows:
        value = "" if row["value"] is None else f": {row['value']:.3g}"
        if row["low"] is not None:
            value += f" ({row['low']:.3g} to {row['high']:.3g})"
        detail = f"; {row['detail']}" if row["detail"] else ""
        line = f"{row['target']}{value}, limit {row['limit']:g}{detail}"
        console.print(f"  {MARKS[row['met']]}  {escape(line)}", soft_wrap=True)


@contextmanager
def progress(console: Console, what: str = "episodes", then: str = STATISTICS) -> Iterator["Watch"]:
    """Show the cell that was played last and a bar with the time left.

    Where the output is not a terminal, a line tells of every further twentieth.

    Args:
        console: Where to.
        what: What is counted.
        then: What goes on after the last cell.
    """

    def now(cell: str, done: int, total: int) -> str:
        return then if 0 < total == done else cell

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    if not console.is_terminal:
        told = -1

        def tell(cell: str, done: int, total: int) -> None:
            nonlocal told
            if (step := done * 20 // max(1, total)) > told:
                told = step
                console.print(f"{done:,} of {total:,} {what} {now(cell, done, total)}".rstrip())

        yield tell
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading and compiling", total=None)

        def show(cell: str, done: int, total: int) -> None:
            about = {"completed": done, "total": total}
            description = now(cell, done, total) or "compiling"
            bar.update(task, description=description, **about)  # type: ignore[arg-type]

        yield show
