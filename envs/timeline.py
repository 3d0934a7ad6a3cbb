"""`Timeline`: what a node held and did over an episode.

Sampled at each decision instant, also at those where no verb was legal and nobody was asked: at
most the scenario's interval apart. The one form from which pictures, Perfetto traces and reports
are drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.envs.batch import measured
from mmrl.envs.layout import Layout
from mmrl.node.memory import free_bytes
from mmrl.node.state import RESTORING, Nodes, Record
from mmrl.scenarios.sampler import EpisodeInfo
from mmrl.sim.batch import Simulator

UNASKED = -1  # the action of a sample at which no decision was asked for


@dataclass(frozen=True, eq=False)
class Timeline:
    """Samples of a node with M models at T decision instants, and at the present or the end.

    Several decisions at one instant are several samples of the same time.

    Attributes:
        model_names: The fleet.
        action_names: Names of the actions.
        horizon_s: When the episode is truncated.
        budget_gb: Device memory.
        time_s: float64[T].
        action: int64[T], the action taken then, or `UNASKED`.
        free: float64[T], memory that nothing holds, of the budget.
        landed: float64[T, M], weights on the device, of the model.
        target: float64[T, M], weights wanted, of the model.
        loaded_s: float64[T, M], when the last load ended; -1 before.
        queued: int64[T, M], waiting requests.
        running: int64[T, M], sequences in prefill and decode.
        suspended: int64[T, M], sequences preempted and not yet back.
        paused: bool[T, M].
        kv: float64[T, M], KV cache on the device, of the budget.
        saving: bool[T, M], KV moves to the host.
        restoring: bool[T, M], KV moves to the device.
    """

    model_names: tuple[str, ...]
    action_names: tuple[str, ...]
    horizon_s: float
    budget_gb: float
    time_s: npt.NDArray[np.float64]
    action: npt.NDArray[np.int64]
    free: npt.NDArray[np.float64]
    landed: npt.NDArray[np.float64]
    target: npt.NDArray[np.float64]
    loaded_s: npt.NDArray[np.float64]
    queued: npt.NDArray[np.int64]
    running: npt.NDArray[np.int64]
    suspended: npt.NDArray[np.int64]
    paused: npt.NDArray[np.bool_]
    kv: npt.NDArray[np.float64]
    saving: npt.NDArray[np.bool_]
    restoring: npt.NDArray[np.bool_]


class Recorder:
    """Steps one node of a simulator and samples it on the way.

    Args:
        simulator: Holds the node, which has been reset.
        action_names: Names of the actions.
        i: Which node.
    """

    def __init__(self, simulator: Simulator, action_names: tuple[str, ...], i: int = 0) -> None:
        self._simulator, self._i = simulator, i
        self._node, self._requests = simulator.nodes[i], simulator.requests[i]
        self._info: EpisodeInfo = simulator.infos[i]
        self._action_names = action_names
        self._samples: list[dict[str, Any]] = []

    def step(self, action: int) -> None:
        """Do one action, as `Simulator.step` does."""
        self._samples.append(self._sample(action))
        self._simulator.step_watched(
            self._i, action, lambda: self._samples.append(self._sample(UNASKED))
        )

    def timeline(self) -> Timeline:
        """Return all samples, and the node as it is now."""
        samples = [*self._samples, self._sample(UNASKED)]
        arrays: dict[str, Any] = {
            name: np.array([sample[name] for sample in samples]) for name in samples[0]
        }
        return Timeline(
            model_names=self._info.model_names,
            action_names=self._action_names,
            horizon_s=float(self._node.horizon_ns) * 1e-9,
            budget_gb=float(self._node.budget_bytes) / 1e9,
            **arrays,
        )

    def _sample(self, action: int) -> dict[str, Any]:
        s, r = self._node, self._requests
        models = slice(int(s.n_models))
        pieces, budget = s.pieces[models], float(s.budget_bytes)
        prefilling = s.prefilling[models] >= 0
        running = s.decoding[models] + prefilling
        arrived = slice(int(s.next_arrival))
        restoring = r.model[arrived][r.state[arrived] == RESTORING]
        return {
            "time_s": float(s.now_ns) * 1e-9,
            "action": action,
            "free": free_bytes(s) / budget,
            "landed": s.landed[models] / pieces,
            "target": s.target[models] / pieces,
            "loaded_s": np.where(s.loaded_ns[models] < 0, -1.0, s.loaded_ns[models] * 1e-9),
            "queued": s.queue_len[models].copy(),
            "running": running,
            "suspended": s.begun_len[models] - running,
            "paused": s.paused[models] > 0,
            "kv": s.kv_blocks[models] * s.block_bytes[models] / budget,
            "saving": s.saving_blocks[models] > 0,
            "restoring": np.bincount(restoring, minlength=int(s.n_models)) > 0,
        }


@dataclass(frozen=True, eq=False)
class EpisodeLog:
    """A played episode.

    Attributes:
        info: What was drawn.
        timeline: The node at each decision.
        requests: REQUEST records, as they ended.
        reward: Sum of rewards.
        metrics: Goodput and more.
    """

    info: EpisodeInfo
    timeline: Timeline
    requests: npt.NDArray[Any]
    reward: float
    metrics: dict[str, float]


# Takes a node and its requests; returns an action.
Decide = Callable[[Record, Nodes], int]


def record_episode(simulator: Simulator, decide: Decide, i: int = 0) -> EpisodeLog:
    """Play the episode that a node has been reset to, to its end, and record it.

    Args:
        simulator: Holds the node; of an environment ``env.unwrapped.batch.simulator``.
        decide: Who decides, and has prepared the node for that.
        i: Which node.
    """
    node, requests = simulator.nodes[i], simulator.requests[i]
    layout = Layout(simulator.sampler.max_models, bool(simulator.sampler.full_verbs))
    recorder = Recorder(simulator, layout.action_names, i)
    reward = 0.0
    while not node.done:
        recorder.step(int(decide(node, requests)))
        reward += float(simulator.rewards[i])
    return EpisodeLog(
        simulator.infos[i],
        recorder.timeline(),
        simulator.request_array[i, : int(node.n_requests)].copy(),
        reward,
        measured(node, requests),
    )
