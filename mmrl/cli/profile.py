"""`mmrl profile`: what is known about models on platforms, and whether it can be trusted."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrl.cli.profile_run import run
from mmrl.errors import InputError

if TYPE_CHECKING:
    from mmrl.profiles.schema import Platform, Profile, Transfer

app = typer.Typer(help="Measure models; list, show and check profiles.", no_args_is_help=True)
app.command()(run)
CONTEXT_TOKENS = 1024
LINK_RATES = (
    ("page-locked", "h2d_bytes_per_s", "d2h_bytes_per_s"),
    ("page-locked, both at once", "both_h2d_bytes_per_s", "both_d2h_bytes_per_s"),
    ("pageable", "pageable_h2d_bytes_per_s", "pageable_d2h_bytes_per_s"),
)
OVERHEAD = (  # field, what takes that much longer
    ("decode_s", "a decode step"),
    ("prefill_s", "a prefill chunk"),
    ("kv_s", "a KV save or restore"),
    ("settle_s", "the first decode step of a segment, besides"),
    ("piece_s", "a piece of a load while others compute"),
)
KIND_STYLE = {"measured": "[green]measured[/]", "derived": "[yellow]derived[/]"}


@app.command("list")
def list_profiles() -> None:
    """List every model on every platform, measured and derived."""
    from mmrl.profiles import registry
    from mmrl.profiles.costs import CostModel

    table = Table(
        box=None,
        pad_edge=False,
        caption_justify="left",
        caption=f"b1, b32: a decode step of 1 and 32 sequences of {CONTEXT_TOKENS:,} tokens,\n"
        "the overhead (mmrl profile show) included; KV: per token; 1 GB = 1e9 bytes",
    )
    for name in ("platform", "model", "kind"):
        table.add_column(name, no_wrap=True)
    for name in ("GB", "b1 ms", "b32 ms", "load s", "KV kB"):
        table.add_column(name, justify="right", no_wrap=True)
    for platform in registry.platforms():
        for i, model in enumerate(registry.models(platform)):
            profile = registry.get_profile(platform, model)
            costs = CostModel(profile)
            table.add_row(
                "" if i else platform,
                model,
                KIND_STYLE[profile.kind],
                f"{profile.weight_bytes / 1e9:.2f}",
                f"{costs.decode_s(1, CONTEXT_TOKENS) * 1e3:.1f}",
                f"{costs.decode_s(32, CONTEXT_TOKENS) * 1e3:.1f}",
                f"{costs.load_s(profile.weight_bytes):.2f}",
                f"{profile.kv_bytes_per_token / 1e3:.0f}",
            )
        table.add_row()
    Console().print(table)


@app.command()
def show(
    platform: Annotated[str, typer.Argument(help="Name of a platform, or path of its folder.")],
    model: Annotated[
        str | None, typer.Argument(help="Name of a model, or path of its file; all if left out.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a plot of decode time against residency (HTML) here."),
    ] = None,
) -> None:
    """Show all numbers of one profile, or a platform with its models."""
    from mmrl.profiles import registry

    console = Console()
    if model is None:
        record = registry.get_platform(platform)
        profiles = [registry.get_profile(platform, name) for name in registry.models(platform)]
        _print_platform(console, record, profiles)
    else:
        profiles = [registry.get_profile(platform, model)]
        _print_profile(console, profiles[0])
    if plot is not None:
        _write_plot(plot, profiles)
        console.print(f"plot: {plot}", soft_wrap=True)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Profile or platform files (JSON).")],
) -> None:
    """Check files, and tell how well each table predicts its own points (leave one out)."""
    from mmrl.profiles.registry import PLATFORM_FILE
    from mmrl.profiles.schema import Profile, load_platform, load_profile

    console = Console()
    measured = []
    for path in files:
        record = load_platform(path) if path.name == PLATFORM_FILE else load_profile(path)
        console.print(f"{escape(str(path))}: valid, {KIND_STYLE[record.kind]}", soft_wrap=True)
        if isinstance(record, Profile) and record.kind == "measured":
            measured.append(record)
    if measured:
        _print_errors(console, measured)


def _print_platform(console: Console, platform: "Platform", profiles: list["Profile"]) -> None:
    console.print(f"[bold]{platform.name}[/] ({KIND_STYLE[platform.kind]}): {platform.description}")
    table = _table()
    gb = [
        ("memory", platform.memory_bytes),
        ("usable memory", platform.usable_bytes),
        ("host memory for KV", platform.host_kv_bytes),
    ]
    for name, n_bytes in gb:
        table.add_row(name, f"{n_bytes / 1e9:.1f} GB")
    table.add_row("default budgets", ", ".join(f"{b:g} GB" for b in platform.budgets_gb))
    table.add_row("link", f"{platform.link_bytes_per_s / 1e9:.1f} GB/s")
    table.add_row("memory bandwidth", f"{platform.limits.memory_bytes_per_s / 1e12:.2f} TB/s")
    table.add_row("compute", f"{platform.limits.compute_flop_per_s / 1e12:.0f} TFLOP/s")
    for name in ("load", "stream", "kv_save", "kv_restore"):
        table.add_row(name, _transfer(getattr(platform, name)))
    if platform.link_rates is not None:
        rate = {name: f"{x / 1e9:.1f}" for name, x in platform.link_rates.model_dump().items()}
        for i, (label, down, up) in enumerate(LINK_RATES):
            table.add_row(
                "" if i else "copies, GB/s", f"{rate[down]} to the device, {rate[up]} back, {label}"
            )
    if platform.disk is not None:
        table.add_row("disk", f"{platform.disk.bytes_per_s / 1e9:.2f} GB/s, nothing cached")
    table.add_row("models", ", ".join(f"{p.model} ({p.kind})" for p in profiles))
    _print_provenance(console, table, platform)


def _print_profile(console: Console, profile: "Profile") -> None:
    from mmrl.profiles.costs import CostModel
    from mmrl.study.formulas import host_crossing_tokens

    console.print(f"[bold]{profile.model}[/] on {profile.platform} ({KIND_STYLE[profile.kind]})")
    table = _table()
    table.add_row("parameters", f"{profile.parameters / 1e9:.2f} billion")
    table.add_row(
        "weights",
        f"{profile.weight_bytes / 1e9:.2f} GB = {profile.base_bytes / 1e9:.2f} GB base + "
        f"{profile.layers} layers of {profile.layer_bytes / 1e6:.1f} MB",
    )
    table.add_row("KV cache", f"{profile.kv_bytes_per_token:,} bytes per token")
    table.add_row("workspace", f"{profile.workspace_bytes / 1e9:.2f} GB")
    table.add_row("captured graphs", f"{profile.graphs_bytes / 1e9:.2f} GB")
    for i, point in enumerate(profile.decode):
        table.add_row(
            "" if i else "decode step",
            f"{point.time_s * 1e3:8.2f} ms  "
            f"batch {point.batch}, {_tokens(point.context_tokens)} each",
        )
    for name, field in (
        ("prefill", profile.prefill),
        ("streamed layer", profile.streamed_layer_s),
        ("layer on the host", profile.host_layer_s),
        ("model on the host", profile.host_model_s),
    ):
        for i, at in enumerate(field):
            table.add_row("" if i else name, f"{at.time_s * 1e3:8.2f} ms  {_tokens(at.tokens)}")
    for name in ("load", "stream", "kv_save", "kv_restore"):
        table.add_row(name, _transfer(getattr(profile, name)))
    for i, text in enumerate(_overhead(profile)):
        table.add_row("" if i else "overhead", text)
    costs = CostModel(profile)
    table.add_row("whole load", f"{costs.load_s(profile.weight_bytes):.3f} s")
    if profile.disk is not None:
        table.add_row(
            "from disk", f"{profile.disk.seconds(profile.weight_bytes):.2f} s before that"
        )
    if profile.slowdown is not None:
        factors = (f"{x:.2f} {name}" for name, x in profile.slowdown.model_dump().items())
        table.add_row("step slower", ", ".join(factors).replace("_", " a "))
    crossing = host_crossing_tokens(costs)
    if crossing is not None and math.isfinite(crossing):
        table.add_row("not on the host", f"streamed is faster from {_tokens(round(crossing))} on")
    _print_provenance(console, table, profile)
    if profile.kind == "measured":
        _print_errors(console, [profile])


def _overhead(profile: "Profile") -> list[str]:
    """Say what takes longer in the loop of a busy node, and who counts it in."""
    if profile.overhead is None:
        return ["not measured: the times above are the prices"]
    rows = [
        f"{seconds * 1e3:8.2f} ms  {what}"
        for field, what in OVERHEAD
        if (seconds := getattr(profile.overhead, field)) is not None
    ]
    return [
        *rows,
        "in the loop of a busy node: not in the times above, but in the prices of mmrl profile run "
        "and list, mmrl scenarios and the simulator",
    ]


def _print_provenance(console: Console, table: Table, record: "Platform | Profile") -> None:
    provenance = record.provenance
    table.add_row("source", provenance.source)
    table.add_row("made by", provenance.command)
    table.add_row("hardware", f"{provenance.gpu}; {provenance.link}")
    table.add_row("date, driver", f"{provenance.date or '-'}, {provenance.driver or '-'}")
    libraries = ", ".join(f"{name} {version}" for name, version in provenance.libraries.items())
    table.add_row("libraries", libraries or "-")
    repeats = ", ".join(f"{name} {count}" for name, count in provenance.repeats.items())
    table.add_row("repeats", repeats or "-")
    spread = ", ".join(f"{name} {x:.1%}" for name, x in provenance.spread_relative.items())
    table.add_row("spread", spread or "-")
    for i, note in enumerate(provenance.notes):
        table.add_row("" if i else "notes", note)
    console.print(table)


def _print_errors(console: Console, profiles: list["Profile"]) -> None:
    import numpy as np

    from mmrl.profiles.costs import CostModel

    console.print("\nleave one out: each point predicted from the others of its table")
    table = Table(box=None, pad_edge=False)
    for name in ("model", "table"):
        table.add_column(name, no_wrap=True)
    for name in ("points", "median", "p90"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst point (*: extrapolated)")
    for profile in profiles:
        held_out = CostModel(profile).leave_one_out()
        for name in dict.fromkeys(held.table for held in held_out):
            rows = [held for held in held_out if held.table == name]
            errors = np.abs([held.error for held in rows])
            worst = max(rows, key=lambda held: abs(held.error))
            table.add_row(
                profile.model,
                name,
                str(len(rows)),
                f"{np.median(errors):.1%}",
                f"{np.quantile(errors, 0.9):.1%}",
                f"{worst.error:+.1%} {worst.point}{' *' if worst.extrapolated else ''}",
            )
    console.print(table)


def _table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    return table


def _transfer(transfer: "Transfer") -> str:
    return f"{transfer.fixed_s * 1e3:.2f} ms + bytes / {transfer.bytes_per_s / 1e9:.2f} GB/s"


def _tokens(count: int) -> str:
    return f"{count:,} token" if count == 1 else f"{count:,} tokens"


def _write_plot(path: Path, profiles: list["Profile"]) -> None:
    from mmrl.files import atomic_write
    from mmrl.profiles.figure import residency_figure

    if path.suffix != ".html":
        raise InputError(f"--plot: '{path}' is not an HTML file", "give a name that ends in .html")
    with atomic_write(path) as file:
        file.write(residency_figure(profiles).to_html(config={"displayModeBar": False}))
