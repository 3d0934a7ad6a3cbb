"""`mmrl report`: a folder with one page about evaluations and runs, which opens offline."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def command(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Run folders, results folders or their summaries; folders of these."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("report"),
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it here, and refresh it while runs train.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="For --serve; 0 takes any.")] = 8300,
) -> None:
    """Write a report about runs: what wins where, at what cost, and episode by episode."""
    from mmrl.agents.report import write_report
    from mmrl.agents.report_server import ReportServer

    console = Console(stderr=True, highlight=False)
    with console.status("reading results"):
        server = ReportServer(sources, out, port, console.print) if serve else None
        page = server.page if server else write_report(sources, out)
    typer.echo(f"wrote {page}")
    if server is None:
        return
    with server:
        console.print(f"serving {server.url}, refreshed when the files change; Ctrl-C ends it")
        server.wait()
