"""Fit a recorded trace to a scenario, and cut it into the episodes that every policy then meets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmrl.errors import InputError
from mmrl.scenarios.calibrate import LEAST, MOST, NoCrossing, find_crossing, rule_goodput
from mmrl.scenarios.mixture import MixedSampler, ScenarioSampler
from mmrl.scenarios.sources import service_by_row, unique_names
from mmrl.workloads.fleet import Mapping, dilate, fit_to_fleet
from mmrl.workloads.trace import Trace

CALIBRATED = 40  # windows on which load 1 is found


@dataclass(frozen=True)
class Windows:
    """Episodes cut from a trace.

    Attributes:
        traces: One per episode, over the models of the fleet.
        notes: What was done to the file to get them, in order.
    """

    traces: tuple[Trace, ...]
    notes: tuple[str, ...]


def fit(raw: Trace, sampler: ScenarioSampler, mapping: Mapping = "auto") -> Trace:
    """Fit a trace to the fleet of a scenario, and stretch its time so that it offers load 1.

    Load 1 is what it is everywhere: there the slack rule reaches a goodput of .90. A trace has its
    own, for the same seconds of service alone can be batched well or not at all. Requests that
    their model can never serve are left out, as a server refuses them.

    Args:
        raw: What `read_trace` gave.
        sampler: Of a scenario with a fixed fleet on one platform.
        mapping: How services become models, see `fit_to_fleet`.

    Raises:
        InputError: The scenario draws its fleet, platform or variant, or the trace does not suit
            it.
    """
    scenario = sampler.scenario
    if isinstance(sampler, MixedSampler) or scenario.models is None or len(scenario.platform) > 1:
        drawn = "its variant" if scenario.variants else "its fleet or platform"
        raise InputError(
            f"scenario '{scenario.name}' draws {drawn}: a trace cannot be fitted",
            "name a scenario with a fixed fleet (mmrl scenarios list)",
        )
    fitted = fit_to_fleet(raw, unique_names(scenario.models), mapping)
    fitted = fitted.without_longer(sampler.most_tokens(0))
    models = len(scenario.models)
    service_s = service_by_row(fitted, models, sampler.decode_tables, sampler.prefill_tables)
    mean_service_s = float(service_s[sampler.rows(0), np.arange(models)].sum())

    def at(utilisation: float) -> Trace:
        return dilate(fitted, utilisation / mean_service_s)

    def goodput(utilisation: float) -> float:
        traces = _slices(at(utilisation), scenario.duration_s, CALIBRATED)
        return rule_goodput(sampler, [{"trace": trace} for trace in traces])

    own, limits = scenario.utilisation_at_load_1, (LEAST, MOST)
    try:
        found, reached = find_crossing("this trace", goodput, lambda *tried: None, own, limits)
    except NoCrossing as error:
        return at(own).with_note(f"{error.message}: load 1 is that of the scenario")
    return at(found).with_note(f"that is load 1: the slack rule has a goodput of {reached:.2f}")


def cut(fitted: Trace, sampler: ScenarioSampler, load: float, most: int) -> Windows:
    """Cut a trace into episodes at a load.

    Each window is as long as the scenario's episodes and no two overlap, so that they can be
    compared as separate episodes.

    Args:
        fitted: What `fit` gave.
        sampler: Of the scenario.
        load: Load; time is stretched to it.
        most: How many windows are wanted at most; spread evenly over the trace.
    """
    if load != 1:
        fitted = dilate(fitted, load * fitted.rate_per_s)
    length_s = sampler.scenario.duration_s
    traces = _slices(fitted, length_s, most)
    whole = int(fitted.duration_s / length_s)
    note = f"cut into {len(traces)} episodes of {length_s:g} s"
    if whole == 0:
        note = f"played as one episode of {fitted.duration_s:.1f} s"
    elif len(traces) < whole:
        note += f", spread evenly over the {whole:,} that it has"
    return Windows(tuple(replace(trace, notes=()) for trace in traces), (*fitted.notes, note))


def _slices(trace: Trace, length_s: float, most: int) -> tuple[Trace, ...]:
    """Return at most so many windows of a length, or all of a trace that is shorter than one."""
    whole = int(trace.duration_s / length_s)
    if whole == 0:
        return (trace,)
    count = min(most, whole)
    starts_s = [(k * whole // count) * length_s for k in range(count)]
    return tuple(trace.slice(start, start + length_s) for start in starts_s)


def label(files: Sequence[Path]) -> str:
    """Name a trace by its files."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0].name}{more}"
