"""`compare`: a recorded run of the live node against the simulator; every error, and the verdict.

*Forced*: the live node's verbs are played at their instants on the same arrivals and costs; what
then differs is time. *Closed loop*: the policy decides again, in the simulator. *Steps and
transfers*: each one of the live node against its price. The metrics are those of ``mmrl.metrics``;
nothing here draws or prints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.export import load_policy
from mmrl.deploy.adapter import DeployAdapter
from mmrl.deploy.node import LiveNode
from mmrl.deploy.validate.record import Recording
from mmrl.deploy.validate.steps import gaps, step_errors, transfer_errors
from mmrl.deploy.validate.trail import Arrays, Trail
from mmrl.errors import InputError
from mmrl.files import finite, write_json
from mmrl.metrics import episode_metrics
from mmrl.node.actions import WAIT
from mmrl.node.state import CANCELLED, Nodes, Record, new_requests
from mmrl.rules import get_rule
from mmrl.sim.forced import Forced, play

REPORT = "report.json"
PATIENT_S = 60.0  # a simulated policy may think as long as it likes
# Metrics of a run: their names, and how far the simulator may be off (design, section 9).
TARGETS = {
    "ttft_mean_s": 0.10,
    "ttft_p99_s": 0.15,
    "tpot_mean_s": 0.05,
    "e2e_mean_s": 0.05,
    "load_mean_s": 0.05,
    "decode_step": 0.03,
    "prefill_step": 0.03,
    "streamed_step": 0.03,
}
GOODPUT_TARGET = 0.02
# A closed loop amplifies what is small: with prices off by a thousandth, other requests meet their
# targets. So it is played several times, with prices off by up to this fraction.
NEARBY, NEARBY_PLAYS = 0.01, 8
LATENCIES = ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "e2e_mean_s")
COUNTERS = {
    "loads": "loads",
    "preemptions": "preempted",
    "evictions": "idle_evictions",
    "outs": "outs",
    "kv_dropped": "kv_dropped",
    "load_bytes": "load_bytes",
    "stream_bytes": "stream_bytes",
    "kv_save_bytes": "kv_save_bytes",
    "kv_restore_bytes": "kv_restore_bytes",
}


@dataclass(frozen=True)
class Played:
    """What came of a run, live or simulated.

    Attributes:
        s: The node at the end, a record of NODE.
        r: Its requests, recarray[R].
        trail: Of `Trail.arrays`.
        log: What became of the logged verbs, where they were forced.
    """

    s: Record
    r: Nodes
    trail: Arrays
    log: Forced | None = None


@dataclass(frozen=True)
class Compared:
    """A run and its two simulations.

    Attributes:
        recording: The live run.
        live: What came of it.
        forced: What the simulator makes of its decisions.
        closed: What the policy does in the simulator.
        report: All errors, as in ``report.json``.
    """

    recording: Recording
    live: Played
    forced: Played
    closed: Played
    report: dict[str, Any]


def read_runs(folder: Path) -> list[Recording]:
    """Read all recordings of a folder, by load and policy.

    Raises:
        InputError: There are none, or one cannot be read.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise InputError(f"{folder} holds no recordings", "make some: mmrl validate run")
    runs = [Recording.read(file) for file in files]
    return sorted(runs, key=lambda run: (run.header["load"], run.header["policy"]["name"]))


def compare_folder(
    folder: Path, report: Callable[[str], None] = lambda name: None
) -> tuple[list[Compared], dict[str, Any]]:
    """Compare all runs of a folder.

    Args:
        folder: Of recordings.
        report: Told the name of each run before it is played.

    Returns:
        The runs, and the content of ``report.json``.

    Raises:
        InputError: The folder holds no recordings, or one cannot be read.
    """
    runs = []
    for recording in read_runs(folder):
        report(recording.name)
        runs.append(compare(recording, folder))
    found = {"runs": [run.report for run in runs], "ranking": _ranking(runs)}
    return runs, finite(found)


def write_errors(folder: Path, found: dict[str, Any]) -> Path:
    """Write ``report.json`` and return its path."""
    write_json(folder / REPORT, found)
    return folder / REPORT


