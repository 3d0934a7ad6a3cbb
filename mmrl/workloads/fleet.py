"""Fit a recorded trace to a fleet: whose requests each model gets, and how many per second.

`fit_to_fleet` takes a window, maps the trace's services to the fleet's models and rescales the
total rate. Each step adds a note to the trace.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from mmrl.errors import InputError, unknown
from mmrl.workloads.trace import Trace, short_name

Mapping = Literal["auto", "names", "services", "segments"]
Rescale = Literal["dilate", "thin"]


def fit_to_fleet(
    raw: Trace,
    model_names: Sequence[str],
    mapping: Mapping = "auto",
    rate_per_s: float | None = None,
    rescale: Rescale = "dilate",
    window: tuple[float, float | None] | None = None,
    seed: int = 0,
) -> Trace:
    """Turn a trace over services into a trace over a fleet.

    Args:
        raw: What `read_trace` gave.
        model_names: The fleet, M models.
        mapping: ``names``: a service is the model of its name. ``services``: the M most popular
            services are the models, the most popular one the first. ``segments``: the time is
            cut into as few equal segments as give M pieces of a service, and the pieces run side
            by side, one model each. ``auto``: names where one matches, services where there are
            enough, else segments.
        rate_per_s: The total rate to reach; None to leave it.
        rescale: ``dilate`` stretches time and keeps every request and the shape of bursts;
            ``thin`` keeps each request with the same probability, which destroys bursts.
        window: (start_s, duration_s or None for the rest) of raw to use, in its own time.
        seed: For thinning.

    Raises:
        InputError: A setting is unknown, or the trace cannot be used this way.
    """
    if mapping not in get_args(Mapping):
        raise unknown("mapping", mapping, get_args(Mapping))
    if rescale not in get_args(Rescale):
        raise unknown("way to rescale", rescale, get_args(Rescale))
    trace = raw
    if window is not None:
        start_s, duration_s = window
        trace = raw.slice(start_s, raw.duration_s if duration_s is None else start_s + duration_s)
    if len(trace) == 0:
        raise InputError("the trace holds no requests", "take another window")
    names = tuple(model_names)
    if mapping == "auto":
        mapping = _choose(trace, names)
    if mapping == "names":
        trace = _map_names(trace, names)
    elif mapping == "services":
        trace = _map_services(trace, names)
    else:
        trace = _map_segments(trace, names)
    if rate_per_s is None:
        return trace
    if not 0 < rate_per_s < np.inf:
        raise InputError(f"rate_per_s is {rate_per_s:g}, not a positive number")
    return dilate(trace, rate_per_s) if rescale == "dilate" else thin(trace, rate_per_s, seed)


def dilate(trace: Trace, rate_per_s: float) -> Trace:
    """Stretch or compress time so that the same requests come at another mean rate."""
    factor = trace.rate_per_s / rate_per_s
    duration_s = trace.duration_s * factor
    last_ns = int(np.ceil(duration_s * 1e9)) - 1
    return replace(
        trace,
        arrival_ns=np.minimum(np.floor(trace.arrival_ns * factor).astype(np.int64), last_ns),
        duration_s=duration_s,
        notes=(
            *trace.notes,
            f"rescaled {trace.rate_per_s:.4g} to {rate_per_s:.4g} requests/s by time dilation: "
            f"time x {factor:.4g}, now {duration_s:.1f} s; no request dropped",
        ),
    )


def thin(trace: Trace, rate_per_s: float, seed: int = 0) -> Trace:
    """Keep each request with the probability that gives a lower mean rate.

    Raises:
        InputError: The rate is above the trace's, or no request is left.
    """
    probability = rate_per_s / trace.rate_per_s
    if probability > 1:
        raise InputError(
            f"thinning cannot raise the rate from {trace.rate_per_s:.4g} to {rate_per_s:.4g}/s",
            "use time dilation",
        )
    thinned = trace.select(np.random.default_rng(seed).random(len(trace)) < probability)
    if len(thinned) == 0:
        raise InputError(f"no request is left at {rate_per_s:g}/s", "ask for a higher rate")
    return thinned.with_note(
        f"rescaled {trace.rate_per_s:.4g} to {rate_per_s:.4g} requests/s by thinning: kept "
        f"{len(thinned):,} of {len(trace):,} requests (seed {seed}); thinning destroys bursts"
    )


def _choose(trace: Trace, names: tuple[str, ...]) -> Mapping:
    if set(trace.model_names) & set(names):
        return "names"
    return "services" if np.count_nonzero(trace.counts) >= len(names) else "segments"


def _map_names(trace: Trace, names: tuple[str, ...]) -> Trace:
    for name, count in zip(trace.model_names, trace.counts, strict=True):
        if count and name not in names:
            raise InputError(
                f"the trace asks for model '{name}', which is not in the fleet",
                f"the fleet: {', '.join(names)}; map by popularity with --mapping services",
            )
    index = [names.index(name) if name in names else -1 for name in trace.model_names]
    model = np.array(index, np.int32)[trace.model]
    return replace(trace, model=model, model_names=names)


def _map_services(trace: Trace, names: tuple[str, ...]) -> Trace:
    ranked = np.argsort(-trace.counts, kind="stable")[: len(names)]
    if np.count_nonzero(trace.counts) < len(names):
        raise InputError(
            f"the trace has {np.count_nonzero(trace.counts)} services for {len(names)} models",
            "cut it with --mapping segments",
        )
    index = np.full(len(trace.model_names), -1, np.int32)
    index[ranked] = np.arange(len(names))
    kept = trace.select(index[trace.model] >= 0)
    pairs = ", ".join(
        f"{name} = {short_name(trace.model_names[service])}"
        for name, service in zip(names, ranked, strict=True)
    )
    note = f"mapped services by popularity: {pairs}"
    if len(kept) < len(trace):
        note += f"; {len(trace) - len(kept):,} requests of the other services left out"
    return replace(kept, model=index[kept.model], model_names=names, notes=(*kept.notes, note))


def _map_segments(trace: Trace, names: tuple[str, ...]) -> Trace:
    """Model m gets segment m // K of the (m % K)-th most popular of the K services."""
    ranked = [s for s in np.argsort(-trace.counts, kind="stable") if trace.counts[s]][: len(names)]
    services = len(ranked)
    segments = -(-len(names) // services)
    rank = np.full(len(trace.model_names), services, np.int64)
    rank[ranked] = np.arange(services)
    duration_s = trace.duration_s / segments
    segment_ns = int(np.ceil(duration_s * 1e9))
    segment = trace.arrival_ns // segment_ns
    model = segment * services + rank[trace.model]
    kept = (rank[trace.model] < services) & (model < len(names))
    arrival_ns = trace.arrival_ns - segment * segment_ns
    order = np.lexsort((model, arrival_ns))
    order = order[kept[order]]
    note = (
        f"cut {services} service{'s' * (services > 1)} into {segments} segment"
        f"{'s' * (segments > 1)} of {duration_s:.1f} s, one per model, side by side: "
        f"{len(order):,} of {len(trace):,} requests used"
    )
    return Trace(
        arrival_ns[order],
        model[order].astype(np.int32),
        trace.prompt_tokens[order],
        trace.output_tokens[order],
        trace.batch_work[order],
        names,
        duration_s,
        (*trace.notes, note),
    )
