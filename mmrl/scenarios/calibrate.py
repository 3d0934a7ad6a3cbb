"""Find the utilisation at which a scenario's load is 1: there the slack rule's goodput is .90.

The crossing is bracketed, then a straight line is fitted to goodput over the logarithm of some
utilisations around it. Every one is tried on the same development seeds, but a small change of the
rate makes other episodes of them: the line averages the noise that a bisection would end in.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrl.errors import InputError
from mmrl.metrics import met_targets
from mmrl.scenarios.schema import Scenario
from mmrl.scenarios.seeds import episode_rng

if TYPE_CHECKING:
    from mmrl.sim.batch import Sampler

RULE = "slack"
GOODPUT = 0.9
LEAST, MOST = 1 / 64, 64.0  # utilisations between which load 1 must lie
POINTS = 9  # utilisations behind the fitted line
BEYOND = 1.1  # how far they reach over the bracket


class NoCrossing(InputError):
    """There is no load at which the slack rule's goodput is the wanted one."""


def goodput_at(scenario: Scenario, utilisation: float, episodes: int) -> float:
    """Return the slack rule's mean goodput over development episodes at load 1.

    Args:
        scenario: What to play; its load and utilisation are replaced.
        utilisation: Offered seconds of service alone per second.
        episodes: How many, the first of the split; those without requests do not count.
    """
    at_load_1 = scenario.model_copy(
        update={"utilisation_at_load_1": utilisation, "load": (1.0, 1.0)}
    )
    return rule_goodput(at_load_1.sampler(), [None] * episodes)


def rule_goodput(sampler: "Sampler", episodes: Sequence[Mapping[str, Any] | None]) -> float:
    """Return the slack rule's mean goodput over development episodes; 1 if none has requests.

    Args:
        sampler: Where the episodes come from.
        episodes: The options with which each is drawn; those without requests do not count.
    """
    from mmrl.rollout import run_rule
    from mmrl.rules import get_rule
    from mmrl.sim.batch import Simulator

    traces = [options["trace"] for options in episodes if options and "trace" in options]
    simulator = Simulator(sampler, len(episodes), max(map(len, traces), default=0))
    for i, options in enumerate(episodes):
        simulator.reset(i, episode_rng("dev", i), options)
    run_rule(simulator, get_rule(RULE))
    shares = []
    for node, requests in zip(simulator.nodes, simulator.requests, strict=True):
        if (n := int(node.n_requests)) > 0:
            shares.append(float(met_targets(requests[:n]).mean()))
    return float(np.mean(shares)) if shares else 1.0


def calibrate(
    scenario: Scenario,
    goodput: Callable[[Scenario, float], float],
    report: Callable[[float, float], None],
) -> tuple[float, float]:
    """Find the utilisation at which the goodput falls through `GOODPUT`.

    Args:
        scenario: The scenario; the search starts at its present utilisation.
        goodput: Goodput of a scenario at a utilisation, falling on the whole.
        report: Told each utilisation tried and its goodput.

    Returns:
        (utilisation, rounded to three digits, and the goodput there).

    Raises:
        NoCrossing: The goodput is below at the lightest load or above at the heaviest, or so noisy
            that the fitted line does not cross among the loads tried.
    """
    start = min(max(scenario.utilisation_at_load_1, LEAST), MOST)
    reached = functools.partial(goodput, scenario)
    limits = LEAST, MOST
    return find_crossing(f"scenario '{scenario.name}'", reached, report, start, limits)


def find_crossing(
    what: str,
    goodput: Callable[[float], float],
    report: Callable[[float, float], None],
    start: float,
    limits: tuple[float, float],
) -> tuple[float, float]:
    """Find the load, in any unit, at which the goodput falls through `GOODPUT`.

    Args:
        what: Whose load, for the message.
        goodput: Goodput at a load, falling on the whole.
        report: Told each load tried and its goodput.
        start: Where the search starts.
        limits: Between which it must lie.

    Returns:
        (load, rounded to three digits, and the goodput there).

    Raises:
        NoCrossing: The goodput is below at the lightest load or above at the heaviest, or so noisy
            that the fitted line does not cross among the loads tried.
    """

    def enough(load: float) -> bool:
        reached = goodput(load)
        report(load, reached)
        return reached >= GOODPUT

    low = high = start
    if enough(low):
        while enough(high := 2 * low):
            low = high
            if low > limits[1]:
                raise NoCrossing(
                    f"{what}: goodput stays above {GOODPUT:g} at any load",
                    "tighten its targets or lower its budget",
                )
    else:
        while not enough(low := high / 2):
            high = low
            if high < limits[0]:
                raise NoCrossing(
                    f"{what}: goodput stays below {GOODPUT:g} at any load",
                    "loosen its targets or raise its budget",
                )
    middle = math.sqrt(low * high)
    low, high = (middle, high) if enough(middle) else (low, middle)
    tried = np.geomspace(low / BEYOND, high * BEYOND, POINTS)
    reached = [goodput(float(load)) for load in tried]
    for point in zip(tried.tolist(), reached, strict=True):
        report(*point)
    slope, level = np.polyfit(np.log(tried), reached, 1)
    if slope >= 0:
        raise NoCrossing(f"{what}: goodput does not fall with the load", "play more episodes")
    crossing = (GOODPUT - level) / slope
    if not np.log(tried[0]) <= crossing <= np.log(tried[-1]):  # nothing was played out there
        raise NoCrossing(
            f"{what}: goodput is too noisy to say where it falls through {GOODPUT:g}",
            "play more episodes",
        )
    found = float(f"{math.exp(crossing):.3g}")
    return found, goodput(found)
