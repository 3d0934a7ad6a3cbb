"""Scheduling several language models on one GPU node: simulate, train, evaluate, serve.

Importing the package registers the environment, by name only, with Gymnasium::

    import gymnasium as gym
    import mmrl

    env = gym.make("mmrl/MultiModelServing-v0")
"""

import gymnasium as gym

__version__ = "0.1.0"

# Named by strings, so that the core imports nothing that is built on top of it.
gym.register(
    id="mmrl/MultiModelServing-v0",
    entry_point="mmrl.envs.env:MultiModelServingEnv",
    vector_entry_point="mmrl.envs.vector:MultiModelServingVectorEnv",
)
