"""How much traffic a fleet can take at a site: goodput over rates, and where it falls below 90 %.

The mix of models stays and all rates grow together. A coarse grid of rates
over three decades and the rates wanted are played first, then the intervals in which the goodput
of the fleet or of a model falls below the threshold; of the rules only those that may be the best
are played so closely. Every rate is played on the same development episodes. Rates run in parallel
threads.
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
from mmrl.rules import rule_names, tuned_rule
from mmrl.rules.registry import ANY_FLEET
from mmrl.scenarios.bank import CostBank
from mmrl.scenarios.sampler import DoesNotFit, EpisodeSampler, TooManyRequests, read_bank
from mmrl.scenarios.schema import Scenario
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
        reserve_gb: Held for the life of the node, see `CostBank.reserve_bytes`.
        kv_gb: KV cache of the longest request of each model.
        budget_gb: Device memory.
        reason: Why a model can never run there; empty if all can.
    """

    weights_gb: tuple[float, ...]
    reserve_gb: float
    kv_gb: tuple[float, ...]
    budget_gb: float
    reason: str = ""

    @property
    def verdict(self) -> str:
        """In words: all at once, in turns, in turns and not all of them whole, or not."""
        if self.reason:
            return "does not fit"
        left = self.budget_gb - self.reserve_gb
        if sum(self.weights_gb) + max(self.kv_gb) <= left:
            return "all at once"
        alone = map(sum, zip(self.weights_gb, self.kv_gb, strict=True))
        return "takes turns" if max(alone) <= left else "streams layers"


