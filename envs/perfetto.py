"""Export a played episode as a trace for https://ui.perfetto.dev (or chrome://tracing).

The node is a process with tracks of its own: decisions, free memory. Each model is another: its
loads and KV moves as spans, residency and queue as counters, and every request as a span of two
stages, waiting and generating. Single iterations are too many: they are not in the trace.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.envs.timeline import EpisodeLog, Timeline
from mmrl.files import write_json

MISSES = ("met its targets", "missed TTFT", "missed TPOT", "refused")
NODE_PID = 1
FIRST_MODEL_PID = 2
LOAD_TID, SAVE_TID, RESTORE_TID = 1, 2, 3
MICROSECONDS = 1e6

Event = dict[str, Any]


def export(log: EpisodeLog, path: str | Path) -> None:
    """Write the trace of an episode, atomically.

    Raises:
        InputError: Nothing can be written at path.
    """
    write_json(path, to_trace(log))


def to_trace(log: EpisodeLog) -> dict[str, Any]:
    """Return the trace of an episode in Chrome's JSON format."""
    timeline = log.timeline
    events = [*_names(timeline), *_node(timeline)]
    for m in range(len(timeline.model_names)):
        events += [*_counters(timeline, m), *_spans(timeline, m)]
    events += _requests(log)
    about = {
        "scenario": log.info.scenario,
        "platform": log.info.platform,
        "budget_gb": log.info.budget_gb,
        "load": log.info.load,
        "reward": log.reward,
        **log.metrics,
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _names(timeline: Timeline) -> list[Event]:
    """Name processes and tracks, in the order in which they are to be shown."""
    processes = {NODE_PID: f"node, {timeline.budget_gb:.0f} GB"}
    threads = {(NODE_PID, 1): "decisions"}
    for m, name in enumerate(timeline.model_names):
        pid = FIRST_MODEL_PID + m
        processes[pid] = name
        threads |= {
            (pid, LOAD_TID): "load",
            (pid, SAVE_TID): "KV to host",
            (pid, RESTORE_TID): "KV to device",
        }
    events: list[Event] = []
    for pid, name in processes.items():
        events.append(_event("M", "process_name", pid, args={"name": name}))
        events.append(_event("M", "process_sort_index", pid, args={"sort_index": pid}))
    for (pid, tid), name in threads.items():
        events.append(_event("M", "thread_name", pid, tid=tid, args={"name": name}))
    return events


def _event(phase: str, name: str, pid: int, time_s: float = 0.0, **more: Any) -> Event:
    return {"ph": phase, "name": name, "pid": pid, "tid": 1, "ts": time_s * MICROSECONDS, **more}


def _node(timeline: Timeline) -> list[Event]:
    events = []
    for k, action in enumerate(timeline.action.tolist()):
        time_s = float(timeline.time_s[k])
        free_gb = float(timeline.free[k]) * timeline.budget_gb
        events.append(_event("C", "free GB", NODE_PID, time_s, args={"GB": free_gb}))
        if 0 < action < len(timeline.action_names):
            events.append(_event("i", _say(timeline, action), NODE_PID, time_s, s="g"))
    return events


def _say(timeline: Timeline, action: int) -> str:
    model, verb = timeline.action_names[action].split(".")
    m = int(model.removeprefix("model"))
    name = timeline.model_names[m] if m < len(timeline.model_names) else model
    return f"{verb} {name}"


def _counters(timeline: Timeline, m: int) -> list[Event]:
    events = []
    for name, values in (
        ("resident %", 100 * timeline.landed[:, m]),
        ("queued", timeline.queued[:, m]),
        ("running", timeline.running[:, m]),
        ("suspended", timeline.suspended[:, m]),
        ("KV GB", timeline.kv[:, m] * timeline.budget_gb),
    ):
        before = None
        for time_s, value in zip(timeline.time_s.tolist(), values.tolist(), strict=True):
            if value != before:
                args = {name.split()[-1]: value}
                events.append(_event("C", name, FIRST_MODEL_PID + m, time_s, args=args))
                before = value
    return events


def _spans(timeline: Timeline, m: int) -> list[Event]:
    pid = FIRST_MODEL_PID + m
    events = []
    loading = timeline.target[:, m] > timeline.landed[:, m]
    for tid, name, active in (
        (LOAD_TID, "load", loading),
        (SAVE_TID, "save", timeline.saving[:, m]),
        (RESTORE_TID, "restore", timeline.restoring[:, m]),
    ):
        for start, end in _runs(active):
            start_s, end_s = float(timeline.time_s[start]), float(timeline.time_s[end])
            loaded_s = float(timeline.loaded_s[end, m])
            if tid == LOAD_TID and start_s < loaded_s < end_s:
                end_s = loaded_s  # known exactly; the others are as fine as the samples
            duration = (end_s - start_s) * MICROSECONDS
            events.append(_event("X", name, pid, start_s, tid=tid, dur=duration))
    return events


def _runs(active: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (first sample, first sample after) of each run of True; the last sample ends all."""
    edges = np.diff(np.concatenate(([False], active[:-1], [False])).astype(np.int8))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _requests(log: EpisodeLog) -> list[Event]:
    """Return two nested asynchronous spans for each request that has arrived."""
    events: list[Event] = []
    end_s = float(log.timeline.time_s[-1])
    for i, request in enumerate(log.requests):
        arrival_s = request["arrival_ns"] * 1e-9
        if arrival_s > end_s:
            break
        finish_s = request["finish_ns"] * 1e-9 if request["finish_ns"] >= 0 else end_s
        # Who is refused is finished without a first token.
        first_s = request["first_ns"] * 1e-9 if request["first_ns"] >= 0 else finish_s
        name = f"request {i}"
        about = {
            "prompt_tokens": int(request["prompt"]),
            "output_tokens": int(request["output"]),
            "preemptions": int(request["preemptions"]),
            "outcome": MISSES[request["miss"]],
        }
        spans = [(name, arrival_s, finish_s, about), ("waiting", arrival_s, first_s, {})]
        if first_s < finish_s:
            spans.append(("generating", first_s, finish_s, {}))
        for label, start_s, stop_s, args in spans:
            for phase, time_s in (("b", start_s), ("e", max(start_s, min(stop_s, end_s)))):
                place = {"cat": "request", "id": i + 1, "args": args if phase == "b" else {}}
                pid = FIRST_MODEL_PID + int(request["model"])
                events.append(_event(phase, label, pid, float(time_s), **place))
    return events
