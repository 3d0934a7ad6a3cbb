"""Synthetic workloads: a specification with ranges, drawn once per episode, sampled compiled.

Three steps. `WorkloadSpec` is what a user writes (TOML); every number may be a ``[low, high]``
range. `draw_workload` draws one concrete workload of M models from it. `generate` samples its
requests: each model is an independent renewal process whose clock runs at the model's current
rate, so that drift and on/off phases change its speed and keep its character; the processes are
merged by time, ties by model index. Both are compiled and depend on nothing but the generator's
state.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from mmrl.errors import InputError
from mmrl.node.jit import jit_arrays
from mmrl.workloads.lengths import (
    BATCH_WORK,
    DEFAULT_CONTEXT_LIMIT_TOKENS,
    EMPIRICAL,
    LengthTable,
    family_names,
    length_table,
    sample_lengths,
)
from mmrl.workloads.readers import read_length_pairs
from mmrl.workloads.trace import Trace

ARRIVAL_KINDS = ("poisson", "gamma", "onoff")
POISSON, GAMMA, ONOFF = range(3)
ArrivalKind = Literal["poisson", "gamma", "onoff"]


def as_range(value: Any) -> Any:
    """Return a number as the range from it to itself; everything else as it is."""
    return (value, value) if isinstance(value, int | float) else value


def _between(low: float, high: float) -> AfterValidator:
    def check(range_: tuple[float, float]) -> tuple[float, float]:
        if not low <= range_[0] <= range_[1] <= high:
            raise ValueError(f"must be a number, or [low, high], within {low:g} to {high:g}")
        return range_

    return AfterValidator(check)


def _as_written(range_: tuple[float, float]) -> float | tuple[float, float]:
    return range_[0] if range_[0] == range_[1] else range_


# A number, or [low, high] to draw it from uniformly.
Range = Annotated[tuple[float, float], BeforeValidator(as_range), PlainSerializer(_as_written)]
_STRICT = ConfigDict(extra="forbid", frozen=True)


class ArrivalSpec(BaseModel):
    """How the requests of one model follow each other; each model draws its own numbers.

    Attributes:
        kind: ``poisson``, ``gamma`` (bursts: inter-arrival times with the given CV) or ``onoff``
            (Poisson in the on-phases, silence in between); of a list, each model draws one.
        cv: Coefficient of variation of the gamma inter-arrival times.
        on_s: Mean of the exponential on-phases.
        off_ratio: Mean off-phase over mean on-phase; the rate while on is (1 + off_ratio) times
            the model's mean rate.
    """

    model_config = _STRICT
    kind: ArrivalKind | Annotated[list[ArrivalKind], Field(min_length=1)] = "poisson"
    cv: Annotated[Range, _between(0.1, 16)] = (4.0, 4.0)
    on_s: Annotated[Range, _between(0.01, 1e6)] = (4.0, 16.0)
    off_ratio: Annotated[Range, _between(0.01, 100)] = (1.0, 5.0)


class PopularitySpec(BaseModel):
    """How the total rate is divided among the models.

    Attributes:
        zipf: Exponent s: the model of rank r gets a share proportional to r^-s. Ignored where
            `shares` are given.
        shares: One positive number per model, in proportion.
        order: ``fleet``: the first model is the most popular (or the shares are in fleet
            order); ``random``: the ranks are shuffled in each episode.
        drift_period_s: The shares are dealt anew, at random, to the models after each such
            period; 0 for never.
    """

    model_config = _STRICT
    zipf: Annotated[Range, _between(0, 4)] = (1.0, 1.0)
    shares: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    order: Literal["fleet", "random"] = "fleet"
    drift_period_s: Annotated[Range, _between(0, 1e6)] = (0.0, 0.0)

    @field_validator("drift_period_s")
    @classmethod
    def _not_too_short(cls, range_: tuple[float, float]) -> tuple[float, float]:
        if range_[1] > 0 and range_[0] < 1:
            raise ValueError("must be 0 for no drift, or at least 1 s")
        return range_


class LengthSpec(BaseModel):
    """How long prompts and outputs are.

    Attributes:
        family: A name of `mmrl.workloads.lengths.FAMILIES`, ``empirical`` (pairs from `file`),
            ``mixed`` (all of `FAMILIES`), or a list of names.
        assign: Which model gets which of several families: drawn at ``random`` in each episode,
            or dealt in ``fleet`` order (the first model the first family, and so on around).
        file: A trace, or a CSV with prompt_tokens and output_tokens, for ``empirical``.
        context_limit_tokens: The most that prompt and output may have together.
    """

    model_config = _STRICT
    family: str | Annotated[list[str], Field(min_length=1)] = "chat"
    assign: Literal["random", "fleet"] = "random"
    file: Path | None = None
    context_limit_tokens: Annotated[int, Field(ge=2, le=2**24)] = DEFAULT_CONTEXT_LIMIT_TOKENS

    @model_validator(mode="after")
    def _families_exist(self) -> "LengthSpec":
        try:
            names = family_names(self.family)
        except InputError as error:
            raise ValueError(str(error)) from None
        if (EMPIRICAL in names) != (self.file is not None):
            raise ValueError("family 'empirical' and a file of recorded lengths need each other")
        return self


class WorkloadRanges(NamedTuple):
    """A `WorkloadSpec` in the form that compiled code reads; ranges are float64[2]."""

    arrival_kinds: NDArray[np.int64]
    cv: NDArray[np.float64]
    on_s: NDArray[np.float64]
    off_ratio: NDArray[np.float64]
    zipf: NDArray[np.float64]
    shares: NDArray[np.float64]
    random_order: bool
    drift_period_s: NDArray[np.float64]
    lengths: LengthTable
    random_families: bool


class DrawnWorkload(NamedTuple):
    """One episode's workload of M models, all numbers fixed.

    Attributes:
        shares: float64[M], each model's share of the total rate; they add up to 1.
        gap_shape: float64[M], gamma shape of the inter-arrival times, 1 / CV^2.
        on_s: float64[M], mean on-phase.
        off_s: float64[M], mean off-phase; 0 for a model that is always on.
        drift_period_s: Time between two dealings of the rates; infinite for none.
        lengths: One row for each model.
    """

    shares: NDArray[np.float64]
    gap_shape: NDArray[np.float64]
    on_s: NDArray[np.float64]
    off_s: NDArray[np.float64]
    drift_period_s: float
    lengths: LengthTable


class Arrivals(NamedTuple):
    """Sampled requests: the arrays of `Trace`, and how many did not fit in the capacity."""

    arrival_ns: NDArray[np.int64]
    model: NDArray[np.int32]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    batch_work: NDArray[np.bool_]
    dropped: int


class WorkloadSpec(BaseModel):
    """What a fleet is asked to do, but for the total rate."""

    model_config = _STRICT
    arrivals: ArrivalSpec = ArrivalSpec()
    popularity: PopularitySpec = PopularitySpec()
    lengths: LengthSpec = LengthSpec()

    @cached_property
    def ranges(self) -> WorkloadRanges:
        """The compiled form; reads the file of empirical lengths on first use.

        Raises:
            InputError: That file cannot be read.
        """
        kinds = self.arrivals.kind
        pairs = None
        if self.lengths.file is not None:
            pairs = read_length_pairs(self.lengths.file)
        families = family_names(self.lengths.family)
        return WorkloadRanges(
            np.array(
                [ARRIVAL_KINDS.index(k) for k in ([kinds] if isinstance(kinds, str) else kinds)]
            ),
            np.array(self.arrivals.cv),
            np.array(self.arrivals.on_s),
            np.array(self.arrivals.off_ratio),
            np.array(self.popularity.zipf),
            np.array(self.popularity.shares, np.float64),
            self.popularity.order == "random",
            np.array(self.popularity.drift_period_s),
            length_table(families, self.lengths.context_limit_tokens, pairs),
            self.lengths.assign == "random",
        )

    def pinned(self) -> "WorkloadSpec":
        """Return the workload with ranges at their middles and the first of each list."""

        def middle(spec: BaseModel, *ranges: str, **lists: Any) -> dict[str, Any]:
            middles = {name: (sum(getattr(spec, name)) / 2,) * 2 for name in ranges}
            return middles | {k: v[0] if isinstance(v, list) else v for k, v in lists.items()}

        arrivals, popularity, lengths = self.arrivals, self.popularity, self.lengths
        of_lengths = middle(lengths, family=lengths.family)
        if EMPIRICAL not in family_names(of_lengths["family"]):
            of_lengths["file"] = None  # it is of another family
        of_arrivals = middle(arrivals, "cv", "on_s", "off_ratio", kind=arrivals.kind)
        return WorkloadSpec(
            arrivals=arrivals.model_copy(update=of_arrivals),
            popularity=popularity.model_copy(
                update=middle(popularity, "zipf", "drift_period_s") | {"order": "fleet"}
            ),
            lengths=lengths.model_copy(update=of_lengths),
        )

    def draw(self, rng: np.random.Generator, models: int) -> DrawnWorkload:
        """Draw the workload of one episode.

        Args:
            rng: Where every draw comes from.
            models: M, how many models the fleet has.

        Raises:
            InputError: There are explicit shares, and not M of them.
        """
        if self.popularity.shares and len(self.popularity.shares) != models:
            raise InputError(
                f"workload has {len(self.popularity.shares)} popularity shares "
                f"for a fleet of {models}",
                "give one share per model, or a zipf exponent",
            )
        return draw_workload(rng, self.ranges, models)


@jit_arrays
def draw_workload(rng: np.random.Generator, ranges: WorkloadRanges, models: int) -> DrawnWorkload:
    """Draw the workload of one episode of `models` models; compiled form of `WorkloadSpec.draw`.

    Zipf exponent and drift period are drawn once, arrival kind and numbers and length family
    for each model.
    """
    if len(ranges.shares) > 0:
        shares = ranges.shares.copy()
    else:
        shares = np.arange(1.0, models + 1.0) ** -_uniform(rng, ranges.zipf)
    shares /= shares.sum()
    if ranges.random_order:
        _shuffle(rng, shares)
    drift_period_s = _uniform(rng, ranges.drift_period_s)

    gap_shape, on_s, off_s = np.ones(models), np.zeros(models), np.zeros(models)
    rows = np.empty((models, ranges.lengths.rows.shape[1]))
    for m in range(models):
        kind = ranges.arrival_kinds[int(rng.random() * len(ranges.arrival_kinds))]
        if kind == GAMMA:
            gap_shape[m] = _uniform(rng, ranges.cv) ** -2.0
        elif kind == ONOFF:
            on_s[m] = _uniform(rng, ranges.on_s)
            off_s[m] = on_s[m] * _uniform(rng, ranges.off_ratio)
        families = len(ranges.lengths.rows)
        family = int(rng.random() * families) if ranges.random_families else m % families
        rows[m] = ranges.lengths.rows[family]
    return DrawnWorkload(
        shares,
        gap_shape,
        on_s,
        off_s,
        drift_period_s if drift_period_s > 0.0 else np.inf,
        LengthTable(rows, ranges.lengths.pairs, ranges.lengths.context_limit_tokens),
    )


@jit_arrays
def generate(
    rng: np.random.Generator,
    rates_per_s: NDArray[np.float64],
    workload: DrawnWorkload,
    duration_s: float,
    capacity: int,
) -> Arrivals:
    """Sample the requests of one episode.

    Args:
        rng: Where every draw comes from; the same state gives the same bits.
        rates_per_s: float64[M], mean rates; with drift they are dealt anew in each period.
        workload: What `draw_workload` gave.
        duration_s: Requests arrive in [0, duration_s).
        capacity: The most requests to return (the earliest are kept); 0 for all.

    Returns:
        The requests in order of arrival, ties by model index.
    """
    models = len(rates_per_s)
    epoch_s = min(workload.drift_period_s, duration_s)
    rates = np.empty((int(np.ceil(duration_s / epoch_s)) + 1, models))
    rates[0] = rates_per_s
    for epoch in range(1, len(rates)):
        rates[epoch] = rates[epoch - 1]
        _shuffle(rng, rates[epoch])

    times = np.empty(64 + int(1.5 * rates_per_s.sum() * duration_s), np.int64)
    bounds = np.zeros(models + 1, np.int64)
    for m in range(models):
        times, bounds[m + 1] = _model_arrivals(
            rng,
            np.ascontiguousarray(rates[:, m]),
            epoch_s,
            workload.gap_shape[m],
            workload.on_s[m],
            workload.off_s[m],
            duration_s,
            times,
            bounds[m],
        )
    total = bounds[models]
    n = min(total, capacity) if capacity > 0 else total

    out = Arrivals(
        np.empty(n, np.int64),
        np.empty(n, np.int32),
        np.empty(n, np.int32),
        np.empty(n, np.int32),
        np.empty(n, np.bool_),
        total - n,
    )
    heads = bounds[:-1].copy()
    lengths = workload.lengths
    for i in range(n):
        first, first_ns = -1, np.iinfo(np.int64).max
        for m in range(models):
            if heads[m] < bounds[m + 1] and times[heads[m]] < first_ns:
                first, first_ns = m, times[heads[m]]
        heads[first] += 1
        row = lengths.rows[first]
        prompt, output = sample_lengths(rng, row, lengths.pairs, lengths.context_limit_tokens)
        out.arrival_ns[i] = first_ns
        out.model[i] = first
        out.prompt_tokens[i] = prompt
        out.output_tokens[i] = output
        out.batch_work[i] = row[BATCH_WORK] > 0.0
    return out


@jit_arrays
def _model_arrivals(
    rng: np.random.Generator,
    rates_per_s: NDArray[np.float64],
    epoch_s: float,
    gap_shape: float,
    on_s: float,
    off_s: float,
    duration_s: float,
    times: NDArray[np.int64],
    n: int,
) -> tuple[NDArray[np.int64], int]:
    """Append one model's arrival times to times[n:], which grows as needed.

    `gap` counts down in expected requests, not in seconds: gaps have mean 1, and the rate says
    how fast they pass. The mean rate is right from t = 0 on: the first gap is the residual life
    of a gap met at a random time (U * Gamma(shape + 1), the equilibrium renewal process), and
    the phase at 0 is on with probability on / (on + off) and memoryless.

    Args:
        rng: Where every draw comes from.
        rates_per_s: float64[E], the model's mean rate in each epoch of epoch_s seconds.
        epoch_s: Length of an epoch.
        gap_shape: Gamma shape of the gaps.
        on_s: Mean on-phase.
        off_s: Mean off-phase, 0 for none.
        duration_s: Where to end.
        times: int64 buffer of arrival times in ns.
        n: How many of it are in use.

    Returns:
        The buffer (a larger one if it was full) and how many of it are in use.
    """
    on, switch_s, boost = True, np.inf, 1.0
    if off_s > 0.0:
        boost = (on_s + off_s) / on_s
        on = rng.random() * (on_s + off_s) < on_s
        switch_s = rng.standard_exponential() * (on_s if on else off_s)
    gap = rng.random() * rng.standard_gamma(gap_shape + 1.0) / gap_shape
    last_ns = int(duration_s * 1e9) - 1
    now_s, epoch = 0.0, 0
    while now_s < duration_s:
        epoch_end_s = (epoch + 1) * epoch_s
        end_s = min(epoch_end_s, switch_s, duration_s)
        rate = rates_per_s[epoch] * boost if on else 0.0
        while gap < rate * (end_s - now_s):
            now_s += gap / rate
            if n == len(times):
                larger = np.empty(2 * n, np.int64)
                larger[:n] = times
                times = larger
            times[n] = min(int(now_s * 1e9), last_ns)
            n += 1
            gap = rng.standard_gamma(gap_shape) / gap_shape
        gap -= rate * (end_s - now_s)
        now_s = end_s
        if end_s == switch_s:
            on = not on
            switch_s += rng.standard_exponential() * (on_s if on else off_s)
        if end_s == epoch_end_s:
            epoch += 1
    return times, n


@jit_arrays
def _uniform(rng: np.random.Generator, range_: NDArray[np.float64]) -> float:
    return float(range_[0] + (range_[1] - range_[0]) * rng.random())


@jit_arrays
def _shuffle(rng: np.random.Generator, values: NDArray[np.float64]) -> None:
    for last in range(len(values) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        values[last], values[other] = values[other], values[last]


def sample_trace(
    spec: WorkloadSpec,
    model_names: tuple[str, ...],
    rate_per_s: float,
    duration_s: float,
    seed: int = 0,
) -> Trace:
    """Draw a workload and sample a trace of it.

    Args:
        spec: What to draw from.
        model_names: The fleet.
        rate_per_s: Mean total rate.
        duration_s: Requests arrive in [0, duration_s).
        seed: Of the random generator.

    Raises:
        InputError: The rate or the duration is not positive, or spec does not suit the fleet.
    """
    for name, value in (("rate_per_s", rate_per_s), ("duration_s", duration_s)):
        if not 0 < value < np.inf:
            raise InputError(f"{name} is {value:g}, not a positive number")
    rng = np.random.default_rng(seed)
    workload = spec.draw(rng, len(model_names))
    arrivals = generate(rng, rate_per_s * workload.shares, workload, float(duration_s), 0)
    note = (
        f"generated: mean rate {rate_per_s:g}/s (this sample "
        f"{len(arrivals.arrival_ns) / duration_s:.4g}/s), seed {seed}, "
        f"{spec.model_dump_json(exclude_defaults=True)}"
    )
    return Trace(*arrivals[:5], model_names, float(duration_s), (note,))
