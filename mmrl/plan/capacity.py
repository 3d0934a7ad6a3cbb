"""How much traffic a fleet can take at a site: goodput over rates, and where it falls below 90 %.

The mix of models stays and all rates grow together. A coarse grid of rates
over three decades and the rates wanted are played first, then the intervals in which the goodput
of the fleet or of a model falls below the threshold; every rate is played on the same development
episodes. Rates run in parallel threads.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.errors import InputError
from mmrl.node.state import MAX_MODELS
from mmrl.plan.question import LEAST, MOST, Question, Site, scenario_at
from mmrl.rollout import Episode, EpisodeResult, rollout
from mmrl.rules import get_rule, rule_names
from mmrl.scenarios.sampler import EpisodeSampler
from mmrl.sim.batch import Sampler

GOODPUT = 0.9  # of a fleet or model that meets its targets
EPISODES = 16
GRID = 10  # utilisations of the first round, a factor of two apart
FEWEST = 20  # requests of a model below which its goodput is not told
REFINED = 3  # more inside each interval with a crossing

Array = npt.NDArray[np.float64]
# (sampler, episodes, options) -> results, as `rollout` gives them
Player = Callable[[Sampler, Sequence[Episode], Mapping[str, Any]], list[EpisodeResult]]


@dataclass(frozen=True)
class Fit:
    """Whether a fleet fits into the memory of a site, in GB.

    Attributes:
        weights_gb: Of each model.
        reserve_gb: Held for the life of the node: workspace.
        kv_gb: KV cache of the longest request of the hungriest model.
        budget_gb: Device memory.
        reason: Why a model can never run there; empty if all can.
    """

    weights_gb: tuple[float, ...]
    reserve_gb: float
    kv_gb: float
    budget_gb: float
    reason: str = ""

    @property
    def verdict(self) -> str:
        """In words: all at once, in turns, or not."""
        if self.reason:
            return "does not fit"
        together = sum(self.weights_gb) + self.reserve_gb + self.kv_gb
        return "all at once" if together <= self.budget_gb else "takes turns"


@dataclass(frozen=True)
class Curve:
    """Goodput of a policy over rates.

    Attributes:
        policy: Its name.
        rates_per_s: float64[K], of the whole fleet, rising.
        goodput: float64[K], of all requests.
        models: float64[K, M], goodput by model; NaN where it had too few requests.
    """

    policy: str
    rates_per_s: Array
    goodput: Array
    models: Array

    @property
    def capacity_per_s(self) -> float | None:
        """The highest rate of the fleet at which its goodput is enough."""
        return crossing(self.rates_per_s, self.goodput)

    def model_capacity_per_s(self, shares: Sequence[float]) -> list[float | None]:
        """The highest rate of each model at which its goodput is enough, all growing together."""
        found = (crossing(self.rates_per_s, column) for column in self.models.T)
        return [None if rate is None else rate * s for rate, s in zip(found, shares, strict=True)]

    def at(self, rate_per_s: float) -> tuple[float, Array] | None:
        """Return goodput of fleet and models at a rate, None outside of what was played."""
        if not self.rates_per_s[0] <= rate_per_s <= self.rates_per_s[-1]:
            return None
        x, logs = np.log(rate_per_s), np.log(self.rates_per_s)
        models = np.array([np.interp(x, logs, column) for column in self.models.T])
        return float(np.interp(x, logs, self.goodput)), models


@dataclass(frozen=True)
class Answer:
    """What was found about one site.

    Attributes:
        site: The site.
        fit: Whether the fleet fits; if it does not, there are no curves.
        curves: Of the policy, and of the best rule if that is another.
        rules: Goodput of every rule at the policy's capacity, by name.
    """

    site: Site
    fit: Fit
    curves: list[Curve] = field(default_factory=list)
    rules: dict[str, float] = field(default_factory=dict)


def rule_player(name: str) -> Player:
    """Return a player for a rule with its default parameters.

    Raises:
        InputError: There is no such rule.
    """
    return partial(rollout, get_rule(name))


def plan_site(
    question: Question,
    site: Site,
    policy: str,
    player: Player,
    report: Callable[[str], None] = lambda doing: None,
) -> Answer:
    """Find out what a site can do.

    Args:
        question: Fleet and traffic.
        site: The site.
        policy: Name of the policy.
        player: Plays it.
        report: Told what is done next.

    Raises:
        InputError: A model or length family is unknown.
    """
    if len(question.models) > MAX_MODELS:
        raise InputError(f"{len(question.models)} models", f"a node has at most {MAX_MODELS}")
    with scenario_at(question, site) as scenario:
        report(f"{site.label}: memory")
        try:
            sampler = scenario.sampler()
        except InputError as error:
            return Answer(site, _misfit(question, site, str(error)))
        report(f"{site.label}: {policy}")
        curve = play_rates(sampler, policy, player, question.total_per_s)
        rules = _compare_rules(
            sampler, curve, question.total_per_s, lambda name: report(f"{site.label}: {name}")
        )
        best = max(rules, key=lambda name: (rules[name], name == policy))
        curves = [curve]
        if best != policy:
            report(f"{site.label}: {best}")
            curves.append(play_rates(sampler, best, rule_player(best), question.total_per_s))
        return Answer(site, _fit(sampler, site), curves, rules)


def play_rates(
    sampler: EpisodeSampler, policy: str, player: Player, wanted_per_s: float | None
) -> Curve:
    """Play a policy at many rates: a grid, the one wanted, and more where goodput crosses."""
    points: dict[float, tuple[float, Array]] = {}
    first = np.geomspace(LEAST, MOST, GRID).tolist()
    wanted = (wanted_per_s or 0.0) / sampler.rates_at_load_1[1]
    if LEAST < wanted < MOST:
        first.append(wanted)
    _play(sampler, player, first, points)
    loads = np.array(sorted(points))
    columns = [np.array([points[load][0] for load in loads])]
    columns += list(np.stack([points[load][1] for load in loads]).T)
    more = {
        load
        for column in columns
        for low, high in _brackets(loads, column)
        for load in np.geomspace(low, high, REFINED + 2)[1:-1].tolist()
    }
    _play(sampler, player, sorted(more), points)
    loads = np.array(sorted(points))
    return Curve(
        policy,
        loads * sampler.rates_at_load_1[1],
        np.array([points[load][0] for load in loads]),
        np.stack([points[load][1] for load in loads]),
    )


def _play(
    sampler: EpisodeSampler,
    player: Player,
    loads: Sequence[float],
    points: dict[float, tuple[float, Array]],
) -> None:
    """Play the episodes at each load and add (goodput, goodput by model) to the points."""
    episodes: list[Episode] = [("dev", index) for index in range(EPISODES)]

    def at(load: float) -> tuple[float, Array]:
        results = player(sampler, episodes, {"load": load})
        counts = np.stack([result.metrics.models["requests"] for result in results])
        shares = np.stack([result.metrics.models["goodput"] for result in results])
        good = np.nansum(counts * shares, axis=0)
        requests = counts.sum(axis=0)
        by_model = np.where(requests >= FEWEST, good / np.maximum(1, requests), np.nan)
        return float(good.sum() / max(1.0, requests.sum())), by_model

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        points.update(zip(loads, pool.map(at, loads), strict=True))


def _brackets(loads: Array, goodput: Array) -> list[tuple[float, float]]:
    """Return the interval above the last load at which a goodput is enough, if it ends there."""
    enough = np.flatnonzero(goodput >= GOODPUT)
    if len(enough) == 0 or enough[-1] == len(loads) - 1:
        return []
    last = int(enough[-1])
    return [(float(loads[last]), float(loads[last + 1]))]


def crossing(rates_per_s: Array, goodput: Array) -> float | None:
    """Return the rate above which goodput stays below the threshold, between points in logarithms.

    Below that rate it need not be enough everywhere: what is rarely asked for may be loaded anew
    each time. The highest rate if it is enough there, None if it is nowhere.
    """
    enough = np.flatnonzero(goodput >= GOODPUT)  # NaN is not
    if len(enough) == 0:
        return None
    last = int(enough[-1])
    if last == len(goodput) - 1:
        return float(rates_per_s[-1])
    share = (goodput[last] - GOODPUT) / (goodput[last] - goodput[last + 1])
    low, high = np.log(rates_per_s[last : last + 2])
    return float(np.exp(low + share * (high - low)))


def _compare_rules(
    sampler: EpisodeSampler,
    curve: Curve,
    wanted_per_s: float | None,
    report: Callable[[str], None],
) -> dict[str, float]:
    """Return the goodput of every rule at the highest rate that the policy carries."""
    rate = curve.capacity_per_s or wanted_per_s or float(curve.rates_per_s[0])
    load = min(MOST, max(LEAST, rate / sampler.rates_at_load_1[1]))
    found = {}
    for name in rule_names():
        report(name)
        points: dict[float, tuple[float, Array]] = {}
        _play(sampler, rule_player(name), [load], points)
        found[name] = points[load][0]
    return found


def _fit(sampler: EpisodeSampler, site: Site) -> Fit:
    bank, rows = sampler.bank, sampler.rows(0)
    needed = bank.needed_bytes(rows, sampler.full_verbs, sampler.longest_tokens)
    weights, reserve = bank.weight_bytes[rows], bank.reserve_bytes(rows, sampler.full_verbs)
    kv = int((needed - weights - reserve).max())
    return Fit(tuple((weights / 1e9).tolist()), reserve / 1e9, kv / 1e9, site.budget_gb)


def _misfit(question: Question, site: Site, reason: str) -> Fit:
    from mmrl.profiles.registry import get_profile

    profiles = [get_profile(site.platform, model) for model in question.models]
    workspace = max(profile.workspace_bytes for profile in profiles)
    reserve = (workspace + sum(profile.graphs_bytes for profile in profiles)) / 1e9
    weights = tuple(profile.weight_bytes / 1e9 for profile in profiles)
    reason = reason.removeprefix("scenario 'plan': ")
    return Fit(weights, reserve, 0.0, site.budget_gb, reason)