def compare(recording: Recording, folder: Path) -> Compared:
    """Play a run through the simulator, forced and closed loop, and work out the errors.

    Args:
        recording: The run.
        folder: Where it comes from, with the trained policies.
    """
    live = Played(*recording.end(), recording.arrays)
    forced, closed = play_forced(recording), play_closed(recording, folder)
    others = [play_closed(recording, folder, seed) for seed in range(1, NEARBY_PLAYS)]
    assert forced.log is not None
    models = range(len(recording.models))
    steps = step_errors(recording)
    rows = _rows(live, forced, None) + _step_rows(steps, None)
    by_model = {recording.models[m]: _rows(live, forced, m) + _step_rows(steps, m) for m in models}
    goodputs = {"live": _goodput(live), "forced": _goodput(forced), "closed": _goodput(closed)}
    plays = [goodputs["closed"], *map(_goodput, others)]
    mean = float(np.mean(plays))
    apart = mean - goodputs["live"]
    header = recording.header
    report = {
        "run": recording.name,
        "policy": header["policy"]["name"],
        "load": header["load"],
        "requests": len(live.r),
        "overall": rows,
        "models": by_model,
        "goodput": goodputs
        | {
            "difference": goodputs["closed"] - goodputs["live"],
            "mean": mean,
            "sd": float(np.std(plays, ddof=1)),
            "apart": apart,
            "met": bool(abs(apart) <= GOODPUT_TARGET + 1e-9),
        },
        "closed": _rows(live, closed, None, judged=False),
        "transfers": transfer_errors(recording),
        "log": _log(recording, forced.log),
        "gaps": gaps(recording) | {name: header[name] for name in ("decision_s", "lag_s")},
        "fallbacks": header["fallbacks"],
    }
    return Compared(recording, live, forced, closed, report)


# ---------------------------------------------------------------------- playing


def play_forced(recording: Recording) -> Played:
    """Play the live node's verbs on the same arrivals and costs."""
    decided = recording.columns("decision")
    verbs = (decided["action"] != WAIT) & (decided["applied"] == 1)
    times_ns, actions = decided["time_ns"][verbs], decided["action"][verbs]
    logs: list[Forced] = []

    def decider(s: Record, r: Nodes) -> tuple[Callable[[], int], Forced]:
        logs.append(Forced(s, r, times_ns, actions))
        return logs[0].decide, logs[0]

    played = _play(recording, decider)
    return Played(played.s, played.r, played.trail, logs[0])


def play_closed(recording: Recording, folder: Path, seed: int | None = None) -> Played:
    """Let the policy decide in the simulator, on the same arrivals and costs.

    Args:
        recording: The run.
        folder: Where it comes from, with the trained policies.
        seed: Of the errors of each model's decode and prefill prices, up to `NEARBY`; none unless
            given.
    """
    about = recording.header["policy"]
    if about["kind"] == "rule":
        policy: Any = get_rule(about["rule"], **about["params"])
    else:
        policy = load_policy(folder / about["folder"])
    adapters = []

    def decider(s: Record, r: Nodes) -> tuple[Callable[[], int], None]:
        node = nodes[0]
        if seed is not None:
            errors = np.random.default_rng(seed).uniform(-NEARBY, NEARBY, (2, len(s.decode_scale)))
            s.decode_scale *= 1 + errors[0]
            s.prefill_scale *= 1 + errors[1]
        adapter = DeployAdapter(
            policy,
            get_rule("slack"),
            node.decode_tables,
            node.prefill_tables,
            deadline_s=PATIENT_S,
        )
        adapters.append(adapter)
        return lambda: adapter.decide(node.nodes, node.table).action, None

    nodes: list[LiveNode] = []
    played = _play(recording, decider, nodes)
    for adapter in adapters:
        adapter.close()
    return played


Decider = Callable[[Record, Nodes], tuple[Callable[[], int], Forced | None]]


def _play(recording: Recording, decider: Decider, nodes: list[LiveNode] | None = None) -> Played:
    """Play a run's arrivals on a node like the live one.

    Args:
        recording: The run.
        decider: Given the node and its requests, returns who decides, and the log if it is one.
        nodes: Receives the node before the decider is called.
    """
    latency_ns = recording.header["numbers"]["latency_ns"] + _thinking_ns(recording)
    node = recording.node(latency_ns=latency_ns)
    count = len(recording.arrays["request_model"])
    node.table = np.asarray(new_requests(1, count))
    s = node.nodes.view(np.recarray)[0]
    r = node.table[0]
    for name in ("arrival_ns", "ttft_ns", "tpot_ns", "isolated_ns", "model", "prompt", "output"):
        r[name] = recording.arrays[f"request_{name}"]
    s.n_requests, s.horizon_ns = count, recording.header["horizon_ns"]
    if nodes is not None:
        nodes.append(node)
    decide, log = decider(s, r)
    trail = Trail(node.nodes)

    def noted() -> int:
        action = decide()
        trail.note(action)
        return action

    def look() -> None:
        if log is not None:
            log.look()
        trail.look()

    tables = node.decode_tables, node.prefill_tables
    if log is None:
        play(s, r, *tables, noted, watch=look)
    else:
        play(s, r, *tables, noted, watch=look, wake_ns=log.wake_ns)
    return Played(s, node.table.view(np.recarray)[0], trail.arrays())


