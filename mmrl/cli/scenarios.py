"""`mmrl scenarios`: what policies can be trained and judged on, and how hard it is."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrl.scenarios.seeds import Split

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mmrl.scenarios.mixture import ScenarioSampler
    from mmrl.scenarios.schema import Scenario
    from mmrl.workloads.generators import ArrivalSpec

app = typer.Typer(help="List, show, play and calibrate scenarios.", no_args_is_help=True)
KIND_STYLE = {"measured": "[green]measured[/]", "derived": "[yellow]derived[/]"}
CONTEXT_TOKENS = 1024
COMPILING = "reading (the first time, code is compiled: up to a minute)"
PROMPTS = (128, 1024, 4096)

Name = Annotated[str, typer.Argument(help="Name of a scenario, or path of a .toml file.")]


@app.command("list")
def list_scenarios() -> None:
    """List the scenarios that are shipped."""
    from mmrl.scenarios.registry import get_scenario, scenario_names

    console = Console()
    table = Table(
        box=None,
        pad_edge=False,
        collapse_padding=True,
        caption_justify="left",
        caption="GB: device memory; ratio: weights of the fleet over that memory;\n"
        "req/s: mean rate at load 1, of drawn fleets the median; core+p: with prefetch",
    )
    for heading in ("scenario", "platform", "kind", "models", "targets", "verbs"):
        table.add_column(heading, no_wrap=True)
    for heading in ("GB", "ratio", "req/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    with console.status(COMPILING):
        for name in scenario_names():
            sampler = get_scenario(name).sampler()
            scenario, platforms = sampler.scenario, sampler.bank.platforms
            table.add_row(
                name,
                "\n".join(platform.name for platform in platforms),
                "\n".join(KIND_STYLE[platform.kind] for platform in platforms),
                _fleet(scenario),
                scenario.targets.kind,
                scenario.verbs + ("+p" if scenario.prefetch else ""),
                _budget(scenario),
                _ratio(sampler),
                f"{sampler.rates_at_load_1[1]:.2f}",
            )
    console.print(table)


@app.command()
def show(name: Name) -> None:
    """Show all of a scenario: fleet, costs, targets, rate, and the file itself."""
    from mmrl.scenarios.registry import get_draft, scenario_path

    console = Console()
    with console.status(COMPILING):
        draft, calibrated = get_draft(name)
        sampler = draft.sampler()
    scenario = sampler.scenario
    console.print(f"[bold]{escape(scenario.name)}[/]: {escape(scenario.description)}\n")
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for label, value in _facts(sampler):
        facts.add_row(label, value)
    console.print(facts)
    if not calibrated:
        remedy = f"load 1 is not known yet, the rate is an example: mmrl scenarios calibrate {name}"
        console.print(f"\n{escape(remedy)}", soft_wrap=True)
    for k in range(len(sampler.bank.platforms)):
        console.print()
        console.print(_models(sampler, k))
    path = scenario_path(name)
    console.print(f"\n[dim]{escape(str(path))}[/]", soft_wrap=True)
    typer.echo(path.read_text(encoding="utf-8"))


@app.command()
def play(
    name: Name,
    policy: Annotated[
        str, typer.Option(help="As mmrl evaluate --policies names them: slack, mpc, runs/x.")
    ] = "slack",
    episode: Annotated[int, typer.Option(min=0, help="Which one of the split.")] = 0,
    load: Annotated[float, typer.Option(help="At which load.")] = 1.0,
    split: Annotated[Split, typer.Option(help="Whose random streams.")] = "test",
    perfetto: Annotated[
        Path | None, typer.Option(help="Write the episode as a trace for ui.perfetto.dev.")
    ] = None,
) -> None:
    """Play one episode, say how it went, and show it in Perfetto: loads, queues, each request."""
    from mmrl.agents.recording import play_episode
    from mmrl.envs.perfetto import MISSES, export
    from mmrl.metrics import met_targets

    console = Console(highlight=False)
    with console.status(COMPILING):
        log = play_episode(name, policy, load, split, episode)
    met = int(met_targets(log.requests.view(np.recarray)).sum())
    missed = np.bincount(log.requests["miss"], minlength=len(MISSES)).tolist()[1:]
    counts = [met, *missed, len(log.requests) - met - sum(missed)]
    words = "in time", *MISSES[1:], "unfinished"
    outcomes = ", ".join(f"{n} {what}" for what, n in zip(words, counts, strict=True) if n)
    console.print(
        f"{escape(policy)} on {escape(log.info.scenario)}, {split} episode {episode}: "
        f"{log.info.requests} requests in {log.timeline.time_s[-1]:.0f} s at load {load:g}: "
        f"{outcomes or 'nothing to do'}",
        soft_wrap=True,
    )
    if perfetto is not None:
        export(log, perfetto)
        console.print(
            f"wrote {escape(str(perfetto))}; open it on https://ui.perfetto.dev", soft_wrap=True
        )


@app.command()
def calibrate(
    name: Name,
    episodes: Annotated[int, typer.Option(min=1, help="Development episodes to play.")] = 100,
) -> None:
    """Find the utilisation at which load is 1: there the slack rule's goodput is .90."""
    from mmrl.scenarios.calibrate import GOODPUT, RULE, goodput_at
    from mmrl.scenarios.calibrate import calibrate as search
    from mmrl.scenarios.registry import get_draft

    console = Console(highlight=False)
    scenario, _ = get_draft(name)
    for k, part in enumerate(scenario.parts(), 1):
        if scenario.variants:
            names = ", ".join(part.platform)
            console.print(f"\nvariant {k}: {names}, {part.targets.describe()}")
        with console.status(f"playing {episodes} episodes for each utilisation"):
            found, goodput = search(
                part,
                lambda scenario, utilisation: goodput_at(scenario, utilisation, episodes),
                lambda tried, reached: console.print(
                    f"utilisation {tried:.3f}: goodput {reached:.4f}"
                ),
            )
        rates = _rates(part.model_copy(update={"utilisation_at_load_1": found}).sampler())
        console.print(f"\n{RULE} has a goodput of {goodput:.4f} (wanted: {GOODPUT:g}). Load 1 is")
        typer.echo(
            f"utilisation_at_load_1 = {found:g}  # {rates} requests/s: "
            f"mmrl scenarios calibrate {name} --episodes {episodes}"
        )


