"""Record one episode as a policy plays it, as small as a report needs it.

From the samples of ``mmrl.envs.timeline``: which models hold device memory, and who waits.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.contenders import Contender
from mmrl.agents.play import Board, Piece, decider, start
from mmrl.envs.timeline import Recorder
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
        "spans": [
            span
            for m in range(len(timeline.model_names))
            for span in spans(
                m,
                timeline.time_s,
                timeline.landed[:, m],
                timeline.target[:, m],
                timeline.loaded_s[:, m],
            )
        ],
        "times_s": [*timeline.time_s[changed].round(3).tolist(), float(timeline.time_s[-1])],
        "waiting": [*waiting[changed].tolist(), int(waiting[-1])],
    }


def spans(
    m: int,
    time_s: npt.NDArray[np.float64],
    landed: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
    loaded_s: npt.NDArray[np.float64],
) -> list[list[Any]]:
    """Join the samples at which model ``m`` is in the same state.

    Args:
        m: The model.
        time_s: float64[T], when the samples were taken.
        landed: float64[T], weights on the device, of the model.
        target: float64[T], weights wanted, of the model.
        loaded_s: float64[T], when the last load ended as of each sample; -1 before.

    Returns:
        [m, from_s, to_s, state] for each stretch of time in which the model is not out.
    """
    found: list[list[Any]] = []
    state, since = OUT, 0.0
    for new, now, loaded in zip(_states(landed, target), time_s, loaded_s, strict=True):
        if new == state:
            continue
        # A load may end between two samples: the node knows when it did.
        instant = float(loaded if state == LOADING and since < loaded < now else now)
        if state != OUT:
            found.append([m, round(since, 3), round(instant, 3), state])
        state, since = new, instant
    if state != OUT:
        found.append([m, round(since, 3), round(float(time_s[-1]), 3), state])
    return found


def _states(
    landed: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.str_]:
    """Name the state of a model at each sample."""
    there = np.where(landed < 1, PARTIAL, RESIDENT)
    return np.where(landed < target, LOADING, np.where(landed > 0, there, OUT))
