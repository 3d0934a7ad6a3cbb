"""`TrainingNodes`: the environments of a training run as one VecEnv.

Nodes of several scenarios side by side, padded to the largest fleet among them. Each part is a
`MultiModelServingVecEnv`, and parts can be stepped on several threads: their compiled code holds
no lock, and no part depends on another, so that results do not depend on the number of threads.
The whole state can be taken and set, for training that continues exactly where it stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv

from mmrl.agents.export import Floats
from mmrl.envs.sb3 import MultiModelServingVecEnv
from mmrl.errors import InputError
from mmrl.rules import Rule
from mmrl.scenarios.schema import Scenario

T = TypeVar("T")
Indices = Any
SMALLEST_PART = 16  # nodes; below that, threads cost more than they bring


class TrainingNodes(VecEnv):
    """N nodes, spread evenly over scenarios.

    Args:
        scenarios: What to train on; all of one verb set.
        num_envs: How many nodes altogether.
        rule: The rule whose suggestion is observed and whose dispatch is used, or None.
        privileged: Whether the critic's block is observed.
        seed: Of all episodes.
        threads: Threads that step.

    Raises:
        InputError: The scenarios have different verb sets, or there are fewer nodes than scenarios.

    Attributes:
        last_dt_s: float64[N], simulated seconds of the last step.
        last_reward_terms: float64[N, 2], misses and latency.
    """

    render_mode = None

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        num_envs: int,
        rule: Rule | None,
        privileged: bool,
        seed: int,
        threads: int = 1,
    ) -> None:
        if len({scenario.verbs for scenario in scenarios}) > 1:
            named = ", ".join(f"{scenario.name}: {scenario.verbs}" for scenario in scenarios)
            raise InputError(
                f"scenarios with different verb sets ({named})", "train one policy each"
            )
        if num_envs < len(scenarios):
            raise InputError(f"envs is {num_envs}", f"give at least {len(scenarios)}, one each")
        models = max(scenario.largest_fleet for scenario in scenarios)
        self.parts: list[MultiModelServingVecEnv] = []
        # A fixed number of parts, whatever the threads: seeds belong to the parts.
        pieces = max(1, min(4, num_envs // SMALLEST_PART) // len(scenarios))
        sizes = _even(num_envs, len(scenarios) * pieces)
        for k, size in enumerate(sizes):
            self.parts.append(
                MultiModelServingVecEnv(
                    size,
                    scenarios[k % len(scenarios)],
                    max_models=models,
                    suggestion=rule,
                    privileged=privileged,
                    split="train",
                    seed=seed * 1000 + k,
                    stagger=True,
                )
            )
        self.layout = self.parts[0].layout
        self.last_dt_s = np.zeros(num_envs)
        self.last_reward_terms = np.zeros((num_envs, 2))
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        ends = np.cumsum(sizes)
        self._masks: npt.NDArray[np.bool_] | None = None  # of now, where they are known
        self._slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        super().__init__(num_envs, self.layout.observation_space, self.layout.action_space)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions are legal now, bool[N, A]."""
        if self._masks is None:
            self._masks = np.concatenate([part.action_masks() for part in self.parts])
        return self._masks

    def reset(self) -> Floats:
        """Draw an episode for each node."""
        self._masks = None
        return np.concatenate([np.asarray(part.reset()) for part in self.parts])

    def step_async(self, actions: npt.NDArray[np.int64]) -> None:
        """Take the actions of the step, int64[N]."""
        for part, rows in zip(self.parts, self._slices, strict=True):
            part.step_async(actions[rows])

    def step_wait(
        self,
    ) -> tuple[Floats, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Do the step on all parts."""
        results = self._on_threads(lambda part: (*part.step_wait(), part.action_masks()))
        observations, rewards, dones, infos, masks = zip(*results, strict=True)
        self._masks = np.concatenate(masks)
        self.last_dt_s = np.concatenate([part.last_dt_s for part in self.parts])
        self.last_reward_terms = np.concatenate([part.last_reward_terms for part in self.parts])
        return (
            np.concatenate(observations),
            np.concatenate(rewards),
            np.concatenate(dones),
            [info for part in infos for info in part],
        )

    def _on_threads(self, work: Callable[[MultiModelServingVecEnv], T]) -> list[T]:
        """Return what ``work`` gives for each part; every thread, this one too, does its share.

        Each gets its parts at once: waking a thread takes as long as a few dozen decisions.
        """

        def share(first: int) -> list[T]:
            return [work(part) for part in self.parts[first :: self._threads]]

        others = [self._pool.submit(share, k) for k in range(1, self._threads)]
        results = {0: share(0)} | {k: other.result() for k, other in enumerate(others, 1)}
        return [results[k % self._threads][k // self._threads] for k in range(len(self.parts))]

    def env_method(
        self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method; ``action_masks`` gives a list of one array, see the parts' own."""
        result = getattr(self, method_name)(*args, **kwargs)
        return [result] if method_name == "action_masks" else [result] * self.num_envs

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return an attribute, once for each node."""
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute; it is the same for all nodes."""
        setattr(self, attr_name, value)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        """Say no: nothing is wrapped."""
        return [False] * self.num_envs

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    # ------------------------------------------------------------------ exact continuation

    def get_state(self) -> dict[str, Any]:
        """Return everything on which the episodes to come depend; arrays and text only."""
        return {
            f"{k}.{name}": value
            for k, part in enumerate(self.parts)
            for name, value in part.get_state().items()
        }

    def set_state(self, state: Mapping[str, Any]) -> Floats:
        """Continue from a state; return the observations float32[N, D] at that point."""
        for k, part in enumerate(self.parts):
            prefix = f"{k}."
            mine = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            part.set_state(mine)
        self._masks = None
        return np.concatenate([np.asarray(part.batch.observe()) for part in self.parts])


def _even(total: int, parts: int) -> list[int]:
    """Split a total into nearly equal parts."""
    return [total * (k + 1) // parts - total * k // parts for k in range(parts)]
