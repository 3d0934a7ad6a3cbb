"""`summarise`: the numbers of a finished episode that a scheduling engineer wants to watch."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import VERBS
from mmrl.node.state import DONE, MISS_NONE


def summarise(s: Any, r: npt.NDArray[Any]) -> dict[str, float]:
    """Return the metrics of an episode that has ended; what is unfinished then is a miss.

    Args:
        s: The node.
        r: Its requests.

    Returns:
        ``goodput`` (share of all requests that met their targets), ``worst_model_goodput``,
        ``requests``, ``ttft_mean_s``, ``ttft_p99_s`` (of those with a first token),
        ``longest_wait_s`` (for a first token), ``illegal_actions``, and per simulated second
        ``decisions_per_s``, ``loads_per_s``, ``preemptions_per_s`` and ``<verb>_per_s``. A share or
        time of no requests at all is 1 or 0.
    """
    models = int(s["n_models"])
    r = r[: int(s["n_requests"])]
    now_ns = int(s["now_ns"])
    good = (r["state"] == DONE) & (r["miss"] == MISS_NONE)
    asked = np.bincount(r["model"], minlength=models)
    met = np.bincount(r["model"], weights=good, minlength=models)
    served = r["first_ns"] >= 0
    ttft_s = (r["first_ns"] - r["arrival_ns"])[served] * 1e-9
    waited_s = (np.where(served, r["first_ns"], now_ns) - r["arrival_ns"]) * 1e-9
    elapsed_s = max(now_ns * 1e-9, 1e-9)
    metrics = {
        "goodput": float(good.mean()) if len(r) else 1.0,
        "worst_model_goodput": float((met / np.maximum(asked, 1))[asked > 0].min(initial=1.0)),
        "requests": float(len(r)),
        "ttft_mean_s": float(ttft_s.mean()) if len(ttft_s) else 0.0,
        "ttft_p99_s": float(np.percentile(ttft_s, 99)) if len(ttft_s) else 0.0,
        "longest_wait_s": float(waited_s.max(initial=0.0)),
        "illegal_actions": float(s["illegal_actions"]),
        "decisions_per_s": float(s["decisions"]) / elapsed_s,
        "loads_per_s": float(s["loads"].sum()) / elapsed_s,
        "preemptions_per_s": float(s["preempted"].sum()) / elapsed_s,
    }
    for verb, count in zip(VERBS, s["actions"].tolist(), strict=True):
        metrics[f"{verb}_per_s"] = count / elapsed_s
    return metrics
