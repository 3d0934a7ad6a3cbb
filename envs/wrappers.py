"""Wrappers for libraries that look for the mask elsewhere."""

from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

DictObservation = dict[str, npt.NDArray[Any]]


class MaskInObservation(
    gym.ObservationWrapper[DictObservation, np.int64, npt.NDArray[np.float32]],
    gym.utils.RecordConstructorArgs,
):
    """Observe ``{"observation": float32[D], "action_mask": int8[num_actions]}``.

    The form that PettingZoo, RLlib and TorchRL expect.

    Args:
        env: A `MultiModelServingEnv`, in wrappers or not.
    """

    def __init__(self, env: gym.Env[npt.NDArray[np.float32], np.int64]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        assert isinstance(env.action_space, spaces.Discrete)
        parts: dict[str, spaces.Space[Any]] = {
            "observation": env.observation_space,
            "action_mask": spaces.MultiBinary(int(env.action_space.n)),
        }
        self.observation_space = cast("spaces.Space[DictObservation]", spaces.Dict(parts))

    def observation(self, observation: npt.NDArray[np.float32]) -> DictObservation:
        """Add the mask of the present decision."""
        masks: npt.NDArray[np.bool_] = self.get_wrapper_attr("action_masks")()
        return {"observation": observation, "action_mask": masks.view(np.int8)}
