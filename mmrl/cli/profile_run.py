"""`mmrl profile run`: measure what models cost on this machine."""

import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmrl.cli.train import TIMES, number
from mmrl.errors import InputError, MmrlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmrl.deploy.profiler.run import Outcome
    from mmrl.profiles.schema import Profile

CONTEXT_TOKENS, PROMPT_TOKENS = 1024, 2048
CAPTION = (
    f"b1, b32: a decode step of 1 and 32 sequences of {CONTEXT_TOKENS:,} tokens, ms\n"
    f"prefill: {PROMPT_TOKENS:,} tokens, ms; both with the overhead of a busy node's loop, which\n"
    "mmrl profile show has apart; load, KV out and in: GB/s\n"
    "slower: factor on a decode step beside a load, a KV save, a stream\n"
    "host: from so many tokens on streaming all layers beats the host\n"
    "spread: of the medians, the largest"
)
LEAST_S = 60.0  # of a model, in which what costs need is surely measured on a GPU


def run(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints: folders, hub ids, or names of the testbed, which need no files; "
            "or one CONFIG.toml of a server.",
            metavar="CONFIG.toml | MODEL...",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the platform; one of your own that mmrl serve looks into."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    ] = "auto",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time for all models: 90s, 3m. What costs need is measured in any case.",
            show_default="3m for each model",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Device memory for everything, as in 24GB; all unless given.")
    ] = None,
    platform: Annotated[
        str | None, typer.Option(help="Name of the platform; the device's own unless given.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Refuse a GPU that others use.")] = False,
) -> None:
    """Measure models on this machine with the live node's own code.

    Writes platform.json, a profile for each model and raw/ with every single measurement. An
    interrupted run goes on where it stopped when the same command is called again.

    mmrl profile run llama-tiny --device cpu --budget 20s   tries it in a moment.
    """
    import shlex
    import sys

    from pydantic import ByteSize, TypeAdapter, ValidationError

    from mmrl.deploy.config import read_models
    from mmrl.deploy.profiler.run import Request, profile_models

    try:
        size = None if memory is None else int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError:
        raise InputError(f"--memory: '{memory}' is not a size", "for example 24GB") from None
    request = Request(
        models=read_models(models, "mmrl profile run").models,
        out=out,
        device=device,
        budget_s=None if budget is None else number(budget, TIMES, "budget"),
        memory=size,
        platform=platform,
        strict=strict,
        command=shlex.join(["mmrl", *sys.argv[1:]]),
    )
    begun = time.monotonic()
    with bars() as report:
        if request.budget_s is not None and request.budget_s < LEAST_S * len(request.models):
            report.say(
                f"a budget of {budget} is short: what costs need is measured in any case, about a "
                "minute for each model"
            )
        try:
            outcomes = profile_models(request, report)
        except KeyboardInterrupt:
            report.say("interrupted: the same command goes on from here")
            raise
    _print_outcomes(Console(), outcomes)
    took_s = time.monotonic() - begun
    over = "" if request.budget_s is None or took_s <= request.budget_s else f", budget {budget}"
    typer.echo(f"took {took_s:.0f} s{over}")
    failed = [outcome.model for outcome in outcomes if outcome.profile is None]
    if failed:
        raise MmrlError(f"no profile of {', '.join(failed)}", "run the same command again")


def bars() -> "Bars":
    """Return bars on standard error."""
    return Bars(Console(stderr=True))


class Bars(AbstractContextManager["Bars"]):
    """Shows one bar for the model that is being measured; a `Report` of the profiler."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def section(self, model: str, name: str, done: int, total: int) -> None:
        """Show which section of a model is measured."""
        if model not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, visible=False)
            self._tasks[model] = self._progress.add_task(model, total=total, now="")
        self._progress.update(self._tasks[model], completed=done, now=name.replace("_", " "))

    def reading(self, model: str, done: int, total: int) -> None:
        """Show how much of the weights is in host memory."""
        if model in self._tasks:
            self._progress.update(self._tasks[model], now=f"reading {done / total:.0%}")

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks.values():
            self._progress.update(task, visible=False)
        self._progress.stop()


def _print_outcomes(console: Console, outcomes: "Sequence[Outcome]") -> None:
    """Print what was found, a line for each model."""
    from mmrl.deploy.profiler.fit import spreads
    from mmrl.profiles.costs import CostModel
    from mmrl.study.formulas import host_crossing_tokens

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for name in ("b1", "b32", "prefill", "load", "KV", "slower", "host", "spread"):
        table.add_column(name, no_wrap=True, justify="right")
    for outcome in outcomes:
        profile = outcome.profile
        if profile is None:
            table.add_row(outcome.model, "[red]failed[/]")
            continue
        costs, slow = CostModel(profile), profile.slowdown
        found, crossing = spreads(outcome.raw), host_crossing_tokens(costs)
        table.add_row(
            outcome.model,
            f"{costs.decode_s(1, CONTEXT_TOKENS) * 1e3:.2f}",
            f"{costs.decode_s(32, CONTEXT_TOKENS) * 1e3:.2f}",
            f"{costs.prefill_s(PROMPT_TOKENS) * 1e3:.1f}",
            f"{profile.load.bytes_per_s / 1e9:.1f}",
            f"{profile.kv_save.bytes_per_s / 1e9:.0f}/{profile.kv_restore.bytes_per_s / 1e9:.0f}",
            "-"
            if slow is None
            else f"{slow.beside_load:.2f}/{slow.beside_save:.2f}/{slow.beside_stream:.2f}",
            _tokens(crossing, profile),
            f"{max(found.values()):.1%}",
        )
    console.print(table)
    console.print(f"[dim]{CAPTION}[/]", highlight=False, soft_wrap=True)
    for outcome in outcomes:
        if outcome.profile is not None:
            folder = outcome.raw.path.parent.parent
            console.print(f"profiles: {folder}", soft_wrap=True, highlight=False)
            break


def _tokens(crossing: float | None, profile: "Profile") -> str:
    """Write from how many tokens on the host is slower, which may be beyond what was measured."""
    if crossing is None:
        return "-"
    return f">{profile.host_model_s[-1].tokens}" if math.isinf(crossing) else f"{crossing:.0f}"
