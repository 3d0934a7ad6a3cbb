"""`mmrl validate`: runs of the live node, and how far the simulator is from them."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmrl.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

app = typer.Typer(
    help="Compare the live node with the simulator on the same requests.", no_args_is_help=True
)


@app.command()
def run(
    models: Annotated[
        list[str],
        typer.Argument(
            help="One CONFIG.toml as for mmrl serve, or the models: checkpoint folders, or names "
            "of mmrl testbed for random weights.",
            metavar="CONFIG.toml | MODEL...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the runs; what it has is not run again.")],
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Device memory for weights, KV cache and workspace, as in 24GB."),
    ] = None,
    profiles: Annotated[
        str | None, typer.Option(help="Folder of measured profiles, as mmrl profile run makes it.")
    ] = None,
    policies: Annotated[
        str, typer.Option(help="Rules and folders of trained policies, by commas.")
    ] = "slack,lru",
    loads: Annotated[
        str,
        typer.Option(help="By commas; 1 is where the rule slack reaches a goodput of .90."),
    ] = "0.5,0.9",
    duration: Annotated[float, typer.Option(min=1, help="Seconds in which requests arrive.")] = 60,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second at load 1; found in the simulator unless given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and lengths.")] = 0,
) -> None:
    """Serve a fixed workload with each policy at each load, and report the simulator's errors.

    The models are opened once, in this process; each run takes its duration and some seconds to
    drain. After Ctrl-C the same command goes on where it was.
    """
    from mmrl.deploy.validate.measure import Plan, measure, read_fleet

    console = Console(highlight=False)
    plan = Plan(
        read_fleet(models, device, memory, profiles),
        tuple(name.strip() for name in policies.split(",") if name.strip()),
        _numbers(loads),
        duration,
        seed,
        rate,
    )
    with _bars(console) as bars:
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"reading {name}", total=total)
            bars.update(tasks[name], completed=done, visible=done < total)

        measure(plan, out, console.print, progress)
    report(out)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of runs.")],
) -> None:
    """Play the runs of a folder through the simulator; write report.json and report.html there."""
    from mmrl.deploy.validate.report import PAGE, about_log, lines, write_report

    console = Console(highlight=False)
    with console.status("playing") as status:
        found = write_report(folder, lambda name: status.update(f"playing {name}"))
    for run, rows in itertools.groupby(lines(found), key=lambda row: row[0]):
        table = Table(box=None, pad_edge=False, title=run, title_justify="left")
        table.add_column("", min_width=22, no_wrap=True)
        for name in ("live", "simulated", "error", "target"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for _, *cells, met in rows:
            style = {"met": "[green]met[/]", "missed": "[bold red]missed[/]"}
            table.add_row(*cells, style.get(met, ""))
        console.print(table)
        console.print(about_log(next(one for one in found["runs"] if one["run"] == run)))
    console.print(f"{folder / PAGE}")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--loads {text}: not numbers", "as in 0.5,0.9") from None
    if not all(0 < number < float("inf") for number in numbers):
        raise InputError(f"--loads {text}: must be positive")
    return numbers


def _bars(console: Console) -> "Progress":
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console
    )
