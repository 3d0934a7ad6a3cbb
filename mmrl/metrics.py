"""What came of an episode: ``EpisodeMetrics`` from a node and its requests.

Every metric is defined once, in docs/glossary.md. A request without a first token, or unfinished,
or refused counts with its age at the end of the episode, so that no policy looks better for
leaving work.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.node.state import (
    DECODE,
    DONE,
    MISS_NONE,
    MISS_REFUSED,
    MISS_TPOT,
    MISS_TTFT,
    UNARRIVED,
    Nodes,
    Record,
)

Array = npt.NDArray[np.float64]
QUANTILES = (50, 90, 99)


@dataclass(frozen=True)
class EpisodeMetrics:
    """Metrics of one episode; the names are those of docs/glossary.md.

    Attributes:
        values: A number for each metric; NaN where nothing was there to measure.
        models: For each metric of the models, float64[M]: ``requests``, ``goodput``,
            ``norm_latency``, ``ttft_mean_s``, ``loads``, ``preemptions``, ``gpu_share``.
    """

    values: dict[str, float]
    models: dict[str, Array]

    def __getitem__(self, name: str) -> float:
        return self.values[name]


def episode_metrics(s: Record, r: Nodes) -> EpisodeMetrics:
    """Measure an episode that has ended, or a node as it is now.

    Args:
        s: The node.
        r: Its requests, recarray[R]; the first ``n_requests`` rows that have arrived count.
    """
    q = r[: int(s.n_requests)]
    q = q[q["state"] != UNARRIVED]
    count = int(s.n_models)
    model = q["model"]
    elapsed_s = max(1, int(s.now_ns)) * 1e-9
    ttft_s, tpot_s, e2e_s = request_latencies(s, q)
    norm = e2e_s * 1e9 / q["isolated_ns"]
    good = met_targets(q)
    models = {
        "requests": np.bincount(model, minlength=count).astype(np.float64),
        "goodput": _mean_by_model(good.astype(np.float64), model, count),
        "norm_latency": _mean_by_model(norm, model, count),
        "ttft_mean_s": _mean_by_model(ttft_s, model, count),
        "loads": s["loads"][:count].astype(np.float64),
        "preemptions": s["preempted"][:count].astype(np.float64),
        "gpu_share": s["gpu_busy_ns"][:count] * 1e-9 / elapsed_s,
    }
    served = models["goodput"][models["requests"] > 0]
    values = {
        "requests": float(len(q)),
        "elapsed_s": elapsed_s,
        "goodput": _mean(good),
        "goodput_worst_model": float(served.min()) if len(served) else np.nan,
        "fairness": jain(served),
        **_misses(q),
        **_quantiles("ttft", "_s", ttft_s),
        **_quantiles("tpot", "_s", tpot_s),
        **_quantiles("e2e", "_s", e2e_s),
        "norm_latency": _mean(norm),
        "longest_wait_s": float(ttft_s.max(initial=0.0)),
        "requests_per_s": float((q["state"] == DONE).sum() / elapsed_s),
        **_counters(s, q, elapsed_s),
    }
    return EpisodeMetrics(values, models)


def met_targets(q: Nodes) -> npt.NDArray[np.bool_]:
    """Return which of these requests were answered within both of their latency targets."""
    return np.asarray((q["state"] == DONE) & (q["miss"] == MISS_NONE))


def request_latencies(s: Record, q: Nodes) -> tuple[Array, Array, Array]:
    """Return TTFT, TPOT and E2E in seconds, censored at the present instant.

    Args:
        s: The node.
        q: Requests that have arrived.

    Returns:
        TTFT float64[n], TPOT float64[k] of those that have begun a second token, E2E float64[n].
    """
    now = int(s.now_ns)
    done = q["state"] == DONE
    started = q["first_ns"] >= 0
    ttft = np.where(started, q["first_ns"], now) - q["arrival_ns"]
    end = np.where(done, q["finish_ns"], now)
    # tokens of the running decode segment are not written into the requests yet
    unwritten = np.where(q["state"] == DECODE, s["seg_steps"][q["model"]], 0)
    tokens = q["generated"] + unwritten - 1
    more = started & (q["output"] > 1)
    tpot = (end - q["first_ns"])[more] / np.maximum(1, tokens[more])
    return ttft * 1e-9, tpot * 1e-9, (end - q["arrival_ns"]) * 1e-9


def jain(shares: Array) -> float:
    """Return Jain's fairness index of shares: 1 when all are equal, 1/n when one has all."""
    if len(shares) == 0:
        return float("nan")
    squares = float((shares**2).sum())
    return float(shares.sum() ** 2 / (len(shares) * squares)) if squares > 0 else 0.0


def _mean(values: npt.NDArray[Any]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _mean_by_model(values: Array, model: npt.NDArray[np.int32], count: int) -> Array:
    """Return the mean per model, float64[count]; NaN for a model without requests."""
    number = np.bincount(model, minlength=count)
    total = np.bincount(model, values, minlength=count)
    return np.where(number > 0, total / np.maximum(1, number), np.nan)


def _quantiles(name: str, unit: str, values: Array) -> dict[str, float]:
    names = [f"{name}_p{q}{unit}" for q in QUANTILES]
    if len(values) == 0:
        return dict.fromkeys((f"{name}_mean{unit}", *names), float("nan"))
    found = np.percentile(values, QUANTILES).tolist()
    return {f"{name}_mean{unit}": float(values.mean()), **dict(zip(names, found, strict=True))}


def _misses(q: Nodes) -> dict[str, float]:
    unfinished = (q["state"] != DONE) & (q["miss"] == MISS_NONE)
    return {
        "missed_ttft": _mean(q["miss"] == MISS_TTFT),
        "missed_tpot": _mean(q["miss"] == MISS_TPOT),
        "refused": _mean(q["miss"] == MISS_REFUSED),
        "unfinished": _mean(unfinished),
    }


def _counters(s: Record, q: Nodes, elapsed_s: float) -> dict[str, float]:
    """Return what the node has counted, per second or as a share of the time."""
    tokens = q["generated"].sum() + (s["seg_steps"] * s["decoding"]).sum()
    per_s = {
        "output_tokens_per_s": tokens,
        "prefill_tokens_per_s": s["prefill_tokens"].sum(),
        "loads_per_s": s["loads"].sum(),
        "evictions_per_s": s["idle_evictions"].sum(),
        "outs_per_s": s["outs"].sum(),
        "preemptions_per_s": s["preempted"].sum(),
        "kv_dropped_per_s": s["kv_dropped"].sum(),
        "load_bytes_per_s": s["load_bytes"].sum(),
        "stream_bytes_per_s": s["stream_bytes"].sum(),
        "kv_save_bytes_per_s": s["kv_save_bytes"].sum(),
        "kv_restore_bytes_per_s": s["kv_restore_bytes"].sum(),
        "decisions_per_s": int(s.decisions),
        "gpu_share": s["gpu_busy_ns"].sum() * 1e-9,
        "link_in_share": int(s.h2d_busy_ns) * 1e-9,
        "link_out_share": int(s.d2h_busy_ns) * 1e-9,
    }
    counted = {name: float(value) / elapsed_s for name, value in per_s.items()}
    return {**counted, "illegal_actions": float(s.illegal_actions)}
