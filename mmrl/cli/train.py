"""`mmrl train`: train a PPO scheduler."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrl.errors import InputError

if TYPE_CHECKING:
    from mmrl.agents.config import TrainConfig

UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
TIMES = {"s": 1, "m": 60, "h": 3600}
RESUMED = ("--resume", "--steps", "--time")  # what goes together


def command(
    context: typer.Context,
    scenarios: Annotated[
        list[str] | None,
        typer.Argument(help="Names (mmrl scenarios list) or paths; several are mixed."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Decisions to learn from, in all: 500k, 2M.",
            show_default="2M, unlimited with --time",
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="Stop after so long, if that comes first: 90s, 10m, 1h; of --resume, from now on."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the network and of all episodes.")] = 0,
    name: Annotated[
        str, typer.Option(help="Of the run's folder.", show_default="scenario and seed")
    ] = "",
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue the run in this folder as it began; only --steps and --time may change."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="Go on from a policy: default, the folder of a run or of a policy."
        ),
    ] = None,
    verbs: Annotated[
        str | None,
        typer.Option(
            help="core, full or both (one policy for either).", show_default="the scenario's"
        ),
    ] = None,
    prior: Annotated[
        bool, typer.Option(help="Start from a rule (partial) and learn where to deviate from it.")
    ] = True,
    privileged: Annotated[
        bool, typer.Option(help="Let the critic see the future; the policy never does.")
    ] = True,
    envs: Annotated[
        int | None, typer.Option(help="Nodes simulated side by side.", show_default="256")
    ] = None,
    threads: Annotated[
        int, typer.Option(help="Threads; the result does not depend on their number.")
    ] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, see below: --set kl=0.05"),
    ] = None,
) -> None:
    """Train a PPO scheduler on scenarios.

    The run's folder holds the best policy (by goodput on development seeds), the
    last one, logs for TensorBoard and everything to continue. Ctrl-C stops after
    the present iteration.

      mmrl train fast --time 10m
      mmrl train universal --verbs both --time 1h
      mmrl train mine.toml --from default --time 5m
      mmrl train --resume runs/fast-s0 --steps 4M

    Settings for --set: prior (the name of a rule), beta, width, rollout_steps,
    batch_size, epochs, learning_rate, kl, clip, discount_s, trace_s,
    max_grad_norm, critic_first, eval_every, eval_episodes, processes (that play
    nodes in place of the threads), device; and to switch
    parts off: elapsed_time, paced, clip_apart, randomise, jitter, miss_weight,
    latency_weight, without (verbs, by commas).
    """
    from mmrl.agents.config import UNLIMITED_STEPS, build_config

    total = number(steps, UNITS, "steps") if steps is not None else None
    time_s = number(time, TIMES, "time") if time is not None else None
    if resume is not None:
        folder = _resume(resume, total, time_s, _given(context))
    else:
        if not scenarios:
            raise InputError("no scenario given", "mmrl scenarios list shows them")
        values: dict[str, Any] = {
            "scenarios": tuple(scenarios),
            "time_s": time_s,
            "seed": seed,
            "name": name,
            "verbs": verbs,
            "start": start,
            "privileged": privileged,
            "threads": threads,
            "out": out,
            **({} if envs is None else {"envs": envs}),
            **({} if prior else {"prior": None}),
            **read_settings(set_ or []),
        }
        if total is not None:
            values["steps"] = int(total)
        elif time_s is not None:
            values["steps"] = UNLIMITED_STEPS
        folder = _train(build_config(**values))
    _tell(folder)


def _tell(folder: Path) -> None:
    """Say what a run came to, and what to do with it."""
    from mmrl.agents.runs import read_metrics
    from mmrl.agents.train import read_config

    metrics = read_metrics(folder)
    evaluated = metrics.dropna(subset=["eval/score"])
    if len(evaluated):
        best = evaluated.iloc[int(evaluated["eval/score"].to_numpy().argmax())]
        line = f"best on development seeds: goodput {best['eval/goodput']:.4f}"
        if "eval/goodput_gain" in best:
            line += (
                f", {best['eval/goodput_gain']:+.4f} (standard error "
                f"{best['eval/goodput_gain_error']:.4f}) against the rule it builds on"
            )
        typer.echo(f"{line}, after {int(best['eval/step'])} decisions")
    names = ",".join(read_config(folder).scenarios)
    typer.echo(f"{folder}: {int(metrics['step'].iloc[-1])} decisions")
    typer.echo(
        f"continue it: mmrl train --resume {folder} (with more --steps or --time if it is over)"
    )
    typer.echo(f"compare it: mmrl evaluate --policies {folder},slack --scenarios {names}")


def number(text: str, units: dict[str, int], name: str) -> float:
    """Read a number with a unit at its end."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or float(match[1]) <= 0:
        example = "500k or 2M" if name == "steps" else "90s, 10m or 1h"
        raise InputError(f"{name} is '{text}'", f"write {example}")
    return float(match[1]) * units[match[2]]


def read_settings(pairs: list[str]) -> dict[str, str]:
    """Read ``name=value`` pairs."""
    found = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise InputError(f"--set {pair}: no value", "write --set name=value")
        found[key.strip()] = value.strip()
    return found


def _given(context: typer.Context) -> list[str]:
    """Return the names of the arguments and options that the user gave."""
    found = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            is_off = context.params[parameter.name or ""] is False
            found.append((parameter.secondary_opts if is_off else parameter.opts)[0])
    return found


def _train(config: "TrainConfig") -> Path:
    """Train behind a progress bar; return the run's folder."""
    from mmrl.agents.export import load_policy
    from mmrl.agents.progress import ProgressBar
    from mmrl.agents.runs import new_run
    from mmrl.agents.train import check_device, train
    from mmrl.rules import rule_class
    from mmrl.scenarios.registry import get_scenario

    # What is wrong with these is told before a bar says that something is being prepared.
    for scenario in config.scenarios:
        get_scenario(scenario)
    if config.start:
        load_policy(config.start)
    elif config.prior:
        rule_class(config.prior)
    check_device(config)
    if config.name:
        new_run(config.out, config.name)
    with ProgressBar(config.steps, config.time_s) as bar:
        return train(config, bar)


def _resume(folder: Path, steps: float | None, time_s: float | None, given: list[str]) -> Path:
    """Continue a run behind a progress bar; return its folder.

    Raises:
        InputError: It is no run, or more was given than may change in one.
    """
    from mmrl.agents.progress import ProgressBar
    from mmrl.agents.train import check_device, read_config, resume, resumed

    config = read_config(folder)
    kept = [name for name in given if name not in RESUMED]
    if kept:
        raise InputError(
            f"{', '.join(kept)} with --resume: a run stays as it began", "leave that out"
        )
    total = None if steps is None else int(steps)
    config = resumed(folder, total, time_s)
    check_device(config)
    with ProgressBar(config.steps, config.time_s if time_s is None else time_s) as bar:
        return resume(folder, total, time_s, bar)
