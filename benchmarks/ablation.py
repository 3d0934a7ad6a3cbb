"""What each part of training, and each verb, is worth: the same steps without it, several seeds.

    python benchmarks/ablation.py [--scenarios fast slow consumer universal] [--verbs both]
        [--steps 10M] [--seeds 3] [--episodes 200] [--only no-prior,no-focus]
        [--set threads=2 eval_episodes=40] [--jobs 1] [--out runs/ablation]
        [--page docs/ablation.md]

Every variant trains with the same settings but one. The best policy of each run then plays the same
test episodes, paired with the variant that has everything and with the slack rule. May be stopped
at any time: runs go on where they were, and what has been played is not played again. ``--jobs``
runs are trained side by side. Results go to ``ablation.json`` in the folder of the runs and, with
``--page``, to a section of a page in Markdown.
"""

import argparse
import json
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mmrl.agents import runs
from mmrl.agents.config import TrainConfig, build_config
from mmrl.agents.export import load_policy
from mmrl.agents.pool import side_by_side
from mmrl.agents.progress import ProgressBar
from mmrl.agents.runner import play
from mmrl.agents.state import read_state
from mmrl.agents.suite_stats import Bootstrap, interval
from mmrl.agents.train import resume, train
from mmrl.cli.train import UNITS, number, read_settings
from mmrl.files import write_json
from mmrl.rollout import Episode, EpisodeResult, rollout
from mmrl.rules import get_rule
from mmrl.scenarios.mixture import ScenarioSampler
from mmrl.scenarios.registry import get_scenario

BOOTSTRAP = Bootstrap()
TITLE = """# What each part is worth

Tables of `benchmarks/ablation.py`; [training.md](training.md) says what follows from them.
"""
ALL = "all"
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    ALL: ("everything", {}),
    "no-prior": ("no residual on a rule", {"prior": None}),
    "slack-prior": ("residual on the rule without levels", {"prior": "slack"}),
    "no-future": ("critic without the future", {"privileged": False}),
    "joint-clip": ("gradients of actor and critic clipped together", {"clip_apart": False}),
    "even-discount": ("discount by decision, not by time", {"elapsed_time": False}),
    "one-pace": ("time counts the same where loads take seconds", {"paced": False}),
    "no-latency": ("reward without the latency term", {"latency_weight": 0.0}),
    "no-miss": ("reward without misses", {"miss_weight": 0.0, "latency_weight": 1.0}),
    "no-price": ("deviations from the rule cost nothing", {"kl": 0.0}),
    "no-jitter": ("costs as profiled", {"jitter": 0.0}),
    "no-randomisation": ("one fleet, platform and load", {"randomise": False}),
}
VERBS: dict[str, tuple[str, dict[str, Any]]] = {
    "no-out": ("may not put a model out", {"without": ("out",)}),
    "no-pause": ("may not pause", {"without": ("pause", "resume")}),
    "no-levels": (
        "may not load partial levels",
        {"without": ("level0", "level25", "level50", "level75")},
    ),
    "no-focus": ("may not focus", {"without": ("focus",)}),
}
MEASURES = ("goodput", "goodput_worst_model", "norm_latency", "ttft_p99_s")


def run(episodes: list[Episode], bar: bool, config: TrainConfig) -> dict[str, list[float]]:
    """Train, or go on with, a run, and have its best policy play; return what `measure` does."""
    folder = config.out / config.name
    with ProgressBar(config.steps, config.time_s) if bar else nullcontext() as shown:
        if not (folder / runs.STATE).exists():
            train(config, shown)
        elif read_state(folder)["steps"] < config.steps:
            resume(folder, config.steps, None, shown)
    if read_state(folder)["steps"] < config.steps:
        raise SystemExit(f"stopped in {config.name}; the same command goes on from here")
    policy = load_policy(folder)
    return measure([r for sampler in samplers(config) for r in play(policy, sampler, episodes)])


def samplers(config: TrainConfig) -> list[ScenarioSampler]:
    """Return the samplers of what a run is trained and compared on."""
    played = config.played([get_scenario(name) for name in config.scenarios])
    return [scenario.sampler() for scenario in played]


def measure(results: list[EpisodeResult]) -> dict[str, list[float]]:
    """Return each measure of each episode; an episode without requests went well."""
    empty = {"goodput": 1.0, "goodput_worst_model": 1.0}
    return {
        name: [
            empty.get(name, 0.0) if np.isnan(value) else float(value)
            for value in (result.metrics[name] for result in results)
        ]
        for name in MEASURES
    }


