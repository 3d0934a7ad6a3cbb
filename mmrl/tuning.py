"""Tune the parameters of a rule: random search with successive halving on paired episodes.

All candidates play the same episodes. The rounds play a ninth, a third and all of the episodes;
after each of the first two the best third stays. The rule's defaults are a candidate that is never
dropped, so that the result is never worse than they are on these episodes.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from mmrl.errors import InputError, unknown
from mmrl.files import atomic_write
from mmrl.metrics import met_targets, request_latencies
from mmrl.node.state import DISPATCHES, Nodes
from mmrl.rollout import run_nodes
from mmrl.rules.base import Rule
from mmrl.rules.registry import read_tuned
from mmrl.scenarios.schema import Scenario
from mmrl.scenarios.seeds import Split, episode_rng
from mmrl.sim.batch import Simulator

Objective = Literal["goodput", "goodput-latency"]
LATENCY_WEIGHT = 0.005  # goodput-latency: what one unit of normalised latency costs in goodput
ROUNDS = (1 / 9, 1 / 3, 1.0)
KEPT = 1 / 3
CHANGED = 0.5  # share of the parameters in which a candidate differs from the defaults


@dataclass(frozen=True)
class TuneResult:
    """What tuning found.

    Attributes:
        rule: The rule with the best parameters.
        score: Mean objective of it over all episodes ...
        default_score: ... and that of the rule's defaults.
        goodput: Mean goodput of it.
        norm_latency: Mean normalised latency of it.
        played: Episodes that were played, all candidates together.
    """

    rule: Rule
    score: float
    default_score: float
    goodput: float
    norm_latency: float
    played: int


class PairedEpisodes:
    """Episodes that are drawn once and played by many rules.

    Args:
        scenarios: What to draw: episode ``i`` is of scenario ``i modulo their number``.
        split: ``"train"`` or ``"dev"``; ``"test"`` is for reports.
        count: How many episodes, the first of the split; at least one per scenario.

    Raises:
        InputError: They are fewer.
    """

    def __init__(self, scenarios: Sequence[Scenario], split: Split, count: int) -> None:
        if count < len(scenarios):
            raise InputError(
                f"{count} episodes of {len(scenarios)} scenarios", "play at least one of each"
            )
        self._indices = [range(k, count, len(scenarios)) for k in range(len(scenarios))]
        self._simulators = []
        for scenario, indices in zip(scenarios, self._indices, strict=True):
            simulator = Simulator(scenario.sampler(), len(indices))
            for slot, index in enumerate(indices):
                simulator.reset(slot, episode_rng(split, index))
            self._simulators.append(simulator)
        self.count = count

    def play(self, rule: Rule, first: int = 0, last: int | None = None) -> npt.NDArray[np.float64]:
        """Play episodes ``first .. last - 1``; may be called from several threads.

        Returns:
            float64[last - first, 2]: goodput and mean normalised latency of each; NaN for an
            episode without requests.
        """
        last = self.count if last is None else last
        outcome = np.full((last - first, 2), np.nan)
        for simulator, indices in zip(self._simulators, self._indices, strict=True):
            slots = [slot for slot, index in enumerate(indices) if first <= index < last]
            if slots:
                rows = [indices[slot] - first for slot in slots]
                outcome[rows] = _play(simulator, rule, slots[0], slots[-1] + 1)
        return outcome


def _play(simulator: Simulator, rule: Rule, first: int, last: int) -> npt.NDArray[np.float64]:
    """Play the episodes of some nodes on copies, see ``PairedEpisodes.play``."""
    nodes: Nodes = simulator.nodes[first:last].copy().view(np.recarray)
    requests: Nodes = simulator.requests[first:last].copy().view(np.recarray)
    rule.prepare(nodes)
    run_nodes(
        rule.number,
        rule.params,
        nodes,
        requests,
        simulator.decode_tables,
        simulator.prefill_tables,
    )
    outcome = np.full((len(nodes), 2), np.nan)
    for i in range(len(nodes)):
        q = requests[i][: int(nodes[i].n_requests)]
        if len(q):
            e2e_s = request_latencies(nodes[i], q)[2]
            outcome[i, 0] = met_targets(q).mean()
            outcome[i, 1] = (e2e_s * 1e9 / q["isolated_ns"]).mean()
    return outcome


def objective_value(outcome: npt.NDArray[np.float64], objective: Objective) -> float:
    """Return the objective of played episodes, float64[n, 2] of ``PairedEpisodes.play``.

    ``goodput`` is its mean; ``goodput-latency`` takes 0.05 off for each 10 of mean normalised
    latency, as the reward does in spirit.
    """
    goodput, latency = np.nanmean(outcome, axis=0)
    weight = LATENCY_WEIGHT if objective == "goodput-latency" else 0.0
    return float(goodput - weight * latency)


def draw_rule(rule: type[Rule], rng: np.random.Generator, changed: float = 1.0) -> Rule:
    """Draw a rule's parameters uniformly between their bounds, some on a logarithmic scale.

    Args:
        rule: The rule's class.
        rng: Where the draws come from.
        changed: Probability with which a parameter is drawn; otherwise it keeps its default.
    """
    values: dict[str, Any] = {}
    if rng.random() < changed:
        values["dispatch"] = DISPATCHES[rng.integers(len(DISPATCHES))]
    for name in rule.tunables():
        if rng.random() >= changed:
            continue
        field = rule.model_fields[name]
        bounds = zip(field.metadata, ("ge", "le"), strict=True)
        low, high = (float(getattr(bound, key)) for bound, key in bounds)
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra["log"]:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            value = rng.uniform(low, high)
        values[name] = min(high, max(low, float(f"{value:.3g}")))
    return rule(**values)


def draw_candidates(rule: type[Rule], count: int, rng: np.random.Generator) -> list[Rule]:
    """Return the defaults and ``count`` candidates, each of which changes half of them on average.

    A rule without numeric parameters has one candidate for each dispatch rule.
    """
    if not rule.tunables():
        return [rule(), *(rule.model_validate({"dispatch": name}) for name in DISPATCHES)]
    return [rule(), *(draw_rule(rule, rng, CHANGED) for _ in range(count))]


def planned_episodes(rule: type[Rule], configs: int, episodes: int) -> int:
    """Return how many episodes ``tune`` plays at most."""
    total, before = 0, 0
    alive = len(draw_candidates(rule, configs, np.random.default_rng(0)))
    for share in ROUNDS:
        until = max(1, round(episodes * share))
        total += alive * (until - before)
        before, alive = until, min(alive, _survivors(alive) + 1)
    return total


def tune(
    rule: type[Rule],
    scenario: Scenario | Sequence[Scenario],
    *,
    split: Split = "train",
    configs: int = 60,
    episodes: int = 60,
    objective: Objective = "goodput",
    seed: int = 0,
    workers: int = 1,
    report: Callable[[int, float], None] = lambda played, best: None,
) -> TuneResult:
    """Search the parameters of a rule for a scenario.

    Args:
        rule: The rule's class.
        scenario: Where it is tuned; of several, the episodes are of each in turn.
        split: ``"train"`` or ``"dev"``.
        configs: Candidates that are drawn.
        episodes: Episodes that the last candidates play.
        objective: See ``objective_value``.
        seed: Of the candidates.
        workers: Threads; the result does not depend on it.
        report: Told, after each candidate, the episodes played and the best objective so far.

    Raises:
        InputError: The split is that of the test.
    """
    if split == "test":
        raise InputError("split 'test' is for reports", "tune on train or dev")
    if objective not in get_args(Objective):
        raise unknown("objective", objective, get_args(Objective))
    scenarios = [scenario] if isinstance(scenario, Scenario) else scenario
    paired = PairedEpisodes(scenarios, split, episodes)
    candidates = draw_candidates(rule, configs, np.random.default_rng(seed))
    outcomes: list[npt.NDArray[np.float64]] = [np.empty((0, 2)) for _ in candidates]
    alive = list(range(len(candidates)))
    before, played = 0, 0
    with ThreadPoolExecutor(workers) as pool:
        for share in ROUNDS:
            until = max(1, round(episodes * share))

            def play(k: int, first: int = before, last: int = until) -> npt.NDArray[np.float64]:
                return paired.play(candidates[k], first, last)

            best = -math.inf
            for k, outcome in zip(alive, pool.map(play, alive), strict=True):
                outcomes[k] = np.concatenate([outcomes[k], outcome])
                played += until - before
                best = max(best, objective_value(outcomes[k], objective))
                report(played, best)
            before = until
            alive.sort(key=lambda k: -objective_value(outcomes[k], objective))
            if share < 1.0:
                alive = sorted({*alive[: _survivors(len(alive))], 0})
    best_candidate = alive[0]
    goodput, latency = np.nanmean(outcomes[best_candidate], axis=0)
    return TuneResult(
        candidates[best_candidate],
        objective_value(outcomes[best_candidate], objective),
        objective_value(outcomes[0], objective),
        float(goodput),
        float(latency),
        played,
    )


def _survivors(alive: int) -> int:
    return max(1, math.ceil(alive * KEPT))


def write_tuned(path: Path, scenario: str, name: str, entry: Mapping[str, Any]) -> None:
    """Write an entry ``[scenario.rule]`` into a TOML file, keeping the others.

    Args:
        path: The file; made if there is none.
        scenario: Name of the scenario.
        name: Name of the rule.
        entry: Numbers and strings, and the table ``params``.

    Raises:
        InputError: The file is there but is none of `mmrl tune`, or cannot be written.
    """
    tables = read_tuned(path) if path.exists() else {}
    tables.setdefault(scenario, {})[name] = dict(entry)
    lines = ["# Parameters of rules for scenarios, as mmrl tune found and wrote them."]
    for key, rules in sorted(tables.items()):
        for rule, values in sorted(rules.items()):
            lines += ["", f"[{json.dumps(key)}.{rule}]"]
            lines += [f"{k} = {json.dumps(v)}" for k, v in values.items() if k != "params"]
            lines += ["", f"[{json.dumps(key)}.{rule}.params]"]
            lines += [f"{k} = {json.dumps(v)}" for k, v in values["params"].items()]
    with atomic_write(path) as file:
        file.write("\n".join(lines) + "\n")
