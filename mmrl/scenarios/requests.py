"""Fill the request table of an episode: arrivals, lengths, targets, latency alone; compiled.

Requests are sampled from a workload (`sample_requests`) or replayed from a trace
(`replay_requests`). *Alone* means on a resident model that serves nothing else: the whole prompt
in chunks, then decode steps at batch 1 in segments, exactly as docs/semantics.md prices them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmrl.node.jit import jit, jit_arrays
from mmrl.node.state import SEGMENT_STEPS, UNARRIVED
from mmrl.profiles.costs import decode_ns, prefill_alone_ns
from mmrl.scenarios.targets import TargetNumbers, targets_ns
from mmrl.workloads.generators import WorkloadRanges, draw_workload, generate
from mmrl.workloads.lengths import LengthTable, sample_lengths


class FleetCosts(NamedTuple):
    """What the requests of an episode need to know of its M models.

    Attributes:
        rows: int64[M], each model's row of the tables.
        decode_tables: float64[P, 65, 33], seconds.
        prefill_tables: float64[P, 257], seconds.
        decode_scale: float64[M], factor on decode times.
        prefill_scale: float64[M], factor on prefill times.
    """

    rows: NDArray[np.int64]
    decode_tables: NDArray[np.float64]
    prefill_tables: NDArray[np.float64]
    decode_scale: NDArray[np.float64]
    prefill_scale: NDArray[np.float64]


class TraceArrays(NamedTuple):
    """The arrays of a `Trace` of T requests, in the form that compiled code reads."""

    arrival_ns: NDArray[np.int64]
    model: NDArray[np.int32]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    batch_work: NDArray[np.bool_]


@jit
def decode_alone_ns(table: NDArray[np.float64], scale: float, prompt: int, output: int) -> int:
    """Return the time of the `output - 1` decode steps after the first token, at batch 1.

    A step costs what the first step of its segment costs, so all of them together cost as many
    steps at the mean of the segments' contexts (exact where the table is linear).
    """
    steps = output - 1
    if steps <= 0:
        return 0
    whole, rest = steps // SEGMENT_STEPS, steps % SEGMENT_STEPS
    grown = SEGMENT_STEPS * (SEGMENT_STEPS * (whole * (whole - 1) // 2) + whole * rest)
    return steps * decode_ns(table, scale, 1, prompt + (2 * grown + steps) // (2 * steps))


@jit_arrays
def mean_service_s(
    lengths: LengthTable,
    decode_tables: NDArray[np.float64],
    prefill_tables: NDArray[np.float64],
    rng: np.random.Generator,
    samples: int,
) -> NDArray[np.float64]:
    """Return the mean latency alone of each model's requests, float64[P, F], in seconds.

    Args:
        lengths: F families.
        decode_tables: float64[P, 65, 33], seconds.
        prefill_tables: float64[P, 257], seconds.
        rng: Where the lengths come from.
        samples: How many of each family.
    """
    result = np.zeros((len(decode_tables), len(lengths.rows)))
    for family in range(len(lengths.rows)):
        for _ in range(samples):
            prompt, output = sample_lengths(
                rng, lengths.rows[family], lengths.pairs, lengths.context_limit_tokens
            )
            for p in range(len(decode_tables)):
                alone_ns = prefill_alone_ns(prefill_tables[p], 1.0, prompt)
                alone_ns += decode_alone_ns(decode_tables[p], 1.0, prompt, output)
                result[p, family] += alone_ns * 1e-9 / samples
    return result


@jit_arrays
def recorded_service_s(
    trace: TraceArrays,
    models: int,
    stride: int,
    decode_tables: NDArray[np.float64],
    prefill_tables: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return what each model of a fleet adds to the mean service of a trace's requests.

    Args:
        trace: T requests.
        models: M, the size of the fleet.
        stride: Only each so-manieth request is looked at.
        decode_tables: float64[P, 65, 33], seconds.
        prefill_tables: float64[P, 257], seconds.

    Returns:
        float64[P, M] seconds: share of the requests that are model m's, times their mean latency
        alone on a model of row p. The sum over a fleet is the mean service of a request.
    """
    result = np.zeros((len(decode_tables), models))
    looked_at = (len(trace.model) + stride - 1) // stride
    for i in range(0, len(trace.model), stride):
        prompt, output = trace.prompt_tokens[i], trace.output_tokens[i]
        for p in range(len(decode_tables)):
            alone_ns = prefill_alone_ns(prefill_tables[p], 1.0, prompt)
            alone_ns += decode_alone_ns(decode_tables[p], 1.0, prompt, output)
            result[p, trace.model[i]] += alone_ns * 1e-9 / looked_at
    return result


