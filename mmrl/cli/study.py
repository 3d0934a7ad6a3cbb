"""`mmrl study`: offloading and preemption of each model on each platform, as a page and tables."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def command(
    platform: Annotated[
        list[str] | None,
        typer.Option(help="Name of a platform or path of its folder; may be repeated. All."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Name of a model; may be repeated. All.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for page and tables.")] = Path("study"),
) -> None:
    """Write a page about offloading and preemption, worked out from profiles."""
    from mmrl.study import check_place, compute, gather, write_study

    check_place(out)
    console = Console(stderr=True)
    with console.status("reading profiles") as status:
        cases = gather(platform or [], model or [])
        study = compute(cases, lambda name: status.update(f"table: {name}"))
        status.update("writing")
        page = write_study(study, out)
    for name in dict.fromkeys(case.platform.name for case in cases):
        kinds = {case.profile.kind for case in cases if case.platform.name == name}
        console.print(f"{name}: {' and '.join(sorted(kinds))} profiles", highlight=False)
    typer.echo(f"wrote {page} and {len(study.tables)} tables")
