"""`Trail`: which models were where over time and how long their loads took, live or simulated."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.recording import spans
from mmrl.node.actions import LEVEL_0, LEVEL_100, WAIT, decode
from mmrl.node.state import Nodes

Arrays = dict[str, npt.NDArray[Any]]


class Fields:
    """The fields of a node's state by name, as arrays of one number or of one for each model.

    They are views: NumPy takes far longer for a field of a record, and a live node has little time.
    """

    def __init__(self, nodes: Nodes) -> None:
        plain: Any = np.asarray(nodes)
        self._views = {
            name: plain[name] if plain[name].ndim == 1 else plain[name][0]
            for name in plain.dtype.names
        }

    def __getattr__(self, name: str) -> npt.NDArray[Any]:
        view: npt.NDArray[Any] = self._views[name]
        self.__dict__[name] = view  # found without this detour from now on
        return view


class Trail:
    """Looks at a node from time to time.

    A load is taken from the verb that asked for it to the landing of its last piece.

    Args:
        nodes: The node, array[1] of ``NODE``.
    """

    def __init__(self, nodes: Nodes) -> None:
        fields = Fields(nodes)
        count = int(fields.n_models[0])
        self._now, self._full_verbs = fields.now_ns, int(fields.full_verbs[0])
        self._landed, self._target = fields.landed[:count], fields.target[:count]
        self._queued, self._loads = fields.queue_len[:count], fields.loads[:count]
        self._loaded_ns = fields.loaded_ns
        self._seen = (b"", b"", b"")
        self._samples: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64], int]] = []
        self._asked: dict[int, int] = {}
        self._ended = np.zeros(count, np.int64)
        self._took: list[tuple[int, int, int]] = []

    def note(self, action: int) -> None:
        """Take notice of a legal action that is done now."""
        if action != WAIT:
            m, verb = decode(self._full_verbs, action)
            if LEVEL_0 <= verb <= LEVEL_100:
                self._asked[m] = int(self._now[0])

    def look(self) -> None:
        """Take a sample if something has changed since the last one."""
        seen = self._landed.tobytes(), self._target.tobytes(), self._queued.tobytes()
        if seen == self._seen:
            return
        self._seen = seen
        waiting = int(self._queued.sum())
        self._samples.append((int(self._now[0]), self._landed.copy(), self._target.copy(), waiting))
        for m in np.flatnonzero(self._loads > self._ended).tolist():
            if m in self._asked:
                self._took.append((m, self._asked[m], int(self._loaded_ns[m])))
        self._ended = self._loads.copy()

    def arrays(self) -> Arrays:
        """Return what was seen.

        Returns:
            ``trail_ns`` int64[T], ``trail_landed`` and ``trail_target`` int16[T, M] pieces,
            ``trail_waiting`` int32[T] queued requests, ``loads`` int64[L, 3]: model, asked for and
            landed, ns.
        """
        samples = self._samples
        return {
            "trail_ns": np.array([at for at, *_ in samples], np.int64),
            "trail_landed": np.array([landed for _, landed, *_ in samples], np.int16),
            "trail_target": np.array([target for *_, target, _ in samples], np.int16),
            "trail_waiting": np.array([waiting for *_, waiting in samples], np.int32),
            "loads": np.array(self._took, np.int64).reshape(-1, 3),
        }


def timeline(
    name: str, arrays: Arrays, models: list[str], pieces: npt.NDArray[np.int64], end_s: float
) -> dict[str, Any]:
    """Return a trail in the form that ``mmrl.agents.figures.timeline`` draws.

    Args:
        name: Its title.
        arrays: Of `Trail.arrays`.
        models: Names.
        pieces: int64[M], pieces of each model.
        end_s: Where it ends.
    """
    times_s = [*(arrays["trail_ns"] * 1e-9).tolist(), end_s]
    landed = _with_end(arrays["trail_landed"] / pieces)
    target = _with_end(arrays["trail_target"] / pieces)
    never = np.full(len(times_s), -1.0)
    return {
        "policy": name,
        "models": models,
        "end_s": end_s,
        "spans": [
            span
            for m in range(len(models))
            for span in spans(m, np.array(times_s), landed[:, m], target[:, m], never)
        ],
        "times_s": [round(at, 3) for at in times_s],
        "waiting": _with_end(arrays["trail_waiting"]).tolist(),
    }


def _with_end(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Repeat the last sample, for the end."""
    return np.concatenate([values, values[-1:]])