@jit_arrays
def sample_requests(
    rng: np.random.Generator,
    ranges: WorkloadRanges,
    service_s: NDArray[np.float64],
    utilisation: float,
    duration_s: float,
    costs: FleetCosts,
    targets: TargetNumbers,
    requests: np.recarray,
) -> tuple[int, float, int]:
    """Draw a workload, find the rate that gives the utilisation, sample the requests.

    Args:
        rng: Where every draw comes from.
        ranges: What to draw the workload from.
        service_s: float64[P, F], mean service of each model's row and length family.
        utilisation: Wanted seconds of service alone per second.
        duration_s: Requests arrive in [0, duration_s).
        costs: The fleet.
        targets: Latency targets.
        requests: recarray[R] of REQUEST to fill from the start.

    Returns:
        (requests filled, mean rate per second, requests for which there was no room).
    """
    models = len(costs.rows)
    workload = draw_workload(rng, ranges, models)
    by_share, by_count = 0.0, 0.0
    for m in range(models):
        family = 0
        while not np.array_equal(ranges.lengths.rows[family], workload.lengths.rows[m]):
            family += 1
        service = service_s[costs.rows[m], family]
        by_share += workload.shares[m] * service
        by_count += service / models
    # After the shares have been dealt anew, each model's expected share is the same.
    before_drift = min(1.0, workload.drift_period_s / duration_s)
    rate = utilisation / (before_drift * by_share + (1.0 - before_drift) * by_count)

    drawn = generate(rng, rate * workload.shares, workload, duration_s, len(requests))
    for i in range(len(drawn.arrival_ns)):
        _fill(
            requests[i],
            drawn.arrival_ns[i],
            drawn.model[i],
            drawn.prompt_tokens[i],
            drawn.output_tokens[i],
            drawn.batch_work[i],
            costs,
            targets,
        )
    return len(drawn.arrival_ns), rate, drawn.dropped


@jit_arrays
def replay_requests(
    trace: TraceArrays,
    period_ns: int,
    start_ns: int,
    stretch: float,
    duration_s: float,
    costs: FleetCosts,
    targets: TargetNumbers,
    requests: np.recarray,
) -> tuple[int, int]:
    """Replay a trace from start_ns on; after its end it begins anew where period_ns > 0.

    Args:
        trace: At least one request.
        period_ns: Length of the trace, 0 to play it once.
        start_ns: Instant of the trace at which the episode begins.
        stretch: Seconds of the episode per second of the trace.
        duration_s: Requests arrive in [0, duration_s).
        costs: The fleet.
        targets: Latency targets.
        requests: recarray[R] of REQUEST to fill from the start.

    Returns:
        (requests filled, requests for which there was no room).
    """
    end_ns = int(duration_s * 1e9)
    j = int(np.searchsorted(trace.arrival_ns, start_ns))
    lap_ns, n, dropped = 0, 0, 0
    while True:
        if j == len(trace.arrival_ns):
            if period_ns == 0:
                break
            j, lap_ns = 0, lap_ns + period_ns
        now_ns = int((trace.arrival_ns[j] + lap_ns - start_ns) * stretch)
        if now_ns >= end_ns:
            break
        if n < len(requests):
            _fill(
                requests[n],
                now_ns,
                trace.model[j],
                trace.prompt_tokens[j],
                trace.output_tokens[j],
                trace.batch_work[j],
                costs,
                targets,
            )
            n += 1
        else:
            dropped += 1
        j += 1
    return n, dropped


@jit
def _fill(
    request: np.record,
    arrival_ns: int,
    model: int,
    prompt: int,
    output: int,
    batch_work: bool,
    costs: FleetCosts,
    targets: TargetNumbers,
) -> None:
    """Write every field of one request; the state is that before its arrival."""
    row = costs.rows[model]
    decode_table, decode_scale = costs.decode_tables[row], costs.decode_scale[model]
    prefill_ns = prefill_alone_ns(costs.prefill_tables[row], costs.prefill_scale[model], prompt)
    step_ns = decode_ns(decode_table, decode_scale, 1, prompt)
    ttft_ns, tpot_ns = targets_ns(targets, prompt, prefill_ns, step_ns)
    if batch_work:
        ttft_ns, tpot_ns = targets.batch_ttft_ns, 0.0
    request.arrival_ns = arrival_ns
    request.ttft_ns = int(ttft_ns)
    request.tpot_ns = int(tpot_ns)
    request.isolated_ns = prefill_ns + decode_alone_ns(decode_table, decode_scale, prompt, output)
    request.first_ns = -1
    request.finish_ns = -1
    request.model = model
    request.prompt = prompt
    request.output = output
    request.generated = 0
    request.prefilled = 0
    request.blocks = 0
    request.preemptions = 0
    request.state = UNARRIVED
    request.miss = 0
