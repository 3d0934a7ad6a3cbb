"""`mmrl report`: one HTML page about evaluations and runs, which opens offline."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    sources: Annotated[list[Path], typer.Argument(help="Run folders and results folders.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one HTML report about runs."""
    from mmrl.agents.report import write_report

    write_report(sources, out)
    typer.echo(f"wrote {out}")
