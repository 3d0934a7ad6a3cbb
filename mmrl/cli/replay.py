"""`mmrl replay`: a workload against a live server, with the result files of `mmrl evaluate`."""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mmrl.errors import InputError, unknown
from mmrl.scenarios.seeds import Split
from mmrl.workloads.fleet import Mapping

if TYPE_CHECKING:
    from mmrl.deploy.replay import Progress as RunProgress
    from mmrl.deploy.replay import Sent, Watch, Workload
    from mmrl.scenarios.targets import Targets

KEY = "MMRL_API_KEY"
DRAIN_S = 30.0
TARGETS = ("chat", "market", "sliding")  # relative ones need more than a trace tells
SHOWN_REASONS = 3  # why requests failed, the most frequent ones


def command(
    url: Annotated[str, typer.Option(help="Of the server, such as http://127.0.0.1:8000.")],
    trace: Annotated[
        list[Path] | None, typer.Argument(help="Recorded requests; several files are one trace.")
    ] = None,
    scenario: Annotated[
        str,
        typer.Option(help="Its episode is sent; with a trace, the trace as fitted to its node."),
    ] = "",
    episode: Annotated[
        int, typer.Option(min=0, help="Which episode, or which window of a trace.")
    ] = 0,
    split: Annotated[Split, typer.Option(help="Whose random streams.")] = "dev",
    load: Annotated[float, typer.Option(help="Of the scenario.")] = 1.0,
    time_scale: Annotated[
        float, typer.Option(help="Stretches time: 2 sends at half the rate.")
    ] = 1.0,
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", help="MODEL=SERVED where the server's name is another; repeat."),
    ] = None,
    mapping: Annotated[
        Mapping, typer.Option(help="How services of a trace without scenario become models.")
    ] = "auto",
    targets: Annotated[
        str,
        typer.Option(help=f"Latency targets of a trace without scenario: {', '.join(TARGETS)}."),
    ] = "chat",
    drain: Annotated[
        float | None,
        typer.Option(
            min=0, help=f"Seconds after a trace without scenario, {DRAIN_S:g} if not given."
        ),
    ] = None,
    warmup: Annotated[
        float, typer.Option(min=0, help="Seconds at the start that no figure counts.")
    ] = 0.0,
    simulate: Annotated[
        str,
        typer.Option(help="Policies that play the same arrivals in the simulator, by commas."),
    ] = "",
    name: Annotated[str, typer.Option(help="What the live row is called.")] = "live",
    seed: Annotated[int, typer.Option(min=0, help="Of the tokens in prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Results folder.")] = None,
) -> None:
    """Send a workload to a live server and record every token.

    Requests leave at their instants, whatever the answers. The server may be any that speaks
    OpenAI's protocol and takes ignore_eos; an API key is taken from MMRL_API_KEY. Ctrl-C stops,
    and writes what there is.
    """
    renames = _pairs(map_ or [])
    policies = [text.strip() for text in simulate.split(",") if text.strip()]
    if not trace and not scenario:
        raise InputError("nothing to send", "name a trace file or a --scenario")
    if scenario and drain is not None:
        raise InputError("--drain is the scenario's", "leave it out")
    _check_simulated(policies, scenario, time_scale, warmup)
    place = out or Path("runs") / f"live-{datetime.now():%Y%m%d-%H%M%S}"
    console = Console(highlight=False)

    from mmrl.agents.results import check_place, is_results
    from mmrl.cli.evaluate import COMPILING, print_results
    from mmrl.deploy import replay
    from mmrl.deploy import replay_results as results

    if is_results(place):  # what was measured live, perhaps for hours, cannot be had again
        raise InputError(f"{place} holds the results of another run", "choose another --out")
    check_place(place)
    served = asyncio.run(_served(url))
    with console.status(f"reading ({COMPILING})"):
        if scenario:
            workload = replay.episode_workload(scenario, split, episode, load, trace or ())
        else:
            workload = replay.trace_workload(
                trace or [],
                served,
                _targets(targets),
                DRAIN_S if drain is None else drain,
                renames,
                mapping,
            )
            renames = {}
        names = replay.served_names(workload, served, renames)
        beside = results.simulated(workload, policies) if policies else []
        workload = replay.stretched(workload, time_scale)
    _check_length(workload, warmup)
    with _progress(console, workload) as watch:
        run = asyncio.run(_send(url, workload, names, seed, warmup, watch))
    found = results.make_results(run, name, beside, url, seed)
    results.write(found, results.request_table(run), place)
    print_results(found, console)
    _print_run(run, place, console)
    if run.interrupted:
        raise typer.Exit(130)