@dataclass(frozen=True, order=True)
class Capacity:
    """The highest rate at which goodput is enough.

    Attributes:
        per_s: Requests per second.
        at_least: It was still enough at the highest rate that was played.
    """

    per_s: float
    at_least: bool = False


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
    def capacity(self) -> Capacity | None:
        """Of the fleet; None where its goodput is enough at no rate."""
        return crossing(self.rates_per_s, self.goodput)

    def model_capacity(self, shares: Sequence[float]) -> list[Capacity | None]:
        """Of each model, all rates growing together."""
        found = (crossing(self.rates_per_s, column) for column in self.models.T)
        return [
            None if rate is None else Capacity(rate.per_s * share, rate.at_least)
            for rate, share in zip(found, shares, strict=True)
        ]

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
        rules: Capacity of every rule by name; less exact where it is far from the best.
    """

    site: Site
    fit: Fit
    curves: list[Curve] = field(default_factory=list)
    rules: dict[str, Capacity | None] = field(default_factory=dict)


def rule_player(name: str) -> Player:
    """Return a player for a rule as tuned for fleets of any kind, or else with its defaults.

    Raises:
        InputError: There is no such rule.
    """
    return partial(rollout, tuned_rule(name, ANY_FLEET))


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
        bank = read_bank((scenario,))
        try:
            sampler = _sampler(scenario, bank)
        except DoesNotFit as error:
            return Answer(site, _fit(scenario, bank, site, 0, str(error)))
        report(f"{site.label}: {policy}")
        curve = play_rates(sampler, policy, player, question.total_per_s)
        rules = _play_rules(
            sampler, curve, question.total_per_s, lambda name: report(f"{site.label}: {name}")
        )

        def merit(rule: Curve) -> tuple[float, float, bool]:
            at_wanted = rule.at(question.total_per_s or 0.0)
            capacity = rule.capacity.per_s if rule.capacity else 0.0
            return capacity, at_wanted[0] if at_wanted else 0.0, rule is curve

        best = max(rules, key=merit)
        curves = [curve] if best is curve else [curve, best]
        fit = _fit(scenario, bank, site, sampler.longest_tokens)
        return Answer(site, fit, curves, {rule.policy: rule.capacity for rule in rules})


def _sampler(scenario: Scenario, bank: CostBank) -> EpisodeSampler:
    """Return the sampler, at loads lower by factors of two until episodes fit into tables.

    Requests of few tokens are so short that the highest utilisation is more of them than that.
    """
    try:
        return EpisodeSampler(scenario, bank)
    except TooManyRequests:
        half = scenario.utilisation_at_load_1 / 2
    return _sampler(scenario.model_copy(update={"utilisation_at_load_1": half}), bank)


def play_rates(
    sampler: EpisodeSampler, policy: str, player: Player, wanted_per_s: float | None
) -> Curve:
    """Play a policy at many rates: a grid, the one wanted, and more where goodput crosses."""
    return _play_closely(sampler, player, _play_grid(sampler, policy, player, wanted_per_s))


def _play_rules(
    sampler: EpisodeSampler,
    curve: Curve,
    wanted_per_s: float | None,
    report: Callable[[str], None],
) -> list[Curve]:
    """Play every rule on the grid, and more closely those that may carry most.

    Args:
        sampler: Where episodes come from.
        curve: What has been played: it is taken over if it is a rule's.
        wanted_per_s: The rate wanted of the whole fleet.
        report: Told which rule is played.
    """
    rules = []
    for name in rule_names():
        report(name)
        played = name == curve.policy
        rules.append(
            curve if played else _play_grid(sampler, name, rule_player(name), wanted_per_s)
        )
    brackets = [_bracket(rule.rates_per_s, rule.goodput) for rule in rules]
    sure = max(low for low, _ in brackets)
    for k, (rule, (_, high)) in enumerate(zip(rules, brackets, strict=True)):
        if high > sure and rule is not curve:
            report(rule.policy)
            rules[k] = _play_closely(sampler, rule_player(rule.policy), rule)
    return rules


def _play_grid(
    sampler: EpisodeSampler, policy: str, player: Player, wanted_per_s: float | None
) -> Curve:
    loads = np.geomspace(LEAST, MOST, GRID).tolist()
    wanted = (wanted_per_s or 0.0) / sampler.rates_at_load_1[1]
    if LEAST < wanted < MOST:
        loads.append(wanted)
    return _play(sampler, policy, player, sorted(set(loads)))


def _play_closely(sampler: EpisodeSampler, player: Player, curve: Curve) -> Curve:
    """Return a curve with more points where the goodput of fleet or model crosses."""
    brackets = {_bracket(curve.rates_per_s, y) for y in (curve.goodput, *curve.models.T)}
    more = {
        rate / sampler.rates_at_load_1[1]
        for low, high in brackets
        if low > 0 and high < np.inf
        for rate in np.geomspace(low, high, REFINED + 2)[1:-1].tolist()
    }
    if not more:
        return curve
    added = _play(sampler, curve.policy, player, sorted(more))
    rates = np.concatenate([curve.rates_per_s, added.rates_per_s])
    order = rates.argsort()
    return Curve(
        curve.policy,
        rates[order],
        np.concatenate([curve.goodput, added.goodput])[order],
        np.concatenate([curve.models, added.models])[order],
    )


def _play(sampler: EpisodeSampler, policy: str, player: Player, loads: Sequence[float]) -> Curve:
    """Play the episodes at each load."""
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
        goodput, models = zip(*pool.map(at, loads), strict=True)
    rates = np.array(loads) * sampler.rates_at_load_1[1]
    return Curve(policy, rates, np.array(goodput), np.stack(models))


def _bracket(rates_per_s: Array, goodput: Array) -> tuple[float, float]:
    """Return the last rate at which goodput is enough, 0 for none, and the next one or inf."""
    rates = [0.0, *rates_per_s.tolist(), np.inf]
    last = int(np.flatnonzero([True, *(goodput >= GOODPUT)])[-1])  # NaN is not enough
    return rates[last], rates[last + 1]


def crossing(rates_per_s: Array, goodput: Array) -> Capacity | None:
    """Return the rate above which goodput stays below the threshold, between points in logarithms.

    Below that rate it need not be enough everywhere: what is rarely asked for may be loaded anew
    each time. At least the highest rate if it is enough there, None if it is nowhere.
    """
    low, high = _bracket(rates_per_s, goodput)
    if low == 0.0:
        return None
    if high == np.inf:
        return Capacity(low, at_least=True)
    above, below = goodput[rates_per_s == low][0], goodput[rates_per_s == high][0]
    share = (above - GOODPUT) / (above - below)
    return Capacity(float(low * (high / low) ** share))


def _fit(
    scenario: Scenario, bank: CostBank, site: Site, longest_tokens: int, reason: str = ""
) -> Fit:
    rows = np.array([bank.row(0, bank.models.index(name)) for name in scenario.models or ()])
    weights = tuple((bank.weight_bytes[rows] / 1e9).tolist())
    reserve = bank.reserve_bytes(rows, scenario.verbs == "full") / 1e9
    kv = tuple((bank.kv_bytes(rows, longest_tokens) / 1e9).tolist())
    reason = reason.removeprefix("scenario 'plan': ").replace('set verbs = "full"', "--verbs full")
    return Fit(weights, reserve, kv, site.budget_gb, reason)
