"""`mmrl workload`: look at traces, generate them, and fit recorded ones to a fleet."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console

from mmrl.errors import InputError, first_error
from mmrl.workloads.describe import print_description, write_plot
from mmrl.workloads.fleet import Mapping, Rescale, fit_to_fleet
from mmrl.workloads.generators import ArrivalKind, WorkloadSpec, sample_trace
from mmrl.workloads.readers import is_written_trace, read_trace
from mmrl.workloads.trace import Trace

app = typer.Typer(no_args_is_help=True, help="Describe, generate and fit workloads.")

FormatName = Literal["mmrl", "azure-llm", "burstgpt", "bailian", "mooncake", "azure-functions"]
Files = Annotated[list[Path], typer.Argument(help="Trace files, gzip or not.")]
FormatOption = Annotated[
    FormatName | None, typer.Option("--format", help="Instead of telling by the first line.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip bad rows and count them.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]
Lengths = Annotated[str, typer.Option(help="Length family, for counts per minute.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw into this HTML page.")]
Models = Annotated[str, typer.Option(help="The fleet: names, separated by commas.")]
Out = Annotated[Path, typer.Option(help="The CSV to write; it replaces a trace that mmrl wrote.")]


@app.command()
def describe(
    files: Files,
    format: FormatOption = None,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    lengths: Lengths = "chat",
    plot: Plot = None,
) -> None:
    """Show the rate, burstiness and lengths of a trace; several files are several services."""
    _show(read_trace(files, format, skip_bad, seed, lengths), plot)


@app.command()
def generate(
    out: Out,
    models: Models,
    rate: Annotated[float, typer.Option(help="Requests per second, all models together.")],
    duration: Annotated[float, typer.Option(help="Seconds.")],
    arrivals: Annotated[ArrivalKind, typer.Option(help="How requests follow.")] = "poisson",
    cv: Annotated[float, typer.Option(help="CV of gamma inter-arrival times.")] = 4.0,
    on: Annotated[float, typer.Option(help="Mean on-phase, seconds.")] = 8.0,
    off_ratio: Annotated[float, typer.Option(help="Mean off-phase over on-phase.")] = 2.0,
    zipf: Annotated[float, typer.Option(help="Popularity exponent, 0 for equal.")] = 1.0,
    drift: Annotated[float, typer.Option(help="Popularity changes after so many seconds.")] = 0.0,
    lengths: Annotated[str, typer.Option(help="Length families, by commas.")] = "chat",
    lengths_file: Annotated[
        Path | None, typer.Option(help="Recorded lengths, for family empirical.")
    ] = None,
    seed: Seed = 0,
    plot: Plot = None,
) -> None:
    """Sample a synthetic trace and write it as a CSV."""
    spec = _spec(
        arrivals={"kind": arrivals, "cv": cv, "on_s": on, "off_ratio": off_ratio},
        popularity={"zipf": zipf, "drift_period_s": drift},
        lengths={"family": _names(lengths), "file": lengths_file},
    )
    _check_out(out, [lengths_file] if lengths_file else [])
    trace = sample_trace(spec, tuple(_names(models)), rate, duration, seed)
    trace.to_csv(out)
    _show(trace, plot)
    typer.echo(f"wrote {out}")


@app.command()
def fit(
    files: Files,
    models: Models,
    out: Out,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second to reach, all models together.")
    ] = None,
    mapping: Annotated[Mapping, typer.Option(help="How services become models.")] = "auto",
    rescale: Annotated[Rescale, typer.Option(help="Thinning destroys bursts.")] = "dilate",
    start: Annotated[float, typer.Option(min=0, help="Window start, seconds.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Window length, seconds.")] = None,
    longest: Annotated[
        int | None,
        typer.Option(min=2, help="Leave out requests of more tokens, prompt and output."),
    ] = None,
    format: FormatOption = None,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    lengths: Lengths = "chat",
    plot: Plot = None,
) -> None:
    """Map a recorded trace to a fleet and a rate, and write it as a CSV."""
    _check_out(out, files)
    raw = read_trace(files, format, skip_bad, seed, lengths)
    window = None if start == 0 and duration is None else (start, duration)
    if longest is not None:
        raw = raw.without_longer(longest)
    trace = fit_to_fleet(raw, _names(models), mapping, rate, rescale, window, seed)
    trace.to_csv(out)
    _show(trace, plot)
    typer.echo(f"wrote {out}")


def _check_out(out: Path, inputs: list[Path]) -> None:
    """Refuse to write over an input, or over anything that mmrl did not write.

    Raises:
        InputError: That is where the trace should go.
    """
    if not out.exists():
        return
    if any(path.exists() and out.samefile(path) for path in inputs):
        raise InputError(f"--out {out} is read here", "choose another --out")
    if not is_written_trace(out):
        raise InputError(f"{out} is there and is no trace that mmrl wrote", "choose another --out")


def _show(trace: Trace, plot: Path | None) -> None:
    print_description(trace, Console())
    if plot is not None:
        write_plot(trace, plot)
        typer.echo(f"wrote {plot}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _spec(**sections: dict[str, Any]) -> WorkloadSpec:
    try:
        return WorkloadSpec.model_validate(sections)
    except ValidationError as error:
        raise InputError(first_error(error)) from None
