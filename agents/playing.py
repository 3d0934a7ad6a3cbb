"""`play_part`: the rollout of some nodes, simulation and policy in turn.

The nodes of a training are played in parts that do not depend on each other: on threads
(`mmrl.agents.ppo`) or in processes (`mmrl.agents.processes`), always by this function, so that the
result does not depend on where.
"""

import time
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch as th
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.vec_env import VecEnv

from mmrl.agents.buffer import EventTimeRolloutBuffer, Floats
from mmrl.agents.nodes import Played
from mmrl.agents.policy import Actor


class Players(Protocol):
    """Nodes that can be played apart from the others: a `Part` of `TrainingNodes`."""

    rows: slice

    @property
    def last_dt_s(self) -> npt.NDArray[np.float64]:
        """Simulated seconds of the last step, float64[N]."""

    @property
    def last_reward_terms(self) -> npt.NDArray[np.float64]:
        """The parts of its rewards, float64[N, 2]."""

    def pace(self) -> npt.NDArray[np.float64]:
        """Return by which the time constants of each node are stretched, float64[N]."""

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions are legal now, bool[N, A]."""

    def step(self, actions: npt.NDArray[np.int64]) -> Played:
        """Do an action on each node."""


class Whole:
    """Any VecEnv that tells ``last_dt_s``, as its one part."""

    rows = slice(None)

    def __init__(self, env: VecEnv) -> None:
        self._env = env
        self.last_reward_terms = np.zeros((env.num_envs, 2))

    @property
    def last_dt_s(self) -> npt.NDArray[np.float64]:
        """Simulated seconds of the last step, float64[N]."""
        found: npt.NDArray[np.float64] = self._env.get_attr("last_dt_s")[0]
        return found

    def pace(self) -> npt.NDArray[np.float64]:
        """Return by which the time constants of each node are stretched, float64[N]."""
        return np.ones(self._env.num_envs)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions are legal now, bool[N, A]."""
        return np.asarray(get_action_masks(self._env)).reshape(self._env.num_envs, -1)

    def step(self, actions: npt.NDArray[np.int64]) -> Played:
        """Do an action on each node."""
        observations, rewards, dones, infos = self._env.step(actions)
        return Played(np.asarray(observations), np.asarray(rewards), np.asarray(dones), infos)


class Rolled(NamedTuple):
    """What is left of a part's rollout beside the rows of the buffer.

    Attributes:
        last: Observations after it.
        infos: Of each step, those of the episodes that ended.
        ended: Step and node of the truncated episodes ...
        last_seen: ... and their last observations.
        reward_terms: Sums of the parts of the rewards, float64[2].
        seconds: Time with the environment, and with the policy.
    """

    last: Floats
    infos: list[list[dict[str, Any]]]
    ended: list[tuple[int, int]]
    last_seen: list[Floats]
    reward_terms: npt.NDArray[np.float64]
    seconds: tuple[float, float]


def play_part(
    part: Players,
    actor: Actor,
    generator: th.Generator,
    observations: Floats,
    buffer: EventTimeRolloutBuffer,
    steps: int,
    reward_scale: float,
) -> Rolled:
    """Play the rollout of a part into its rows of the buffer.

    Args:
        part: The nodes.
        actor: Who decides, on the processor.
        generator: Actions are drawn from it.
        observations: float32[N, D], as they are now.
        buffer: Written to.
        steps: Decisions of each node.
        reward_scale: Rewards are multiplied by it.
    """
    first = part.rows.start or 0
    infos: list[list[dict[str, Any]]] = []
    ended: list[tuple[int, int]] = []
    last_seen: list[Floats] = []
    terms = np.zeros(2)
    env_s = policy_s = 0.0
    clock = time.perf_counter
    for step in range(steps):
        begun = clock()
        masks, pace = part.action_masks(), part.pace()
        seen = clock()
        with th.no_grad():
            drawn, log_probs = actor.sample(th.from_numpy(observations), masks, generator)
        actions = drawn.numpy()
        decided = clock()
        following, rewards, dones, told = part.step(actions)
        finished = np.flatnonzero(dones).tolist()
        infos.append([told[i] for i in finished])
        for i in finished:
            if told[i].get("TimeLimit.truncated", False):
                ended.append((step, first + i))
                last_seen.append(told[i]["terminal_observation"])
        terms += part.last_reward_terms.sum(axis=0)
        buffer.store(
            step,
            part.rows,
            observations,
            masks,
            actions,
            log_probs.numpy(),
            rewards * reward_scale,
            part.last_dt_s,
            pace,
            dones,
        )
        observations = following
        policy_s += decided - seen
        env_s += clock() - decided + seen - begun
    return Rolled(observations, infos, ended, last_seen, terms, (env_s, policy_s))
