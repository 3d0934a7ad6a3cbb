"""Record one episode as a policy plays it, as small as a report needs it.

From the samples of ``mmrl.envs.timeline``: which models hold device memory, and who waits.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.contenders import Contender
from mmrl.agents.play import Board, Piece, decider, start
from mmrl.envs.timeline import Recorder, Timeline
from mmrl.scenarios.seeds import Split

OUT, LOADING, PARTIAL, RESIDENT = "out", "loading", "partial", "resident"


def record(board: Board, load: float, contender: Contender, split: Split) -> dict[str, Any]:
    """Play the first episode of a board and return its timeline.

    Returns:
        ``models``: names; ``spans``: [model, from_s, to_s, state] for each stretch of time in which
        a model is loading, partly or wholly on the device; ``times_s`` and ``waiting``: queued
        requests of all models; ``end_s``; and whose it is.
    """
    traces = board.windows[load].traces[:1] if board.trace else ()
    simulator = start(Piece(board.name, board.scenario, load, split, (0,), contender, traces))
    node, requests = simulator.nodes[0], simulator.requests[0]
    decide = decider(simulator, contender, board.scenario)
    recorder = Recorder(simulator, ())
    while not node.done:
        recorder.step(decide(node, requests))
    timeline = recorder.timeline()
    waiting = timeline.queued.sum(axis=1)
    changed = np.flatnonzero(np.diff(waiting, prepend=-1, append=-1)[:-1])
    return {
        "board": board.name,
        "load": load,
        "policy": contender.name,
        "episode": f"{split} 0",
        "models": list(timeline.model_names),
        "end_s": float(timeline.time_s[-1]),
        "spans": [span for m in range(len(timeline.model_names)) for span in _spans(timeline, m)],
        "times_s": [*timeline.time_s[changed].round(3).tolist(), float(timeline.time_s[-1])],
        "waiting": [*waiting[changed].tolist(), int(waiting[-1])],
    }


def _spans(timeline: Timeline, m: int) -> list[list[Any]]:
    """Join the samples at which a model is in the same state."""
    spans: list[list[Any]] = []
    state, since = OUT, 0.0
    states = _states(timeline.landed[:, m], timeline.target[:, m])
    for new, now, loaded in zip(states, timeline.time_s, timeline.loaded_s[:, m], strict=True):
        if new == state:
            continue
        # A load may end between two samples: the node knows when it did.
        instant = float(loaded if state == LOADING and since < loaded < now else now)
        if state != OUT:
            spans.append([m, round(since, 3), round(instant, 3), state])
        state, since = new, instant
    if state != OUT:
        spans.append([m, round(since, 3), round(float(timeline.time_s[-1]), 3), state])
    return spans


def _states(
    landed: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.str_]:
    """Name the state of a model at each sample."""
    there = np.where(landed < 1, PARTIAL, RESIDENT)
    return np.where(landed < target, LOADING, np.where(landed > 0, there, OUT))