def _thinking_ns(recording: Recording) -> int:
    """Return the median time from the asking of the policy to its first decision."""
    asked, time_ns = (recording.arrays[f"decision_{name}"] for name in ("asked_ns", "time_ns"))
    return int(np.median(time_ns - asked)) if len(asked) else 0


# ---------------------------------------------------------------------- errors


def _rows(live: Played, other: Played, m: int | None, judged: bool = True) -> list[dict[str, Any]]:
    """Compare two runs, all models or one; `judged`: against the targets."""
    ours, theirs = _measures(live, m), _measures(other, m)
    rows = []
    for name, value in ours.items():
        target = TARGETS.get(name) if judged and m is None else None
        rows.append(row(name, value, theirs[name], relative(theirs[name], value), target))
    return rows


def row(
    name: str, live: float, simulated: float, error: float, target: float | None = None
) -> dict[str, Any]:
    """Return a line of a table; met is None where there is no target or nothing to compare."""
    met = None if target is None or not np.isfinite(error) else bool(abs(error) <= target)
    values = {"live": live, "simulated": simulated, "error": error, "target": target}
    return {"metric": name} | values | {"met": met}


def relative(simulated: float, live: float) -> float:
    """Return the relative error of the simulator; 0 where both are 0, NaN without a measure."""
    if simulated == live:
        return 0.0
    return simulated / live - 1 if live else float("nan")


def _measures(played: Played, m: int | None) -> dict[str, float]:
    """Return the metrics of a run, of all models or one."""
    s, r = played.s, played.r
    loads = played.trail["loads"]
    chosen: Any = slice(int(s.n_models))
    if m is not None:
        s, r = s.copy(), r[r["model"] == m]
        s["n_requests"] = len(r)
        loads, chosen = loads[loads[:, 0] == m], m
    values: dict[str, float] = dict.fromkeys(LATENCIES, float("nan"))
    if len(r):
        metrics = episode_metrics(s, r)
        values = {name: metrics[name] for name in LATENCIES}
    took_s = (loads[:, 2] - loads[:, 1]) * 1e-9
    values["load_mean_s"] = float(took_s.mean()) if len(took_s) else float("nan")
    for name, field in COUNTERS.items():
        values[name] = float(np.sum(s[field][chosen]))
    return values


def _step_rows(steps: dict[str, Any], m: int | None) -> list[dict[str, Any]]:
    """Return the lines about iterations: median time, median price, median absolute error."""
    rows = []
    for kind in ("decode", "prefill", "streamed"):
        found = steps[kind]["overall"] if m is None else steps[kind]["models"][m]
        target = TARGETS[f"{kind}_step"] if m is None else None
        line = row(f"{kind}_step", found["live_s"], found["price_s"], found["error"], target)
        rows.append(line | {"bias": found["bias"], "count": found["count"]})
    return rows


def _goodput(played: Played) -> float:
    arrived = played.r[played.r["state"] != CANCELLED]
    return episode_metrics(played.s, arrived)["goodput"]


def _log(recording: Recording, log: Forced) -> dict[str, Any]:
    """Say what became of the live node's verbs in the simulator."""
    delays_ns: npt.NDArray[np.int64] = np.array(log.delays_ns, np.int64)
    late = delays_ns[delays_ns > 0]
    return {
        "verbs": len(log.times_ns),
        "done": len(log.delays_ns),
        "late": len(late),
        "late_mean_s": float(late.mean() * 1e-9) if len(late) else 0.0,
        "void": len(log.void),
        "dropped": len(log.dropped),
        "decisions": len(recording.arrays["decision_action"]),
    }


def _ranking(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """Say for each load whether live and simulated node rank the policies alike.

    Two policies whose goodputs are within the target of each other may stand in either order.
    """
    found = []
    for load in sorted({run.report["load"] for run in runs}):
        here = [run.report for run in runs if run.report["load"] == load]
        same = True
        for i, a in enumerate(here):
            for b in here[:i]:
                live = a["goodput"]["live"] - b["goodput"]["live"]
                simulated = a["goodput"]["mean"] - b["goodput"]["mean"]
                apart = max(abs(live), abs(simulated)) > GOODPUT_TARGET
                same &= not (apart and live * simulated <= 0)
        orders = {
            side: [run["policy"] for run in sorted(here, key=lambda run: -run["goodput"][key])]
            for side, key in (("live", "live"), ("closed", "mean"))
        }
        found.append({"load": load, "same": same, **orders})
    return found