def _facts(sampler: "ScenarioSampler") -> list[tuple[str, str]]:
    scenario = sampler.scenario
    low, high = scenario.load
    jitter = f"costs jittered by up to {scenario.jitter:.0%}" if scenario.jitter else "no jitter"
    targets = scenario.targets
    facts = [
        (
            "platform",
            ", ".join(f"{p.name} ({KIND_STYLE[p.kind]})" for p in sampler.bank.platforms),
        ),
        ("fleet", _long_fleet(scenario)),
        ("budget", _long_budget(sampler)),
        ("verbs", scenario.verbs + (", prefetch allowed" if scenario.prefetch else "")),
        ("dispatch", scenario.dispatch),
        ("targets", targets.describe()),
    ]
    if scenario.workload is not None:
        facts += [
            ("arrivals", _words(scenario.workload.arrivals, _unused(scenario.workload.arrivals))),
            ("popularity", _words(scenario.workload.popularity)),
            ("lengths", _words(scenario.workload.lengths)),
        ]
    facts += [("trace", note) for note in sampler.trace_notes]
    facts += [
        ("load", f"{low:g}" if low == high else f"{low:g} to {high:g}"),
        (
            "rate at load 1",
            f"{_rates(sampler)} requests/s (utilisation {scenario.utilisation_at_load_1:g})",
        ),
        (
            "episode",
            f"{scenario.duration_s:g} s of arrivals, {scenario.drain_s:g} s to drain, {jitter}",
        ),
        (
            "decisions",
            f"on events after {scenario.latency_s * 1e3:g} ms, and every {scenario.interval_s:g} s",
        ),
        (
            "reward",
            f"-{scenario.reward.miss:g} for a miss, -{scenario.reward.latency:g} for each second "
            "in the system over the latency alone",
        ),
    ]
    return facts


