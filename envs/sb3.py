"""`MultiModelServingVecEnv`: many nodes advanced by one compiled call, for Stable-Baselines3.

Subclasses `VecEnv` directly and keeps to three rules that nobody wrote down: an array that was
handed out never changes (SB3 stores observations only after the next step), dictionaries are built
for finished environments alone, and masks travel as one array.
"""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from mmrl.envs.batch import TRUNCATED, ServingBatch
from mmrl.envs.env import Observation
from mmrl.errors import unknown
from mmrl.node.state import NODE, REQUEST
from mmrl.scenarios.schema import Scenario
from mmrl.scenarios.seeds import SPLITS, Split

if TYPE_CHECKING:
    from mmrl.rules.base import Rule

Indices = int | Iterable[int] | None


class MultiModelServingVecEnv(VecEnv):
    """N nodes of `MultiModelServingEnv`, whose page describes actions, observations and rewards.

    The info of a finished environment holds ``terminal_observation``, ``TimeLimit.truncated`` and
    ``episode``: r, l, t as SB3's ``Monitor`` writes them, and goodput and more.

    Args:
        num_envs: How many.
        scenario: As in `MultiModelServingEnv`, and so on.
        max_models: Pad to fleets of this size.
        suggestion: A rule whose suggestion is observed.
        privileged: Observe the future; for training a critic only.
        split: Draw the episodes of environment i from the endless stream of
            ``SeedSequence((split, seed, i))``, apart from the streams of other splits. Without
            it, from Gymnasium's stream of ``seed + i``, as `MultiModelServingEnv` does.
        seed: As `seed` would set it.
        stagger: End the first episode of environment i early, after (i + 1) / N of its time. All
            environments would otherwise end together, which makes batches alike and truncations
            slow. These first episodes have no ``episode`` in their info. For training.

    Attributes:
        last_dt_s: float64[N], simulated seconds that the last step took.
        last_reward_terms: float64[N, 2], the parts of its rewards: misses and latency.
    """

    render_mode = None

    def __init__(
        self,
        num_envs: int,
        scenario: str | Path | Scenario = "demo",
        max_models: int | None = None,
        suggestion: "str | Mapping[str, Any] | Rule | None" = None,
        privileged: bool = False,
        split: Split | None = None,
        seed: int | None = None,
        stagger: bool = False,
    ) -> None:
        if split is not None and split not in SPLITS:
            raise unknown("split", split, SPLITS)
        self.batch = ServingBatch(scenario, num_envs, max_models, suggestion, privileged)
        self.layout = self.batch.layout
        super().__init__(num_envs, self.layout.observation_space, self.layout.action_space)
        self.split = split
        self.last_dt_s = np.zeros(num_envs)
        self.last_reward_terms = np.zeros((num_envs, 2))
        self._stagger = stagger
        self._shortened = np.zeros(num_envs, np.bool_)
        self._generators: list[np.random.Generator] = []
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)
        self._started_s = time.monotonic()
        self._no_infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]
        self._actions = np.zeros(num_envs, np.int64)
        if seed is not None:
            self.seed(seed)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions are legal now, a new bool[N, num_actions]; waiting always is."""
        return self.batch.masks()

    def reset(self) -> Observation:
        """Draw an episode for each environment, with the seeds and options set before."""
        seeds = self._seeds
        if not self._generators:
            seeds = [i if own is None and self.split else own for i, own in enumerate(seeds)]
            self._generators = [seeding.np_random(None)[0] for _ in seeds]
        for i, own in enumerate(seeds):
            if own is not None:
                self._generators[i] = self._generator(i, own)
            self.batch.reset(i, self._generators[i], self._options[i])
            if self._stagger:
                self._shorten(i)
        self._stagger = False
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self._reset_seeds()
        self._reset_options()
        return self.batch.observe()

    def step_async(self, actions: npt.NDArray[np.int64]) -> None:
        """Take the actions of the step, int64[N]."""
        self._actions = np.ascontiguousarray(actions, dtype=np.int64)

    def step_wait(
        self,
    ) -> tuple[Observation, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Do the step: observations, rewards, dones, and infos of the environments that ended."""
        batch, simulator = self.batch, self.batch.simulator
        simulator.step(self._actions)
        self.last_dt_s = simulator.dt_s.copy()
        self.last_reward_terms = simulator.reward_terms.copy()
        rewards = simulator.rewards
        self._returns += rewards
        self._lengths += 1
        done = simulator.done
        observations = batch.observe()
        infos = self._no_infos
        finished = np.flatnonzero(done).tolist()
        if finished:
            infos = infos.copy()
            for i in finished:
                infos[i] = {
                    "terminal_observation": observations[i].copy(),
                    "TimeLimit.truncated": bool(done[i] == TRUNCATED),
                    **self._episode(i),
                }
                batch.reset(i, self._generators[i])
                observations[i] = batch.observe(slice(i, i + 1))[0]
        return observations, rewards.astype(np.float32), done > 0, infos

    def env_method(
        self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method.

        For ``action_masks`` the list has one element, the array bool[N, num_actions] of all
        environments: MaskablePPO stacks the list and then reshapes it, and thousands of rows
        would cost it more than the environments take.
        """
        if method_name == "action_masks":
            masks = self.action_masks()
            return [masks if indices is None else masks[list(self._get_indices(indices))]]
        result = getattr(self, method_name)(*args, **kwargs)
        return [result for _ in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return an attribute, once for each environment of ``indices``."""
        value = getattr(self, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute; it is the same for all environments."""
        setattr(self, attr_name, value)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        """Say yes to ``Monitor``, whose work is done here, and no to every other wrapper."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def get_state(self) -> dict[str, Any]:
        """Return everything on which the episodes to come depend; arrays and text only."""
        simulator = self.batch.simulator
        return {
            "nodes": np.asarray(simulator.nodes).view(np.uint8).copy(),
            "requests": np.asarray(simulator.requests).view(np.uint8).copy(),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "shortened": self._shortened.copy(),
            "generators": json.dumps([g.bit_generator.state for g in self._generators]),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `get_state` returned."""
        simulator = self.batch.simulator
        np.asarray(simulator.nodes)[:] = state["nodes"].view(NODE)
        np.asarray(simulator.requests)[:] = state["requests"].view(REQUEST)
        self._returns[:] = state["returns"]
        self._lengths[:] = state["lengths"]
        self._shortened[:] = state["shortened"]
        self._stagger = False
        self._generators = [np.random.default_rng() for _ in range(self.num_envs)]
        for generator, own in zip(self._generators, json.loads(state["generators"]), strict=True):
            generator.bit_generator.state = own

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def _generator(self, i: int, seed: int) -> np.random.Generator:
        """Return the stream of environment ``i``, whose seed SB3 makes by adding i."""
        if self.split is None:
            return seeding.np_random(seed)[0]
        entropy = (SPLITS.index(self.split), seed - i, i)
        return np.random.default_rng(np.random.SeedSequence(entropy))

    def _shorten(self, i: int) -> None:
        node = self.batch.simulator.nodes[i]
        node.horizon_ns = max(int(node.now_ns) + 1, int(node.horizon_ns) * (i + 1) // self.num_envs)
        self._shortened[i] = i < self.num_envs - 1

    def _episode(self, i: int) -> dict[str, Any]:
        """Return the ``episode`` entry of environment ``i``, which has ended, and start anew."""
        total, length = float(self._returns[i]), int(self._lengths[i])
        self._returns[i] = 0.0
        self._lengths[i] = 0
        if self._shortened[i]:
            self._shortened[i] = False
            return {}
        elapsed_s = round(time.monotonic() - self._started_s, 6)
        return {"episode": {"r": total, "l": length, "t": elapsed_s, **self.batch.metrics(i)}}
