"""`mmrl evaluate`: policies on the same arrivals; tables here, Parquet and JSON on disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrl.errors import InputError
from mmrl.scenarios.seeds import Split

if TYPE_CHECKING:
    from mmrl.agents.evaluate import Watch
    from mmrl.agents.results import Results

KIND_STYLE = {
    "learned": "bold cyan",
    "live": "bold magenta",
    "step0": "cyan",
    "rule": "",
    "bound": "dim",
}
COMPILING = "the first time, code is compiled: a minute or two"
GOODPUT_NOTE = (
    "vs best: against the best rule, points, paired by episode; P(better): share of\n"
    "episodes that go better than with it; worst: the worst model of each episode"
)
LATENCY_NOTE = (
    "norm.: E2E over the latency alone; TTFT: of all requests; longest: the longest\n"
    "wait for a first token, s; µs: median time of a decision on this machine"
)


def command(
    policies: Annotated[
        str,
        typer.Option(
            help="Rules (slack, slack@tuned, slack@runs/tuned.toml), mpc, clairvoyant, "
            "run folders (runs/x, runs/x@step0), exported policies "
            "and default, the shipped one, by commas; "
            "all rules and the shipped policy unless given."
        ),
    ] = "",
    scenarios: Annotated[
        str, typer.Option(help="Names or .toml files, by commas; demo unless given.")
    ] = "",
    suite: Annotated[
        str, typer.Option(help="A frozen benchmark, v1: all of its cells, not scenarios.")
    ] = "",
    cells: Annotated[
        str, typer.Option(help="Cells of the benchmark: fast-*, core; by commas.")
    ] = "",
    verify: Annotated[
        Path | None,
        typer.Option(help="Result of a benchmark: play a sample again and compare."),
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(help="Recorded requests, stretched in time to the load; may be repeated."),
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(min=1, help="Per scenario and load (100), cell (its own) or sample (24)."),
    ] = None,
    split: Annotated[Split, typer.Option(help="Whose random streams.")] = "test",
    loads: Annotated[
        str,
        typer.Option("--load", "--loads", help="Loads, by commas (1); 0.5,0.8,1 gives a curve."),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Results folder; in the run's folder unless given. "
            "Results of another command are never replaced."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    record: Annotated[
        int, typer.Option(min=0, help="Episodes of each board kept as timelines for the report.")
    ] = 3,
) -> None:
    """Compare policies on the same arrivals."""
    if suite or verify is not None:
        fixed = {"--scenarios": scenarios, "--loads": loads, "--split": split.replace("test", "")}
        _check_suite(suite, verify, cells, fixed)
        from mmrl.agents.export import DEFAULT
        from mmrl.cli import suite as benchmark

        if verify is not None:
            benchmark.verify(verify, trace or [], episodes, seed or None, workers)
            return
        place = out or Path("runs") / f"suite-{datetime.now():%Y%m%d-%H%M%S}"
        played_by = _names(policies) or [DEFAULT]  # and by all rules, as none is named
        benchmark.run(suite, played_by, place, _names(cells), trace or [], episodes, workers, seed)
        return
    if cells:
        raise InputError("--cells belongs to a benchmark", "add --suite v1")
    from mmrl.agents.contenders import everyone
    from mmrl.agents.evaluate import evaluate
    from mmrl.agents.provenance import command_line
    from mmrl.agents.results import check_place, free_place

    console = Console(highlight=False)
    asked = command_line()
    place = out or free_place(_default_place(_names(policies)), asked)
    check_place(place, asked)
    played = _names(scenarios) or ["demo"]
    with progress(console) as watch:
        results = evaluate(
            _names(policies) or everyone(played),
            played,
            traces=trace or (),
            loads=[_load(text) for text in _names(loads) or ["1"]],
            episodes=episodes or 100,
            split=split,
            workers=workers,
            seed=seed,
            record=record,
            watch=watch,
        )
    place = free_place(place, asked)  # others may have written there since
    results.write(place)
    print_results(results, console, episodes)
    console.print(f"\nwrote {escape(str(place))}", soft_wrap=True)
    console.print(f"a page about it: mmrl report {escape(str(place))}", soft_wrap=True)


def print_results(results: "Results", console: Console, asked: int | None = None) -> None:
    """Print what each board says: who won, goodput, latency, and goodput per model and load.

    Args:
        results: What to print.
        console: Where.
        asked: How many episodes the user asked for, who is told of a trace that has fewer.
    """
    from mmrl.agents.headline import counted

    for board in results.summary["boards"]:
        console.rule(f"[bold]{escape(board['name'])}[/]", align="left", style="dim")
        for note in board["notes"]:
            console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
        _print_headlines(board, console)
        rows = [row for row in board["rows"] if row["load"] == board["main_load"]]
        about = f"{counted(board['episodes'])} at load {board['main_load']:g}"
        if asked is not None and board["episodes"] < asked:
            about += f" ({asked} asked for, the trace has {board['episodes']})"
        console.print()
        console.print(_goodput_table(rows, about))
        console.print(f"[dim]{GOODPUT_NOTE}[/]\n")
        console.print(_latency_table(rows))
        console.print(f"[dim]{LATENCY_NOTE}[/]\n")
        if len(board["loads"]) > 1:
            console.print(_load_table(board), "")
        console.print(_model_table(board, rows))


def print_headlines(results: "Results", console: Console) -> None:
    """Print who won on each board, and the goodput of all."""
    from mmrl.agents.headline import counted

    for board in results.summary["boards"]:
        _print_headlines(board, console)
        rows = [row for row in board["rows"] if row["load"] == board["main_load"]]
        console.print(_goodput_table(rows, f"{counted(board['episodes'])} of {board['name']}"))
        console.print()


def _print_headlines(board: dict[str, Any], console: Console) -> None:
    from mmrl.agents.headline import headlines

    for headline in headlines(board):
        console.print(f"[bold]{escape(headline.title)}[/]")
        console.print(escape(headline.detail))


def _goodput_table(rows: list[dict[str, Any]], about: str) -> Table:
    from mmrl.agents.headline import points

    table = _table(f"Goodput, {about}")
    for heading in ("policy", "mean", "vs best", "95 % interval", "IQM", "P(better)", "worst"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    for row in rows:
        versus = row.get("vs_best_rule")
        difference = versus and versus["goodput"]
        table.add_row(
            _name(row),
            _percent(row["goodput"]),
            "best rule" if row["is_best_rule"] else points(difference and difference[0]),
            _ends(difference) if difference else "",
            _percent(row["goodput_iqm"]),
            _number(versus["improvement"][0], 2) if versus and "improvement" in versus else "",
            _percent(row["goodput_worst_model"]),
        )
    return table


def _ends(interval: list[float | None]) -> str:
    """Write from where to where an interval reaches."""
    from mmrl.agents.headline import points

    _, low, high = interval
    return "too few" if low is None else f"{points(low)} to {points(high)}"


def _latency_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("Latency and work")
    for heading in (
        "policy",
        "norm.",
        "TTFT p50",
        "p99 s",
        "longest",
        "loads/s",
        "preempt/s",
        "µs",
    ):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            _name(row),
            _number(row["norm_latency"], 2),
            _number(row["ttft_p50_s"], 2),
            _number(row["ttft_p99_s"], 1),
            _number(row["longest_wait_s"], 1),
            _number(row["loads_per_s"], 2),
            _number(row["preemptions_per_s"], 2),
            _number(row["decision_us"], 0),
        )
    return table


def _load_table(board: dict[str, Any]) -> Table:
    table = _table("Goodput at each load")
    table.add_column("policy", no_wrap=True)
    for load in board["loads"]:
        table.add_column(f"{load:g}", justify="right")
    by_key = {(row["policy"], row["load"]): row for row in board["rows"]}
    for row in (row for row in board["rows"] if row["load"] == board["main_load"]):
        cells = [by_key[row["policy"], load] for load in board["loads"]]
        table.add_row(_name(row), *(_percent(cell["goodput"]) for cell in cells))
    return table


def _model_table(board: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    """Tabulate goodput per model: models across where they are few, policies down."""
    models = list(dict.fromkeys(entry["model"] for entry in board["models"]))
    table = _table("Goodput of each model")
    table.add_column("policy", no_wrap=True)
    for model in models:
        table.add_column(escape(model.replace("-", "\n", 1)), justify="right")
    by_key = {(entry["policy"], entry["model"]): entry["goodput"] for entry in board["models"]}
    for row in rows:
        table.add_row(_name(row), *(_percent(by_key.get((row["policy"], m))) for m in models))
    requests = {entry["model"]: entry["requests"] for entry in board["models"]}
    table.add_section()
    table.add_row("[dim]requests[/]", *(f"[dim]{requests[model]:,}[/]" for model in models))
    return table


@contextmanager
def progress(console: Console) -> Iterator["Watch"]:
    """Show a bar with the time that is left; yields what `evaluate` tells of its progress."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    if not console.is_terminal:
        yield lambda what, done, total: _log(console, what, done)
        return
    with console.status(f"reading ({COMPILING})") as status:
        bar = Progress(*columns, console=console, transient=True)
        task = bar.add_task("playing", total=None)

        def watch(what: str, done: int, total: int) -> None:
            if what == "playing" and done > 0:
                status.stop()
                bar.start()
                bar.update(task, completed=done, total=total)
            else:
                bar.stop()
                status.update(what if total == 0 else f"{what} ({COMPILING})")
                status.start()

        try:
            yield watch
        finally:
            bar.stop()


