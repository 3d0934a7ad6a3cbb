"""`PolicyRunner`: a policy's actions straight from nodes; `play` has it play whole episodes.

The one place where state becomes observation, suggestion and mask for a trained policy: training's
evaluation, reports and the live node all decide through it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.export import ExportedPolicy
from mmrl.errors import InputError
from mmrl.metrics import episode_metrics
from mmrl.rollout import Episode, EpisodeResult, mark_suggestions
from mmrl.scenarios.seeds import episode_rng
from mmrl.sim.batch import Sampler, Simulator

SLOTS = 128  # episodes that are played side by side


class PolicyRunner:
    """Decides for all nodes of a simulator.

    Args:
        policy: Any exported policy.
        simulator: Its nodes are reset through `reset`, which sets the policy's dispatch.

    Raises:
        InputError: The policy has another verb set than the simulator's scenario.
    """

    def __init__(self, policy: ExportedPolicy, simulator: Simulator) -> None:
        if not policy.plays(bool(simulator.sampler.full_verbs)):
            wanted = "full" if simulator.sampler.full_verbs else "core"
            raise InputError(
                f"policy {policy.name} has the verbs '{policy.card.verb_set}', "
                f"the scenario has '{wanted}'",
                f"train a policy on a scenario with verbs '{wanted}'",
            )
        self.policy, self.simulator = policy, simulator
        n, size = simulator.num_envs, simulator.observation_size
        size += simulator.num_actions if policy.rule else 0
        self.observations = np.zeros((n, size), np.float32)
        self.masks = np.zeros((n, simulator.num_actions), np.bool_)

    def reset(
        self, i: int, rng: np.random.Generator, options: Mapping[str, Any] | None = None
    ) -> None:
        """Draw an episode for node ``i``, with the dispatch that the policy was trained with."""
        self.simulator.reset(i, rng, options)
        if self.policy.rule is not None:
            self.policy.rule.prepare(self.simulator.nodes[i])

    def look(self, count: int | None = None) -> None:
        """Read the first ``count`` nodes (all of them) into ``observations`` and ``masks``."""
        rows = slice(count)
        simulator, seen = self.simulator, self.observations[rows]
        simulator.observe(seen, rows)
        simulator.masks(self.masks[rows], rows)
        if self.policy.rule is not None:
            mark_suggestions(simulator, self.policy.rule, seen, simulator.observation_size, rows)

    def act(self, count: int | None = None) -> npt.NDArray[np.int64]:
        """Return what the policy does now at every node, int64[N]; WAIT after the first count."""
        self.look(count)
        actions = np.zeros(self.simulator.num_envs, np.int64)
        rows = slice(count)
        actions[rows] = self.policy.act(self.observations[rows], self.masks[rows])
        return actions


def play(
    policy: ExportedPolicy,
    sampler: Sampler,
    episodes: Sequence[Episode],
    options: Mapping[str, Any] | None = None,
) -> list[EpisodeResult]:
    """Have a policy play episodes, a new one in each place that becomes free.

    Args:
        policy: The policy.
        sampler: Where episodes come from.
        episodes: (split, index) of each.
        options: Handed to the sampler's ``draw``.

    Returns:
        One result per episode, in their order.
    """
    simulator = Simulator(sampler, max(1, min(SLOTS, len(episodes))))
    runner = PolicyRunner(policy, simulator)
    nodes, requests = simulator.nodes, simulator.requests
    results: dict[int, EpisodeResult] = {}
    playing = list(range(min(simulator.num_envs, len(episodes))))  # the nodes in use come first
    for i, k in enumerate(playing):
        runner.reset(i, episode_rng(*episodes[k]), options)
    begun = len(playing)
    while playing:
        simulator.step(runner.act(len(playing)))
        for i in np.flatnonzero(simulator.done[: len(playing)])[::-1].tolist():
            k = playing[i]
            split, index = episodes[k]
            metrics = episode_metrics(nodes[i], requests[i])
            results[k] = EpisodeResult(split, index, simulator.infos[i], metrics)
            if begun < len(episodes):
                runner.reset(i, episode_rng(*episodes[begun]), options)
                playing[i] = begun
                begun += 1
                continue
            last = len(playing) - 1  # moves into the place that is free
            nodes[i], requests[i] = nodes[last], requests[last]
            simulator.infos[i], playing[i] = simulator.infos[last], playing[last]
            nodes[last].done = 2
            playing.pop()
    return [results[k] for k in range(len(episodes))]
