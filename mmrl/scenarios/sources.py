"""Where an episode's requests come from: a generated workload, a scenario's trace, a given trace.

A source fills the request table for a wanted *utilisation*: seconds of service alone that are
offered per second. That one number makes the same load of a small and a large fleet.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmrl.errors import InputError
from mmrl.scenarios.bank import CostBank
from mmrl.scenarios.requests import (
    FleetCosts,
    TraceArrays,
    mean_service_s,
    recorded_service_s,
    replay_requests,
    sample_requests,
)
from mmrl.scenarios.schema import Scenario, TraceSpec
from mmrl.scenarios.targets import TargetNumbers
from mmrl.workloads.fleet import fit_to_fleet
from mmrl.workloads.generators import WorkloadSpec
from mmrl.workloads.readers import read_trace
from mmrl.workloads.trace import Trace

SERVICE_SAMPLES = 20_000  # requests behind a mean service time


class Filled(NamedTuple):
    """Rows filled, mean rate per second of the source, requests for which there was no room."""

    requests: int
    rate_per_s: float
    dropped: int


class GeneratedRequests:
    """Samples requests from a workload.

    Args:
        spec: The workload.
        scenario: For targets and duration.
        bank: The costs of all models that the scenario can draw.

    Raises:
        InputError: A file of the workload cannot be read, or it does not suit a fixed fleet.

    Attributes:
        longest_tokens: The most tokens, prompt and output, of a request to any model.
    """

    longest_tokens: int | NDArray[np.int64]

    def __init__(self, spec: WorkloadSpec, scenario: Scenario, bank: CostBank) -> None:
        shares, low = len(spec.popularity.shares), scenario.fleet.size[0] if scenario.fleet else 0
        if shares and not (low or scenario.largest_fleet) == shares == scenario.largest_fleet:
            raise InputError(
                f"scenario '{scenario.name}': workload.popularity.shares: {shares} numbers, but "
                f"the fleet has {low or scenario.largest_fleet} to {scenario.largest_fleet} models",
                "give one share per model, or a zipf exponent",
            )
        self._ranges = spec.ranges
        self._targets = scenario.targets.numbers
        self._duration_s = scenario.duration_s
        self._service_s = mean_service_s(
            self._ranges.lengths,
            bank.decode_tables,
            bank.prefill_tables,
            np.random.default_rng(0),
            SERVICE_SAMPLES,
        )
        self.longest_tokens = spec.lengths.context_limit_tokens

    def fill(
        self,
        rng: np.random.Generator,
        utilisation: float,
        costs: FleetCosts,
        requests: np.recarray,
    ) -> Filled:
        """Fill the request table from the start."""
        n, rate, dropped = sample_requests(
            rng,
            self._ranges,
            self._service_s,
            utilisation,
            self._duration_s,
            costs,
            self._targets,
            requests,
        )
        return Filled(n, rate, dropped)


class RecordedRequests:
    """Replays windows of a trace, each from a random instant on; its end joins its start.

    Time is stretched, so that the rate is the wanted one and every burst keeps its shape.

    Args:
        spec: The files, and how their services become models.
        scenario: For fleet, targets and duration.
        bank: The costs of all models that the scenario can draw.

    Raises:
        InputError: A file cannot be read, or does not suit the fleet.

    Attributes:
        longest_tokens: The most tokens, prompt and output, of a request as mapped: int64[M] of a
            fixed fleet's models; of drawn fleets, whose models change places, one number for all.
    """

    longest_tokens: int | NDArray[np.int64]

    def __init__(self, spec: TraceSpec, scenario: Scenario, bank: CostBank) -> None:
        if spec.mapping == "names" and scenario.fleet is not None:
            raise InputError(
                f"scenario '{scenario.name}': trace.mapping: 'names' needs a fixed fleet",
                "use services or segments",
            )
        self._raw = read_trace(spec.paths, spec.format, spec.skip_bad, lengths=spec.lengths)
        self._mapping = spec.mapping
        self._models = scenario.models
        self._targets = scenario.targets.numbers
        self._duration_s = scenario.duration_s
        self._bank = bank
        self._fitted: dict[int, tuple[Trace, NDArray[np.float64]]] = {}
        for models in range(
            scenario.fleet.size[0] if scenario.fleet else scenario.largest_fleet,
            scenario.largest_fleet + 1,
        ):
            self._fit(models)
        # Not of the raw trace: what the mapping leaves out needs no room.
        longest = [longest_tokens(trace) for trace, _ in self._fitted.values()]
        self.longest_tokens = longest[0] if self._models else max(int(one.max()) for one in longest)

    def _fit(self, models: int) -> None:
        """Map the trace to a fleet of this size, and learn what its requests cost on each row."""
        names = tuple(f"model {m}" for m in range(models))
        if self._models is not None:
            names = unique_names(self._models)
        trace = fit_to_fleet(self._raw, names, self._mapping)
        tables = self._bank.decode_tables, self._bank.prefill_tables
        self._fitted[models] = trace, service_by_row(trace, models, *tables)

    def notes(self, models: int) -> tuple[str, ...]:
        """Say what was done to the trace for a fleet of this size."""
        return self._fitted[models][0].notes

    def fill(
        self,
        rng: np.random.Generator,
        utilisation: float,
        costs: FleetCosts,
        requests: np.recarray,
    ) -> Filled:
        """Fill the request table from the start."""
        models = len(costs.rows)
        trace, service_s = self._fitted[models]
        rate = utilisation / float(service_s[costs.rows, np.arange(models)].sum())
        period_ns = round(trace.duration_s * 1e9)
        start_ns = int(rng.random() * period_ns)
        stretch = trace.rate_per_s / rate
        n, dropped = replay_requests(
            arrays(trace),
            period_ns,
            start_ns,
            stretch,
            self._duration_s,
            costs,
            self._targets,
            requests,
        )
        return Filled(n, rate, dropped)

    def most_requests(self, utilisation: float, rows: NDArray[np.int64]) -> int:
        """Return the most requests that an episode may have, wherever it begins.

        Args:
            utilisation: Wanted seconds of service alone per second.
            rows: Those of the fixed fleet, or those that a fleet is drawn from: of it, whatever
                is the fastest for each service of the trace.
        """
        most = 0
        for models, (trace, service_s) in self._fitted.items():
            of_each = service_s[rows].min(axis=0)
            if self._models is not None:
                of_each = service_s[rows, np.arange(models)]
            stretch = trace.rate_per_s * float(of_each.sum()) / utilisation
            most = max(most, busiest(trace, int(self._duration_s * 1e9 / stretch) + 1))
        return most


def busiest(trace: Trace, window_ns: int) -> int:
    """Return the most requests within a time; after the end of the trace it begins anew."""
    period_ns = round(trace.duration_s * 1e9)
    laps, rest_ns = divmod(window_ns, period_ns)
    arrival_ns = np.concatenate([trace.arrival_ns, trace.arrival_ns + period_ns])
    ends = np.searchsorted(arrival_ns, trace.arrival_ns + rest_ns, side="right")
    return laps * len(trace) + int((ends - np.arange(len(trace))).max())


def play(
    trace: Trace,
    duration_s: float,
    costs: FleetCosts,
    targets: TargetNumbers,
    requests: np.recarray,
) -> Filled:
    """Fill the request table with a trace as it is, from its start.

    Raises:
        InputError: The trace has another number of models than the fleet, or too many requests.
    """
    if len(trace.model_names) != len(costs.rows):
        raise InputError(
            f"the trace has {len(trace.model_names)} models, the fleet has {len(costs.rows)}",
            "fit it to the fleet (mmrl.workloads.fleet.fit_to_fleet)",
        )
    n, dropped = replay_requests(arrays(trace), 0, 0, 1.0, duration_s, costs, targets, requests)
    if dropped:
        raise InputError(
            f"the trace has {n + dropped:,} requests in {duration_s:g} s, the table holds {n:,}",
            "lower its rate, or make it the scenario's trace",
        )
    return Filled(n, n / duration_s, 0)


def arrays(trace: Trace) -> TraceArrays:
    """Return the arrays of a trace for compiled code."""
    return TraceArrays(*(getattr(trace, field) for field in TraceArrays._fields))


def service_by_row(
    trace: Trace,
    models: int,
    decode_tables: NDArray[np.float64],
    prefill_tables: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return what `recorded_service_s` does, float64[P, M], from about 20,000 requests."""
    stride = max(1, len(trace) // SERVICE_SAMPLES)
    return recorded_service_s(arrays(trace), models, stride, decode_tables, prefill_tables)


def longest_tokens(trace: Trace) -> NDArray[np.int64]:
    """Return the most tokens, prompt and output, of a request to each model, int64[M]; least 1."""
    longest = np.ones(len(trace.model_names), np.int64)
    np.maximum.at(longest, trace.model, trace.tokens)
    return longest


def unique_names(models: tuple[str, ...]) -> tuple[str, ...]:
    """Name a fleet; the second model of an architecture is ``name#2``, and so on."""
    seen: dict[str, int] = {}
    names = []
    for model in models:
        seen[model] = seen.get(model, 0) + 1
        names.append(model if seen[model] == 1 else f"{model}#{seen[model]}")
    return tuple(names)