def _check_simulated(
    policies: list[str], scenario: str, time_scale: float, warmup_s: float
) -> None:
    if policies and (not scenario or time_scale != 1 or warmup_s):
        raise InputError(
            "--simulate plays an episode of a --scenario whole and at its own pace",
            "name one, without --time-scale and --warmup",
        )


def _check_length(workload: "Workload", warmup_s: float) -> None:
    if len(workload.requests) == 0 or warmup_s >= workload.duration_s:
        raise InputError(
            f"{len(workload.requests)} requests in {workload.duration_s:g} s, the first "
            f"{warmup_s:g} s of them warm-up: nothing to measure",
            "take another episode, or warm up less",
        )


async def _served(url: str) -> list[str]:
    """Return the names of the server's models."""
    from mmrl.deploy.streams import Client

    client = Client(url, os.environ.get(KEY))
    try:
        return [model["id"] for model in await client.models()]
    finally:
        client.close()


async def _send(
    url: str,
    workload: "Workload",
    names: dict[str, str],
    seed: int,
    warmup_s: float,
    watch: "Watch | None",
) -> "Sent":
    from mmrl.deploy.replay import send
    from mmrl.deploy.streams import Client, allow_many_connections

    allow_many_connections()
    return await send(workload, names, Client(url, os.environ.get(KEY)), seed, warmup_s, watch)


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, served = text.partition("=")
        if not (name and equals and served):
            raise InputError(f"--map is '{text}', not a pair", "for example --map a=b")
        pairs[name] = served
    return pairs


def _targets(kind: str) -> "Targets":
    from mmrl.scenarios.targets import DEFAULTS, Targets

    if kind not in DEFAULTS:
        raise unknown("kind of targets", kind, TARGETS)
    return Targets.model_validate(kind)


@contextmanager
def _progress(console: Console, workload: "Workload") -> Iterator["Watch | None"]:
    """Show a bar with what is on the way; yields what is told of the progress."""
    from rich.progress import BarColumn, Progress, TextColumn

    total_s = workload.duration_s + workload.drain_s
    about = f"{len(workload.requests):,} requests in {workload.duration_s:g} s"
    console.print(f"sending {about}, and at most {workload.drain_s:g} s more for their answers")
    if not console.is_terminal:
        yield None
        return
    # Drawn only when told: a thread that draws on its own would hold up the sending.
    bar = Progress(
        TextColumn("{task.completed:.0f} s"),
        BarColumn(),
        TextColumn("{task.total:.0f} s   {task.description}"),
        console=console,
        transient=True,
        auto_refresh=False,
    )
    task = bar.add_task("", total=total_s)

    def watch(progress: "RunProgress") -> None:
        ended = ", ".join(f"{n:,} {what}" for what, n in progress.ended.items() if n)
        line = f"{progress.open:,} open, {ended or '0 done'}; {progress.tokens:,} tokens"
        bar.update(task, completed=progress.elapsed_s, description=line)
        bar.refresh()

    with bar:
        yield watch


def _print_run(run: "Sent", place: Path, console: Console) -> None:
    import numpy as np

    ends = ", ".join(f"{count:,} {outcome}" for outcome, count in run.outcomes.items() if count)
    tokens = sum(stream.tokens for stream in run.streams)
    console.print(f"\n{len(run.streams):,} requests: {ends}; {tokens:,} tokens")
    reasons = Counter(stream.reason for stream in run.streams if stream.reason)
    for reason, count in reasons.most_common(SHOWN_REASONS):
        console.print(f"{count:,} of them: {escape(reason)}", soft_wrap=True)
    for waits_s, what in ((run.lags_s, "late by"), (run.connecting_s, "connecting took")):
        if len(waits_s):
            middle, most = np.percentile(waits_s, (50, 99)) * 1e3
            console.print(f"{what} {middle:.1f} ms (median), {most:.1f} ms (p99)")
    console.print(f"\nwrote {escape(str(place))}", soft_wrap=True)
    console.print(f"a page about it: mmrl report {escape(str(place))}", soft_wrap=True)