def table(found: dict[str, dict[str, Any]], seeds: int) -> list[str]:
    """Return the rows of a Markdown table, one per variant that has been measured."""
    header = ["variant", "goodput", "less everything", "over slack", "worst model", "norm. latency"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    slack = np.array(found["slack"]["goodput"])
    whole = _stack(found, ALL, seeds, "goodput")
    for name, (what, _) in (PARTS | VERBS).items():
        goodput = _stack(found, name, seeds, "goodput")
        if goodput is None:
            continue
        cells = [f"{what} (`{name}`)", f"{goodput.mean():.4f}"]
        cells.append(_points(goodput, whole) if name != ALL and whole is not None else "")
        cells.append(_points(goodput, slack))
        for measure_name in ("goodput_worst_model", "norm_latency"):
            values = _stack(found, name, seeds, measure_name)
            assert values is not None
            cells.append(f"{values.mean():.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _stack(
    found: dict[str, dict[str, Any]], name: str, seeds: int, measure_name: str
) -> np.ndarray | None:
    """Return a measure, float64[seeds, episodes]; None where a seed is missing."""
    wanted = [f"{name}-s{seed}" for seed in range(seeds)]
    if any(key not in found for key in wanted):
        return None
    return np.array([found[key][measure_name] for key in wanted])


def _points(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Say a difference in points: interval over seeds and episodes, and each seed."""
    difference = 100 * (ours - theirs)
    draws = BOOTSTRAP.over_seeds(BOOTSTRAP.cell_means(0, difference.T))
    found = interval(float(difference.mean()), draws)
    seeds = ", ".join(f"{value:+.1f}" for value in difference.mean(axis=1))
    return f"{found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}] ({seeds})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    mixture = ["fast", "slow", "consumer", "universal"]
    parser.add_argument("--scenarios", nargs="+", default=mixture)
    parser.add_argument("--verbs", default="both")
    parser.add_argument("--steps", default="10M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--only", default="")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of all runs")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    steps = int(number(given.steps, UNITS, "steps"))
    variants = PARTS | VERBS
    if given.only:
        variants = {name: variants[name] for name in (ALL, *given.only.split(",")) if name}
    settings = {
        "scenarios": given.scenarios,
        "verbs": given.verbs,
        "steps": steps,
        "episodes": given.episodes,
        "set": given.set,
    }
    path = given.out / "ablation.json"
    report: dict[str, Any] = {"settings": settings, "results": {}}
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["settings"] != settings:
            parser.error(f"{path} holds other settings: {report['settings']}; choose another --out")
    found = report["results"]
    common: dict[str, Any] = {"envs": 128}
    common |= {"eval_every": max(1, steps // 10), "eval_episodes": 40}
    common |= read_settings(given.set)
    common |= {"scenarios": given.scenarios, "verbs": given.verbs, "steps": steps, "out": given.out}
    episodes: list[Episode] = [("test", i) for i in range(given.episodes)]
    if "slack" not in found:
        rule = get_rule("slack")
        ours = samplers(build_config(**common))
        found["slack"] = measure([r for s in ours for r in rollout(rule, s, episodes)])
    wanted = (
        build_config(**(common | changes), seed=seed, name=f"{name}-s{seed}")
        for seed in range(given.seeds)
        for name, (_, changes) in variants.items()
    )
    missing = [config for config in wanted if config.name not in found]
    work = partial(run, episodes, given.jobs == 1)
    for k, measured in side_by_side(work, missing, given.jobs):
        name = missing[k].name
        found[name] = measured
        write_json(path, report)
        print(f"{name}: {np.mean(measured['goodput']):.4f}, {len(found)} done", flush=True)
    lines = table(found, given.seeds)
    print("\n".join(lines))
    if given.page:
        write_section(given.page, *_section(settings, given.seeds, given.only, lines))


def write_section(page: Path, heading: str, lines: list[str]) -> None:
    """Put a section in the place of the one with its heading, or at the end of the page."""
    text = page.read_text("utf-8") if page.exists() else f"{TITLE}\n"
    head, *sections = text.rstrip("\n").split("\n## ")
    kept = [section for section in sections if section.partition("\n")[0] != heading]
    kept.append("\n".join([heading, "", *lines]))
    page.write_text("\n\n## ".join([part.rstrip("\n") for part in (head, *kept)]) + "\n", "utf-8")


def _section(
    settings: dict[str, Any], seeds: int, only: str, lines: list[str]
) -> tuple[str, list[str]]:
    scenarios, given = " ".join(settings["scenarios"]), " ".join(settings["set"])
    start = dict(part.split("=", 1) for part in settings["set"]).get("start")
    about = f"Training on `{scenarios}`" if start is None else f"`{start}` trained on `{scenarios}`"
    heading = f"{about}, {settings['steps']:,} decisions"
    return heading, [
        f"Verbs: {settings['verbs']}; {seeds} seeds; mean over {settings['episodes']} test "
        "episodes of each verb set. Differences in points of goodput with 95 % intervals over "
        "seeds and episodes (of three seeds, and so too narrow), and in brackets each seed.",
        "",
        "```",
        f"python benchmarks/ablation.py --scenarios {scenarios} --verbs {settings['verbs']} "
        f"--steps {settings['steps']} --seeds {seeds} --episodes {settings['episodes']}"
        + (f" --only {only}" if only else "")
        + (f" \\\n  --set {given}" if given else ""),
        "```",
        "",
        *lines,
    ]


if __name__ == "__main__":
    main()
