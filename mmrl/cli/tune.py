"""`mmrl tune`: search the parameters of a hand-written policy for a scenario."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from mmrl.errors import InputError

SplitName = Literal["train", "dev"]
ObjectiveName = Literal["goodput", "goodput-latency"]


def command(
    rule: Annotated[str, typer.Argument(help="Name of the rule.")],
    scenario: Annotated[str, typer.Argument(help="Name of a scenario, or its TOML file.")],
    split: Annotated[SplitName, typer.Option(help="Seeds to tune on.")] = "train",
    configs: Annotated[int, typer.Option(min=1, help="Candidates to draw.")] = 60,
    episodes: Annotated[
        int, typer.Option(min=1, help="Episodes that the last candidates play.")
    ] = 60,
    objective: Annotated[
        ObjectiveName,
        typer.Option(help="goodput-latency takes 0.005 x normalised latency off."),
    ] = "goodput",
    load: Annotated[
        float | None, typer.Option(min=0.001, help="A load in place of the scenario's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the candidates.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
    out: Annotated[Path, typer.Option(help="TOML file to add the result to.")] = Path(
        "runs/tuned.toml"
    ),
) -> None:
    """Tune a hand-written policy: random search with successive halving on paired episodes."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mmrl.rules import rule_class
    from mmrl.rules.registry import read_tuned
    from mmrl.scenarios.registry import get_scenario
    from mmrl.tuning import planned_episodes, tune, write_tuned

    wanted = rule_class(rule)
    if out.is_dir():
        raise InputError(f"{out} is a folder", "name a TOML file")
    if out.exists():
        read_tuned(out)  # says now rather than after the tuning that it is another file
    spec = get_scenario(scenario, **({} if load is None else {"load": load}))
    console = Console()
    planned = planned_episodes(wanted, configs, episodes)
    console.print(
        f"tuning {rule} for {spec.name} on {split} seeds: at most {configs} candidates and the "
        f"defaults, up to {episodes} episodes each, {planned:,} in all"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=planned)

        def report(played: int, best: float) -> None:
            progress.update(task, completed=played, description=f"best {best:.4f}")

        result = tune(
            wanted,
            spec,
            split=split,
            configs=configs,
            episodes=episodes,
            objective=objective,
            seed=seed,
            workers=workers,
            report=report,
        )
    table = Table("parameter", "default", "tuned", title=f"{rule} for {spec.name}")
    default = wanted()
    params = result.rule.model_dump(exclude_none=True)
    for name in type(result.rule).model_fields:
        table.add_row(name, f"{getattr(default, name)}", f"{getattr(result.rule, name)}")
    console.print(table)
    console.print(
        f"goodput {result.goodput:.4f}, normalised latency {result.norm_latency:.2f}; "
        f"objective {result.score:.4f}, of the defaults {result.default_score:.4f}"
    )
    line = (
        f"mmrl tune {rule} {scenario} --split {split} --configs {configs} --episodes {episodes} "
        f"--objective {objective} --seed {seed}{'' if load is None else f' --load {load:g}'}"
    )
    entry = {
        "command": line,
        "episodes_played": result.played,
        "objective": round(result.score, 5),
        "objective_of_defaults": round(result.default_score, 5),
        "goodput": round(result.goodput, 5),
        "norm_latency": round(result.norm_latency, 4),
        "params": params,
    }
    write_tuned(out, spec.name, rule, entry)
    console.print(f"wrote {out}")
    console.print(f"mmrl evaluate --policies {rule}@{out},{rule} --scenarios {scenario}")
