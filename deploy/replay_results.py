"""What came of a replay: the simulator's request table, its metrics, its results, its report.

A run fills the arrays that a simulated episode leaves, so that every figure is computed by the code
that computes it for simulated episodes; simulated ones of the same arrivals may stand beside it.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmrl.agents.contenders import Contender, resolve
from mmrl.agents.play import Board, Piece, Played, play
from mmrl.agents.provenance import provenance
from mmrl.agents.results import Results, collect
from mmrl.agents.windows import Windows
from mmrl.deploy.replay import Sent, Workload
from mmrl.deploy.streams import Outcome
from mmrl.errors import InputError
from mmrl.files import atomic_write
from mmrl.metrics import episode_metrics, met_targets, request_latencies
from mmrl.node.requests import certain_miss
from mmrl.node.state import (
    DECODE,
    DONE,
    MISS_REFUSED,
    QUEUED,
    REFUSED,
    UNARRIVED,
    Nodes,
    Record,
    new_nodes,
)
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.schema import Scenario

if TYPE_CHECKING:
    import pandas as pd

REQUESTS = "requests.parquet"  # in the results folder, beside the tables of mmrl.agents.results
LATE_S = 0.02  # the 99th percentile of the lags from which a warning is due
UNKNOWN_COUNTERS = (
    "loads, preemptions, moved bytes, decisions and busy time are the server's: not known here, "
    "shown as 0"
)

POLICY = "mmrl_policy_info"
# Field of NODE -> the counter of mmrl.deploy.server.metrics, its labels, how many of the field's
# units are one of the counter's.
NODE_COUNTERS: dict[str, tuple[str, dict[str, str], float]] = {
    "decisions": ("mmrl_decisions_total", {}, 1),
    "illegal_actions": ("mmrl_illegal_actions_total", {}, 1),
    "h2d_busy_ns": ("mmrl_link_busy_seconds_total", {"direction": "h2d"}, 1e9),
    "d2h_busy_ns": ("mmrl_link_busy_seconds_total", {"direction": "d2h"}, 1e9),
}
MODEL_COUNTERS: dict[str, tuple[str, dict[str, str], float]] = {
    "loads": ("mmrl_loads_total", {}, 1),
    "outs": ("mmrl_outs_total", {}, 1),
    "idle_evictions": ("mmrl_idle_evictions_total", {}, 1),
    "preempted": ("mmrl_preemptions_total", {}, 1),
    "kv_dropped": ("mmrl_kv_dropped_total", {}, 1),
    "prefill_tokens": ("mmrl_computed_prefill_tokens_total", {}, 1),
    "gpu_busy_ns": ("mmrl_model_compute_seconds_total", {}, 1e9),
    "load_bytes": ("mmrl_link_bytes_total", {"kind": "load"}, 1),
    "stream_bytes": ("mmrl_link_bytes_total", {"kind": "stream"}, 1),
    "kv_save_bytes": ("mmrl_link_bytes_total", {"kind": "kv_save"}, 1),
    "kv_restore_bytes": ("mmrl_link_bytes_total", {"kind": "kv_restore"}, 1),
}
Sample = tuple[str, frozenset[tuple[str, str]]]  # name and labels


def episode_arrays(run: Sent) -> tuple[Record, Nodes]:
    """Return a run as the simulator would leave it: a node and its requests.

    Time before the end of the warm-up is left out, and so are the requests that arrived in it. A
    request that failed counts as refused, but for the tokens that it got. The node's counters are
    0 where the server does not tell its own.

    Args:
        run: The run.

    Returns:
        A record of NODE and recarray[R] of REQUEST; requests that never were sent, and those of
        the warm-up, have not arrived.
    """
    zero_ns = run.start_ns + round(run.warmup_s * 1e9)
    node = new_nodes(1)[0]
    node["n_models"], node["n_requests"] = len(run.workload.models), len(run.streams)
    node["now_ns"] = max(0, run.end_ns - zero_ns)
    counted = _counted(run)
    for field, (name, labels, unit) in NODE_COUNTERS.items():
        node[field] = round(counted.get((name, frozenset(labels.items())), 0.0) * unit)
    for m, model in enumerate(run.workload.models):
        labels = {"model": run.served.get(model, model)}
        for field, (name, more, unit) in MODEL_COUNTERS.items():
            sample = name, frozenset((labels | more).items())
            node[field][m] = round(counted.get(sample, 0.0) * unit)
    table = run.workload.requests.copy()
    table["arrival_ns"] -= zero_ns - run.start_ns
    for row, stream in zip(table, run.streams, strict=True):
        row["state"] = UNARRIVED
        if stream.outcome is Outcome.UNSENT or row["arrival_ns"] < 0:
            continue
        row["generated"] = stream.tokens
        if stream.times_ns:
            row["first_ns"] = stream.times_ns[0] - zero_ns
        if stream.outcome is Outcome.DONE:
            row["state"], row["finish_ns"] = DONE, stream.times_ns[-1] - zero_ns
            row["output"] = stream.tokens  # as asked, unless the server ended it before
            row["miss"] = certain_miss(row, row["finish_ns"])
        elif stream.outcome is Outcome.OPEN:
            row["state"] = DECODE if stream.times_ns else QUEUED
            row["miss"] = certain_miss(row, node["now_ns"])
        else:
            row["state"] = REFUSED
            row["miss"] = certain_miss(row, stream.ended_ns - zero_ns) or MISS_REFUSED
            row["finish_ns"] = stream.ended_ns - zero_ns
    return node, table


def measured(run: Sent, contender: Contender) -> Played:
    """Measure a run as ``mmrl.agents.play`` measures a simulated episode."""
    workload = run.workload
    node, table = episode_arrays(run)
    known = bool((table["isolated_ns"] > 0).all())
    if not known:
        table["isolated_ns"] = 1  # not to divide by 0; what comes of it is thrown away
    metrics = episode_metrics(node, table)
    values, models = dict(metrics.values), dict(metrics.models)
    arrived = table[table["state"] != UNARRIVED]
    ttft_s, tpot_s, e2e_s = request_latencies(node, arrived)
    norm = e2e_s * 1e9 / arrived["isolated_ns"]
    if not known:
        values["norm_latency"], norm = np.nan, norm[:0]
        models["norm_latency"] = np.full(len(workload.models), np.nan)
    key = {"board": workload.name, "load": workload.load, "policy": contender.name}
    key |= {"episode": workload.episode}
    about = {"platform": "live", "drawn_load": workload.load}
    rate_per_s = len(workload.requests) / workload.duration_s
    return Played(
        Piece(
            workload.name,
            workload.scenario,
            workload.load,
            workload.split,
            (workload.episode,),
            contender,
        ),
        [key | about | {"rate_per_s": rate_per_s} | values],
        [
            key | {"model": name} | {metric: float(column[m]) for metric, column in models.items()}
            for m, name in enumerate(workload.models)
        ],
        {
            name: column.astype(np.float32)
            for name, column in (("ttft_s", ttft_s), ("tpot_s", tpot_s), ("norm_latency", norm))
        },
    )


def simulated(workload: Workload, policies: Sequence[str]) -> list[Played]:
    """Let policies play the same arrivals in the simulator.

    Args:
        workload: Of a scenario, at its own pace.
        policies: As for ``mmrl evaluate``.

    Raises:
        InputError: A policy is unknown, or the workload is not of a scenario.
    """
    if not workload.scenario:
        raise InputError("a trace alone cannot be simulated", "name the --scenario of the node")
    traces = (workload.trace,) if workload.trace is not None else ()
    scenario = get_scenario(workload.scenario).name
    return [
        play(
            Piece(
                workload.name,
                workload.scenario,
                workload.load,
                workload.split,
                (workload.episode,),
                contender,
                traces,
            )
        )
        for contender in resolve(policies, [scenario])
        if contender.plays(scenario)
    ]


def make_results(
    run: Sent,
    name: str = "live",
    beside: Sequence[Played] = (),
    url: str = "",
    seed: int = 0,
) -> Results:
    """Return the results of a run, as ``mmrl evaluate`` has them.

    Args:
        run: The run.
        name: What its row is called.
        beside: Simulated episodes of the same arrivals, see `simulated`.
        url: Of the server.
        seed: Of the prompts.

    Raises:
        InputError: No request is left to measure.
    """
    workload = run.workload
    live = Contender(name, "live")
    contenders = [live, *(part.piece.contender for part in beside)]
    if len({contender.name for contender in contenders}) < len(contenders):
        raise InputError(f"a simulated policy is named '{name}' too", "choose another --name")
    mine = measured(run, live)
    if mine.episodes[0]["requests"] == 0:
        raise InputError("no request was sent after the warm-up", "replay more, or warm up less")
    trace = (workload.trace,) if workload.trace is not None else ()
    board = Board(
        workload.name,
        workload.scenario,
        workload.trace_name,
        {workload.load: Windows(trace, ())} if workload.trace_name else {},
    )
    scenarios: list[Scenario] = [get_scenario(workload.scenario)] if workload.scenario else []
    about = provenance(
        scenarios,
        split=workload.split,
        episodes=workload.episode + 1,
        bootstrap_seed=0,
        live=f"{workload.split} {workload.episode}" if workload.scenario else "as recorded",
        url=url,
        prompt_seed=seed,
        warmup_s=run.warmup_s,
    )
    results = collect([board], contenders, [mine, *beside], {}, [], about)
    results.summary["boards"][0]["notes"] = notes(run)
    return results


def notes(run: Sent) -> list[str]:
    """Say what a reader of the figures has to know of a run; what went wrong stands first."""
    outcomes = run.outcomes
    found = []
    if run.interrupted:
        length_s = run.workload.duration_s + run.workload.drain_s
        at_s = (run.end_ns - run.start_ns) * 1e-9
        found.append(f"interrupted after {max(0.0, at_s):.1f} s of {length_s:g} s")
    if outcomes[Outcome.FAILED]:
        first = next(s.reason for s in run.streams if s.outcome is Outcome.FAILED)
        found.append(f"{outcomes[Outcome.FAILED]:,} requests failed; the first: {first}")
    for waits_s, what in (
        (run.lags_s, "this client fell behind: 1 % of the requests were"),
        (run.connecting_s, "connecting was slow: it made 1 % of the requests"),
    ):
        late_s = float(np.percentile(waits_s, 99)) if len(waits_s) else 0.0
        if late_s > LATE_S:
            late = f"{what} {late_s * 1e3:.0f} ms late or more"
            found.append(f"{late}, which counts in their latencies")
    pairs = list(zip(run.workload.requests["output"].tolist(), run.streams, strict=True))
    short = sum(s.outcome is Outcome.DONE and s.tokens < output for output, s in pairs)
    if short:
        found.append(f"{short:,} answers have fewer tokens than were asked for")
    if any(s.times_ns and not s.counted for s in run.streams):
        found.append("the server does not count tokens: each chunk was taken for one")
    found += run.workload.notes
    if run.warmup_s:
        found.append(f"the first {run.warmup_s:g} s are left out")
    renamed = {name: served for name, served in run.served.items() if name != served}
    if renamed:
        found.append("served as " + ", ".join(f"{a} = {b}" for a, b in renamed.items()))
    policy = [
        dict(labels)["policy"] for name, labels in _samples(run.counters[1]) if name == POLICY
    ]
    if policy:
        found.append(f"the server's policy: {policy[0]}")
    return found if _counted(run) else [*found, UNKNOWN_COUNTERS]


def request_table(run: Sent) -> "pd.DataFrame":
    """Return a row per request, all instants in seconds since the start of the run.

    ``good``: it met both targets. ``chunk_s`` and ``chunk_tokens`` are lists: when each chunk came,
    and how many tokens it had.
    """
    import pandas as pd

    def seconds(instant_ns: int) -> float:
        return (instant_ns - run.start_ns) * 1e-9 if instant_ns >= 0 else float("nan")

    _, ended = episode_arrays(run)
    rows = []
    good = met_targets(ended)
    for request, stream, met in zip(run.workload.requests, run.streams, good, strict=True):
        model = run.workload.models[request["model"]]
        done = stream.outcome is Outcome.DONE
        rows.append(
            {
                "model": model,
                "served_as": run.served.get(model, ""),
                "prompt_tokens": int(request["prompt"]),
                "output_tokens": int(request["output"]),
                "ttft_target_s": request["ttft_ns"] * 1e-9,
                "tpot_target_s": request["tpot_ns"] * 1e-9,
                "isolated_s": request["isolated_ns"] * 1e-9 or float("nan"),
                "scheduled_s": request["arrival_ns"] * 1e-9,
                "begun_s": seconds(stream.begun_ns),
                "sent_s": seconds(stream.sent_ns),
                "first_s": seconds(stream.times_ns[0] if stream.times_ns else -1),
                "finish_s": seconds(stream.times_ns[-1] if done else -1),
                "ended_s": seconds(stream.ended_ns),
                "status": str(stream.outcome),
                "http_status": stream.status,
                "reason": stream.reason,
                "good": bool(met),
                "warmup": bool(request["arrival_ns"] < run.warmup_s * 1e9),
                "chunk_s": [seconds(instant) for instant in stream.times_ns],
                "chunk_tokens": np.diff(stream.counts, prepend=0).tolist(),
            }
        )
    return pd.DataFrame(rows)


def write(results: Results, table: "pd.DataFrame", folder: Path) -> None:
    """Write results and the table of requests into one folder.

    Raises:
        InputError: Nothing can be written there.
        MmrlError: The disk is full.
    """
    results.write(folder)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")
    with atomic_write(folder / REQUESTS, "wb") as file:
        file.write(buffer.getvalue())


def _counted(run: Sent) -> dict[Sample, float]:
    """Return by how much each counter of the server rose; none where that cannot be known."""
    before, after = map(_samples, run.counters)
    wanted = {name for name, _, _ in (*NODE_COUNTERS.values(), *MODEL_COUNTERS.values())}
    rise = {
        sample: value - before.get(sample, 0.0)
        for sample, value in after.items()
        if sample[0] in wanted
    }
    if not before or any(value < 0 for value in rise.values()):  # its engine began anew
        return {}
    return rise


def _samples(text: str) -> dict[Sample, float]:
    """Read what a server counts; label values of ours need no unescaping."""
    found: dict[Sample, float] = {}
    for name, labels, value in re.findall(r"^(mmrl_\w+)(?:\{(.*)\})? (\S+)", text, re.MULTILINE):
        found[name, frozenset(re.findall(r'(\w+)="([^"]*)"', labels))] = float(value)
    return found