def _log(console: Console, what: str, done: int) -> None:
    """Say that playing begins, when the arguments are known to be right."""
    if what == "playing" and done == 0:
        console.print(f"evaluating ({COMPILING})")


def _check_suite(suite: str, verify: Path | None, cells: str, fixed: dict[str, str]) -> None:
    """Refuse options that do not go together with a benchmark."""
    for option, value in fixed.items():
        if value:
            raise InputError(f"{option} is fixed by the benchmark", f"leave {option} out")
    if verify is not None and (suite or cells):
        raise InputError("--verify takes suite and cells from the result", "leave them out")


def _default_place(names: list[str]) -> Path:
    """Put results into the folder of the run they are about, where there is only one."""
    folders = {
        Path(name.rpartition("=")[2].removesuffix("@step0"))
        for name in names
        if Path(name.rpartition("=")[2].removesuffix("@step0")).is_dir()
    }
    if len(folders) == 1:
        return folders.pop() / "evaluation"
    return Path("runs") / f"evaluation-{datetime.now():%Y%m%d-%H%M%S}"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _load(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"load is '{text}', not a number", "for example --loads 0.5,1") from None


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )


def _name(row: dict[str, Any]) -> str:
    style = KIND_STYLE[row["kind"]]
    name = escape(row["policy"])
    return f"[{style}]{name}[/]" if style else name


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
