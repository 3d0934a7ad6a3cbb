"""`mmrl demo`: the whole of it in some minutes: train, evaluate, report."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def command(
    trace: Annotated[
        list[Path] | None,
        typer.Option(help="Recorded requests to evaluate on, instead of those that mmrl ships."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.05, max=600, help="Of training.")] = 4.0,
    out: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("runs/demo"),
) -> None:
    """Train, evaluate and report in a few minutes.

    A policy is trained on the scenario 'demo', six models that do not fit on the device together,
    and compared with hand-written policies on episodes that it has not seen and on a trace.
    Stopped with Ctrl-C, the same command goes on where it stopped.
    """
    from mmrl.cli.evaluate import print_headlines, progress

    console = Console(highlight=False)
    console.print("The first time, code is compiled: one or two minutes more.")
    from mmrl.agents.demo import Show, demo

    show = Show(lambda line: console.print(escape(line), soft_wrap=True), lambda: progress(console))
    made = demo(out, minutes, trace or [], show, workers=min(2, os.cpu_count() or 1))
    console.print()
    for results in (made.unseen, made.traced):
        print_headlines(results, console)
    console.print(f"Report: {escape(str(made.report))}", soft_wrap=True)
