"""`freeze`: find the rates and tune the rules of a benchmark suite, and write what is frozen.

Three stages: the utilisation at which the load of each base is 1 (the slack rule reaches a goodput
of .90 on development episodes), the tuned rules, and the hash of each cell. Every result is written
as soon as it is there, with a key of all that it depends on; what has its key is not done again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmrl.agents.pool import side_by_side
from mmrl.agents.suite_policies import ONCE
from mmrl.agents.suite_run import code_hash
from mmrl.files import write_json
from mmrl.rules import rule_class
from mmrl.scenarios.calibrate import GOODPUT, calibrate, goodput_at
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.schema import Scenario
from mmrl.scenarios.suite import FORMAT, Suite, costs, digest, get_suite
from mmrl.tuning import tune, write_tuned

Told = Callable[[str, int, int], None]  # what was done; how many of how many


@dataclass(frozen=True)
class Calibration:
    """Find the rate of a base."""

    base: str
    scenario: Scenario
    episodes: int

    def run(self) -> dict[str, Any]:
        """Return the entry of the frozen file, without its key."""
        wanted = partial(_goodput, episodes=self.episodes)
        found, goodput = calibrate(self.scenario, wanted, lambda tried, reached: None)
        return {"utilisation": found, "goodput": round(goodput, 5), "episodes": self.episodes}


def _goodput(scenario: Scenario, utilisation: float, episodes: int) -> float:
    return goodput_at(scenario, utilisation, episodes)


@dataclass(frozen=True)
class TuningJob:
    """Tune an opponent, for a cell or once for all."""

    place: str
    opponent: str
    rule: str
    scenarios: tuple[Scenario, ...]
    split: str
    configs: int
    episodes: int
    objective: str
    key: str

    def run(self) -> dict[str, Any]:
        """Return the entry of the tuned file."""
        result = tune(
            rule_class(self.rule),
            self.scenarios,
            split=self.split,  # type: ignore[arg-type]
            configs=self.configs,
            episodes=self.episodes,
            objective=self.objective,  # type: ignore[arg-type]
        )
        return {
            "split": self.split,
            "configs": self.configs,
            "episodes": self.episodes,
            "objective": self.objective,
            "episodes_played": result.played,
            "score": round(result.score, 5),
            "score_of_defaults": round(result.default_score, 5),
            "goodput": round(result.goodput, 5),
            "norm_latency": round(result.norm_latency, 4),
            "key": self.key,
            "params": result.rule.model_dump(exclude_none=True),
        }


def freeze(place: str, workers: int, told: Told, only: Sequence[str] = ()) -> Suite:
    """Freeze a suite: write its frozen and its tuned file.

    Args:
        place: Name or path of the suite.
        workers: How many processes.
        told: Told of what is done.
        only: Patterns of cells that are to be frozen; all unless given.

    Returns:
        The suite as it is now.

    Raises:
        InputError: The suite is wrong, or a base reaches no goodput of .90 at any load.
    """
    _calibrate(get_suite(place), workers, told, only)
    _tune(get_suite(place), workers, told, only)
    suite = get_suite(place)
    cells = suite.frozen.get("cells", {}) if only else {}
    cells |= {cell.name: cell.hash for cell in suite.choose(list(only))}
    write_json(suite.frozen_path, {**suite.frozen, "cells": cells, "suite_hash": suite.hash})
    return get_suite(place)


def _calibrate(suite: Suite, workers: int, told: Told, only: Sequence[str]) -> None:
    found = dict(suite.frozen.get("utilisation", {}))
    episodes = suite.spec.tuning.calibration_episodes
    wanted = {cell.base for cell in suite.choose(list(only))}
    jobs, keys = [], {}
    for base, scenario in suite.bases().items():
        if base not in wanted:
            continue
        plain = scenario.model_dump(mode="json", exclude={"utilisation_at_load_1"})
        keys[base] = digest([plain, costs(scenario), episodes, GOODPUT, code_hash()])
        if found.get(base, {}).get("key") != keys[base]:
            jobs.append(Calibration(base, scenario, episodes))
    for number, (k, entry) in enumerate(side_by_side(_run_job, jobs, workers), 1):
        job = jobs[k]
        found[job.base] = {**entry, "key": keys[job.base]}
        kept = {**suite.frozen, "format": FORMAT, "utilisation": dict(sorted(found.items()))}
        write_json(suite.frozen_path, kept)
        told(f"calibrated {job.base}: {entry['utilisation']:g}", number, len(jobs))


def _tune(suite: Suite, workers: int, told: Told, only: Sequence[str]) -> None:
    jobs = [
        job
        for job in tuning_jobs(suite, only)
        if suite.tuned.get(job.place, {}).get(job.opponent, {}).get("key") != job.key
    ]
    for number, (k, entry) in enumerate(side_by_side(_run_job, jobs, workers), 1):
        job = jobs[k]
        write_tuned(suite.tuned_path, job.place, job.opponent, entry)
        what = f"tuned {job.opponent} for {job.place}: {entry['score']:.4f}"
        told(what, number, len(jobs))


def tuning_jobs(suite: Suite, only: Sequence[str] = ()) -> list[TuningJob]:
    """Return all tunings of a suite: each opponent once, and for each cell; the longest first."""
    budget = suite.spec.tuning
    training = tuple(get_scenario(name) for name in budget.training)
    places: list[tuple[str, tuple[Scenario, ...], str, int]] = [
        (ONCE, training, "train", budget.once_episodes)
    ]
    for cell in suite.choose(list(only)):
        places.append((cell.name, (cell.scenario,), "dev", budget.cell_episodes))
    found = []
    for place, scenarios, split, episodes in places:
        about = [[one.model_dump(mode="json"), costs(one)] for one in scenarios]
        for name, opponent in suite.spec.opponents.items():
            budget_of = [opponent.rule, split, opponent.configs, episodes, opponent.objective]
            key = digest([about, budget_of, code_hash()])
            found.append(
                TuningJob(
                    place,
                    name,
                    opponent.rule,
                    scenarios,
                    split,
                    opponent.configs,
                    episodes,
                    opponent.objective,
                    key,
                )
            )
    return sorted(found, key=lambda job: -job.configs * job.episodes)


def _run_job(job: Any) -> dict[str, Any]:
    found: dict[str, Any] = job.run()
    return found