def _models(sampler: "ScenarioSampler", platform: int) -> Table:
    """Tabulate the architectures of the fleet on a platform."""
    bank = sampler.bank
    spec = bank.platforms[platform]
    table = Table(
        box=None,
        pad_edge=False,
        title=f"on {spec.name} ({KIND_STYLE[spec.kind]})",
        title_justify="left",
        title_style="bold",
        caption=f"decode: a step of one sequence of {CONTEXT_TOKENS:,} tokens, overhead included;\n"
        "KV: per token; "
        f"TTFT: target for {', '.join(f'{p:,}' for p in PROMPTS)} prompt tokens",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    for heading in ("GB", "layers", "load s", "decode ms", "KV kB", "TTFT s", "TPOT ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in range(len(bank.models)):
        row = bank.row(platform, model)
        profile = bank.profiles[row]
        targets = [_targets_s(sampler, row, prompt) for prompt in PROMPTS]
        left_out = row not in sampler.rows(platform)
        table.add_row(
            profile.model + (" (too large)" if left_out else ""),
            f"{profile.weight_bytes / 1e9:.1f}",
            f"{profile.layers}",
            f"{profile.load.seconds(profile.weight_bytes):.2f}",
            f"{bank.decode_tables[row, 1, 1] * 1e3:.1f}",
            f"{profile.kv_bytes_per_token / 1e3:.0f}",
            "/".join(f"{ttft:.2g}" for ttft, _ in targets),
            f"{targets[0][1] * 1e3:.0f}",
        )
    return table


def _targets_s(sampler: "ScenarioSampler", row: int, prompt: int) -> tuple[float, float]:
    from mmrl.profiles.costs import prefill_alone_ns
    from mmrl.scenarios.targets import targets_ns

    alone_ns = prefill_alone_ns(sampler.prefill_tables[row], 1.0, prompt)
    step_ns = sampler.decode_tables[row, 1, 0] * 1e9
    ttft_ns, tpot_ns = targets_ns(sampler.scenario.targets.numbers, prompt, alone_ns, step_ns)
    return ttft_ns / 1e9, tpot_ns / 1e9


def _fleet(scenario: "Scenario") -> str:
    if scenario.fleet is None:
        return f"{scenario.largest_fleet}"
    low, high = scenario.fleet.size
    return f"{low}" if low == high else f"{low}-{high}"


def _budget(scenario: "Scenario") -> str:
    if scenario.budget_fraction is None:
        return f"{scenario.budget_gb:g}"
    low, high = (round(100 * fraction) for fraction in scenario.budget_fraction)
    return f"{low} %" if low == high else f"{low}-{high} %"


def _long_fleet(scenario: "Scenario") -> str:
    fleet = scenario.fleet
    if fleet is None:
        return ", ".join(scenario.models or ())
    rule = f", at least one of {', '.join(fleet.at_least_one_of)}" if fleet.at_least_one_of else ""
    return f"{_fleet(scenario)} of {', '.join(fleet.choose_from)}{rule}"


def _long_budget(sampler: "ScenarioSampler") -> str:
    unit = " GB" if sampler.scenario.budget_gb is not None else " of the fleet's weights"
    return f"{_budget(sampler.scenario)}{unit}; weights over budget {_ratio(sampler)}"


def _ratio(sampler: "ScenarioSampler") -> str:
    """Say the weights of the fleet over the budget; as drawn at the ends of a range."""
    scenario = sampler.scenario
    if scenario.budget_fraction is not None:
        low, high = (1 / fraction for fraction in reversed(scenario.budget_fraction))
    elif scenario.budget_gb is not None:
        sizes = sorted(int(sampler.bank.weight_bytes[row]) for row in sampler.rows(0))
        least = most = sum(sizes)
        if scenario.fleet is not None:
            least, most = scenario.fleet.size[0] * sizes[0], scenario.fleet.size[1] * sizes[-1]
        low, high = (total / 1e9 / scenario.budget_gb for total in (least, most))
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f}-{high:.1f}"


def _rates(sampler: "ScenarioSampler") -> str:
    low, median, high = (f"{rate:.3g}" for rate in sampler.rates_at_load_1)
    return median if low == high else f"{median} ({low} to {high})"


def _unused(arrivals: "ArrivalSpec") -> set[str]:
    """Return the fields that no kind of these arrivals looks at."""
    fields = {"gamma": {"cv"}, "onoff": {"on_s", "off_ratio"}}
    return set().union(*(fields[kind] for kind in fields if kind not in arrivals.kind))


def _words(spec: "BaseModel", unused: Collection[str] = ()) -> str:
    """Say the fields that matter of a part of the workload, ranges as "low to high"."""
    words = []
    for field, value in spec.model_dump(mode="json").items():
        if field in unused or value in (None, [], [0.0, 0.0]):
            continue
        if isinstance(value, list) and len(value) == 2 and not isinstance(value[0], str):
            value = f"{value[0]:g}" if value[0] == value[1] else f"{value[0]:g} to {value[1]:g}"
        elif isinstance(value, list):
            value = ", ".join(str(part) for part in value)
        words.append(f"{field} {value}")
    return "; ".join(words)
