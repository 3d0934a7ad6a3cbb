"""Cut a recorded trace into episodes of a scenario: the windows that every policy then meets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmrl.errors import InputError
from mmrl.scenarios.requests import recorded_service_s
from mmrl.scenarios.sampler import EpisodeSampler
from mmrl.scenarios.sources import arrays, unique_names
from mmrl.workloads.fleet import Mapping, dilate, fit_to_fleet
from mmrl.workloads.trace import Trace

SERVICE_SAMPLES = 20_000  # requests that are looked at to learn what the trace's service costs


@dataclass(frozen=True)
class Windows:
    """Episodes cut from a trace.

    Attributes:
        traces: One per episode, over the models of the fleet.
        notes: What was done to the file to get them, in order.
    """

    traces: tuple[Trace, ...]
    notes: tuple[str, ...]


def cut(
    raw: Trace, sampler: EpisodeSampler, load: float, most: int, mapping: Mapping = "auto"
) -> Windows:
    """Fit a trace to the fleet and load of a scenario and cut it into episodes.

    Requests that their model can never serve are left out, as a server refuses them. Time is
    stretched so that the whole trace offers the load; each window is as long as the
    scenario's episodes and no two overlap, so that they can be compared as separate episodes.

    Args:
        raw: What `read_trace` gave.
        sampler: Of a scenario with a fixed fleet on one platform.
        load: 1 as the scenario defines it.
        most: How many windows are wanted at most; spread evenly over the trace.
        mapping: How services become models, see `fit_to_fleet`.

    Raises:
        InputError: The scenario has no fixed fleet, or the trace does not suit it.
    """
    scenario = sampler.scenario
    if scenario.models is None or len(scenario.platform) > 1:
        raise InputError(
            f"scenario '{scenario.name}' draws its fleet or platform: a trace cannot be fitted",
            "name a scenario with a fixed fleet (mmrl scenarios list)",
        )
    fitted = fit_to_fleet(raw, unique_names(scenario.models), mapping)
    fitted = fitted.without_longer(sampler.most_tokens(0))
    service_s = recorded_service_s(
        arrays(fitted),
        len(scenario.models),
        max(1, len(fitted) // SERVICE_SAMPLES),
        sampler.decode_tables,
        sampler.prefill_tables,
    )
    mean_service_s = float(service_s[sampler.rows(0), np.arange(len(scenario.models))].sum())
    fitted = dilate(fitted, load * scenario.utilisation_at_load_1 / mean_service_s)
    length_s = scenario.duration_s
    whole = int(fitted.duration_s / length_s)
    if whole == 0:
        note = f"played as one episode of {fitted.duration_s:.1f} s"
        return Windows((fitted,), (*fitted.notes, note))
    count = min(most, whole)
    starts_s = [(k * whole // count) * length_s for k in range(count)]
    traces = tuple(fitted.slice(start, start + length_s) for start in starts_s)
    note = f"cut into {count} episodes of {length_s:g} s" + (
        f", spread evenly over the {whole:,} that it has" if count < whole else ""
    )
    return Windows(tuple(replace(trace, notes=()) for trace in traces), (*fitted.notes, note))


def label(files: Sequence[Path]) -> str:
    """Name a trace by its files."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0].name}{more}"
