"""A hand-written policy in five lines: load whoever waits longest, never preempt.

python examples/five_line_policy.py
"""

import gymnasium as gym
import numpy as np

import mmrl  # noqa: F401 (registers the environment)


def main(episodes: int = 3, scenario: str = "demo") -> list[float]:
    """Play a few frozen development episodes and return the goodput of each."""
    env = gym.make("mmrl/MultiModelServing-v0", scenario=scenario)
    node = env.unwrapped
    models = range(node.layout.max_models)
    load = [node.encode(m, "level100") for m in models]
    wait = [node.feature_names.index(f"model{m}.oldest_wait") for m in models]

    goodputs = []
    for episode in range(episodes):
        observation, info = env.reset(options={"split": "dev", "episode": episode})
        done = False
        while not done:
            legal = [m for m in models if info["action_mask"][load[m]]]
            longest = max(legal, key=lambda m: observation[wait[m]], default=None)
            action = 0 if longest is None else load[longest]
            observation, _, terminated, truncated, info = env.step(np.int64(action))
            done = terminated or truncated
        goodputs.append(info["metrics"]["goodput"])
        print(f"episode {episode}: {node.episode.requests} requests, goodput {goodputs[-1]:.3f}")
    return goodputs


if __name__ == "__main__":
    main()
