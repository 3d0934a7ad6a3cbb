"""`mmrl testbed`: models with random weights, to try serving without a download."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Write random-weight models to try serving with.", no_args_is_help=True)


@app.command("list")
def list_models() -> None:
    """List the models that can be written, with their sizes."""
    from mmrl.deploy.testbed import MODELS

    table = Table(
        box=None, pad_edge=False, caption_justify="left", caption="GB: weights in bf16, 1e9 bytes"
    )
    for heading in ("model", "shape of"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parameters", "GB", "layers", "context"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, model in MODELS.items():
        table.add_row(
            name,
            model.like,
            f"{model.parameters / 1e6:,.1f} million",
            f"{2 * model.parameters / 1e9:.3f}",
            f"{model.config['num_hidden_layers']}",
            f"{model.config['max_position_embeddings']:,}",
        )
    Console().print(table)


@app.command()
def create(
    model: Annotated[str, typer.Argument(help="Name of a model; mmrl testbed list shows all.")],
    out: Annotated[Path, typer.Option(help="Folder to write the model's folder into.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    name: Annotated[
        str | None, typer.Option(help="Name of the model's folder; the model's if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Every seed gives other weights.")] = 0,
    weights: Annotated[
        bool,
        typer.Option(help="Write the weights, or only their seed: mmrl serve then makes them."),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a model of that name.")] = False,
) -> None:
    """Write a model with random weights, a tokenizer and a chat template."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from mmrl.deploy import testbed

    console = Console(highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"writing {model}", total=None)
        folder = testbed.create(
            model,
            out,
            dtype=dtype,
            name=name,
            seed=seed,
            weights=weights,
            force=force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    size = sum(path.stat().st_size for path in folder.iterdir())
    console.print(f"{size / 1e9:.3f} GB written: {folder}", soft_wrap=True, markup=False)
