"""Write the card of a trained policy: what it learned from, how it does, where it loses.

    python benchmarks/model_card.py RUN RESULT [--policy NAME] [--out docs/model_card.md]

RUN is the folder of the training run, RESULT a ``result.json`` of ``mmrl evaluate --suite``, NAME
the policy's name in it (its group of seeds first, unless given). Every figure comes from the two,
but for those of `OVERSIZED`, which its own command gives.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mmrl.agents import runs
from mmrl.agents.config import TrainConfig
from mmrl.agents.export import DESCRIPTION, WEIGHTS, load_policy
from mmrl.agents.suite import read
from mmrl.agents.suite_policies import COMPARATORS, FOR
from mmrl.agents.suite_results import rows_of
from mmrl.agents.train import read_config, read_scenarios
from mmrl.errors import InputError
from mmrl.scenarios.schema import Scenario

Row = dict[str, Any]
OVERSIZED = (  # no cell shows it: its requests are few, and the fleet's goodput is a gain
    "A model larger than the memory is answered late. On `oversized` 1.2 % of the 14B's requests "
    "meet their targets (slack and partial 1.4 %, lru 21.7 %), and on average they take 36 times "
    "as long as alone. The fleet's 94.0 % are made by the three other models (98.6 %; lru 62.7 %): "
    "511 of 11,136 requests are the 14B's. `mmrl evaluate --policies default,slack,partial,lru "
    "--scenarios oversized --episodes 100`"
)


def training(folder: Path) -> list[str]:
    """Describe what a policy was trained on, and with what."""
    config = read_config(folder)
    policy = load_policy(folder)
    card = policy.card
    files = [folder / runs.BEST / name for name in (WEIGHTS, DESCRIPTION)]
    size_kb = sum(file.stat().st_size for file in files) / 1e3
    parameters = sum(array.size for array in policy.weights.values())
    last = runs.read_metrics(folder).iloc[-1]
    prior = "none" if card.prior is None else f"`{card.prior.name}`"
    lines = [
        "## Training",
        "",
        "| | |",
        "|---|---|",
        f"| network | {parameters:,} parameters, {config.width} wide, {size_kb:.0f} kB |",
        f"| verbs | {card.verb_set} |",
        f"| residual on | {prior} |",
        f"| decisions | {card.steps:,} (of {int(last['step']):,}; the best on development seeds) |",
        f"| seed | {card.seed} |",
        f"| started from | {_start(config)} |",
        f"| nodes | {config.envs} side by side, {config.rollout_steps} decisions a rollout |",
        f"| made with | {', '.join(f'{k} {v}' for k, v in sorted(card.versions.items()))} |",
        f"| commit | {card.git_commit or 'unknown'} |",
        "",
        "Training distribution:",
        "",
        "| scenario | platform | fleet | budget | load | targets |",
        "|---|---|---|---|---|---|",
    ]
    for scenario in read_scenarios(folder, config):
        for part in scenario.parts():
            lines.append(_scenario_row(scenario.name, part))
    return lines


def _start(config: TrainConfig) -> str:
    """Describe what a run went on from."""
    if not config.start:
        return "nothing"
    folder = Path(config.start)
    if not (folder / runs.CONFIG).is_file():
        return folder.name
    first, steps = read_config(folder), int(runs.read_metrics(folder).iloc[-1]["step"])
    scenarios = ", ".join(f"`{name}`" for name in first.scenarios)
    before = f", these from {_start(first)}" if first.start else ""
    return f"{steps:,} decisions of {scenarios} with {first.verbs} verbs{before}"


def _scenario_row(name: str, part: Scenario) -> str:
    fleet = f"{len(part.models or ())} models"
    if part.fleet is not None:
        low, high = part.fleet.size
        sizes = f"{len(part.fleet.choose_from)} measured sizes"
        between = f", {part.fleet.between} between each two" if part.fleet.between else ""
        fleet = f"{low} to {high} of {sizes}{between}"
    budget = f"{part.budget_gb} GB"
    if part.budget_fraction is not None:
        low_share, high_share = part.budget_fraction
        budget = f"{low_share:.0%} to {high_share:.0%} of the weights"
    load = f"{part.load[0]:g} to {part.load[1]:g}"
    cells = (name, ", ".join(part.platform), fleet, budget, load, part.targets.describe())
    return f"| {' | '.join(cells)} |"


def benchmark(result: Row, policy: str) -> list[str]:
    """Tabulate how a policy does against the stronger comparator, and where it loses."""
    pools = [row for row in result["pools"] if row["policy"] == policy and row["stronger"]]
    if not pools:
        known = sorted({row["policy"] for row in result["pools"]})
        raise InputError(f"the result has no policy '{policy}'", f"known: {', '.join(known)}")
    lines = [
        "## Benchmark",
        "",
        "Points of goodput over the best rule of the stronger comparator, paired by episode, with "
        "95 % intervals.",
        "",
        "| pool | cells | goodput | normalised latency | worst model | p99 TTFT, s (rule) |",
        "|---|---|---|---|---|---|",
    ]
    for row in pools:
        cells = [
            row["pool"],
            str(row["cells"]),
            _interval(row, "goodput", 100),
            _interval(row, "norm_latency", 1),
            _interval(row, "goodput_worst_model", 100),
            f"{row['all_ttft_p99_s']:.2f} ({row['all_ttft_p99_s_reference']:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    there = [row for row in result["zero_shot"] if row["policy"] == policy]
    if there:
        lines += ["", "Against policies that were trained for the very cells (zero-shot):", ""]
        lines += ["| cells | their seeds | points of goodput |", "|---|---|---|"]
    for row in there:
        cells = row["against"].partition(FOR)[2]
        lines.append(f"| {cells} | {row['seeds_against']} | {_interval(row, 'goodput', 100)} |")
    losses = [
        row
        for row in result["compared"]
        if row["policy"] == policy and row["reference"] in COMPARATORS and row["goodput_high"] < 0
    ]
    lines += ["", "## Known losses", ""]
    if not losses:
        lines += ["In no cell is its goodput surely below that of the best rule.", "", OVERSIZED]
        return lines
    lines += ["| cell | best rule | points of goodput |", "|---|---|---|"]
    for row in sorted(losses, key=lambda row: float(row["goodput"])):
        lines.append(f"| {row['cell']} | {row['rule']} | {_interval(row, 'goodput', 100)} |")
    return [*lines, "", OVERSIZED]


def _interval(row: Row, name: str, scale: float) -> str:
    estimate, low, high = (scale * row[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{estimate:+.2f} [{low:+.2f}, {high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--policy", default="")
    parser.add_argument("--out", type=Path, default=Path("docs/model_card.md"))
    given = parser.parse_args()
    result = read(given.result)
    for table in ("pools", "compared", "zero_shot"):
        result[table] = rows_of(result[table])
    rows = result["pools"]
    if not rows:
        parser.error(f"{given.result} compares no learned policy")
    name = given.policy or max(rows, key=lambda row: int(row["seeds"]))["policy"]
    lines = [
        "# Model card of the default policy",
        "",
        "Decides when the models that share a device are loaded, put out, paused and resumed. It "
        "sees ratios and times of the node, no names; it is used through `mmrl serve` and "
        "`mmrl evaluate` as `default`, falls back to the slack rule where it is late or wrong, "
        "and is trained further by `mmrl train SCENARIO --from default`.",
        "",
        *training(given.run),
        "",
        *benchmark(result, name),
        "",
        f"Suite {json.dumps(result.get('suite', ''))}; made by `benchmarks/model_card.py`.",
        "",
    ]
    given.out.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
