"""`MultiModelServingVectorEnv`: many nodes advanced by one compiled call, for Gymnasium's users."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from mmrl.envs.batch import TERMINATED, TRUNCATED, ServingBatch
from mmrl.envs.env import Observation
from mmrl.errors import InputError
from mmrl.scenarios.schema import Scenario

if TYPE_CHECKING:
    from mmrl.rules.base import Rule

Flags = npt.NDArray[np.bool_]


class MultiModelServingVectorEnv(VectorEnv[Observation, npt.NDArray[np.int64], npt.NDArray[Any]]):
    """N nodes of `MultiModelServingEnv`, whose page describes actions, observations and rewards.

    A finished environment is reset in the same step: its observation and infos are those of the
    new episode, and ``infos["final_obs"]``, ``infos["final_info"]`` hold what ended the old one,
    as in Gymnasium's ``SyncVectorEnv``. Where an environment has just ended, ``infos["dt"]`` is
    therefore 0; ``last_dt_s`` and ``last_reward_terms`` are always those of the step.

    Args:
        num_envs: How many.
        scenario: As in `MultiModelServingEnv`, and so on.
        max_models: Pad to fleets of this size.
        suggestion: A rule whose suggestion is observed.
        privileged: Observe the future; for training a critic only.

    Attributes:
        last_dt_s: float64[N], simulated seconds that the last step took.
        last_reward_terms: float64[N, 2], the parts of its rewards: misses and latency.
    """

    metadata = {  # noqa: RUF012 (as Gymnasium declares it)
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        scenario: str | Path | Scenario = "demo",
        max_models: int | None = None,
        suggestion: "str | Mapping[str, Any] | Rule | None" = None,
        privileged: bool = False,
    ) -> None:
        if num_envs < 1:
            raise InputError(f"num_envs is {num_envs}", "have one environment at least")
        self.num_envs = num_envs
        self.batch = ServingBatch(scenario, num_envs, max_models, suggestion, privileged)
        self.layout = self.batch.layout
        self.feature_names = self.layout.feature_names
        self.action_names = self.layout.action_names
        self.encode = self.layout.encode
        self.decode = self.layout.decode
        self.single_observation_space = self.layout.observation_space
        self.single_action_space = self.layout.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator] = []
        self.last_dt_s = np.zeros(num_envs)
        self.last_reward_terms = np.zeros((num_envs, 2))

    def action_masks(self) -> Flags:
        """Return which actions are legal now, bool[N, num_actions]; waiting always is."""
        return self.batch.masks()

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw an episode for each environment.

        Args:
            seed: One number, to which the index of an environment is added, or one for each.
                Without it random streams go on.
            options: As in `MultiModelServingEnv`, the same for all.

        Raises:
            InputError: An option is unknown or wrong, or there are too few seeds.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        if seeds is None:
            seeds = [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise InputError(f"{len(seeds)} seeds for {self.num_envs} environments")
        if not self._generators:
            self._generators = [seeding.np_random(None)[0] for _ in seeds]
        for i, own in enumerate(seeds):
            if own is not None:
                self._generators[i] = seeding.np_random(own)[0]
            self.batch.reset(i, self._generators[i], options)
        self.last_dt_s = self.batch.simulator.dt_s.copy()
        self.last_reward_terms = self.batch.simulator.reward_terms.copy()
        return self.batch.observe(), self._infos()

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Observation, npt.NDArray[np.float64], Flags, Flags, dict[str, Any]]:
        """Do one action in each environment, int64[N].

        Raises:
            ResetNeeded: There was no reset before the first step.
        """
        if not self._generators:
            raise ResetNeeded("Call reset before step.")
        batch, simulator = self.batch, self.batch.simulator
        simulator.step(np.ascontiguousarray(actions, dtype=np.int64))
        self.last_dt_s = simulator.dt_s.copy()
        self.last_reward_terms = simulator.reward_terms.copy()
        done = simulator.done
        observations = batch.observe()
        final: dict[str, Any] = {}
        finished = np.flatnonzero(done).tolist()
        if finished:
            infos = self._infos()
            for i in finished:
                info = {key: infos[key][i] for key in infos if not key.startswith("_")}
                info["metrics"] = batch.metrics(i)
                last = {"final_obs": observations[i].copy(), "final_info": info}
                final = self._add_info(final, last, i)
                batch.reset(i, self._generators[i])
                observations[i] = batch.observe(slice(i, i + 1))[0]
        infos = self._infos()
        rewards = self.last_reward_terms.sum(axis=1)
        return observations, rewards, done == TERMINATED, done == TRUNCATED, {**final, **infos}

    def _infos(self) -> dict[str, Any]:
        """Return the infos of all environments as they are now."""
        simulator = self.batch.simulator
        terms = simulator.reward_terms + 0.0  # -0.0 looks odd
        infos = {
            "action_mask": self.batch.masks().view(np.int8),
            "dt": simulator.dt_s.copy(),
            "time_s": self.batch.field("now_ns") * 1e-9,
            "miss_reward": terms[:, 0],
            "latency_reward": terms[:, 1],
            "illegal_actions": self.batch.field("illegal_actions").copy(),
        }
        present = {f"_{key}": np.ones(self.num_envs, np.bool_) for key in infos}
        return {**infos, **present}
