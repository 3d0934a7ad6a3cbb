"""`ServingBatch`: what the Gymnasium, vector and SB3 environments share.

N simulated nodes, and what their policies see of them. The three environments are thin faces over
it, so that sub-environment i of each is the same episode bit for bit under the same seed. Every
array that is handed out is new: nobody's stored observation changes under them.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.envs.layout import Layout
from mmrl.envs.privileged import write_futures
from mmrl.envs.suggestion import as_rule
from mmrl.errors import InputError
from mmrl.metrics import episode_metrics
from mmrl.node.actions import VERBS
from mmrl.node.state import MAX_MODELS, Nodes, Record
from mmrl.rollout import mark_suggestions
from mmrl.rules.base import Rule
from mmrl.scenarios.mixture import ScenarioSampler
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.sampler import EpisodeInfo
from mmrl.scenarios.schema import Scenario
from mmrl.scenarios.seeds import episode_rng
from mmrl.sim.batch import ALL, Simulator

TERMINATED, TRUNCATED = 1, 2


@lru_cache(maxsize=8)
def shared_sampler(scenario_json: str) -> ScenarioSampler:
    """Prepare a sampler once for all environments of a scenario; it keeps no state of episodes."""
    return Scenario.model_validate_json(scenario_json).sampler()


class ServingBatch:
    """N nodes of one scenario.

    Args:
        scenario: The name of a scenario, the path of its file, or a `Scenario`.
        num_envs: How many nodes.
        max_models: Pad observations and actions to fleets of this size; the scenario's largest
            fleet unless given.
        suggestion: A rule whose suggestion is added to the observation: its name, a mapping of
            ``name`` and parameters, or a `Rule`. The nodes take its dispatch rule where it has
            one, so that a policy that does as suggested does as the rule would.
        privileged: Add the future to the observation, for a critic in training.

    Raises:
        InputError: There is no such scenario or rule, or ``max_models`` is too small.

    Attributes:
        simulator: The nodes.
        layout: Names and places of observations and actions.
        rule: The rule that suggests, or None.
    """

    def __init__(
        self,
        scenario: str | Path | Scenario,
        num_envs: int,
        max_models: int | None = None,
        suggestion: str | Mapping[str, Any] | Rule | None = None,
        privileged: bool = False,
    ) -> None:
        self.scenario = scenario if isinstance(scenario, Scenario) else get_scenario(scenario)
        sampler = shared_sampler(self.scenario.model_dump_json())
        models = sampler.max_models if max_models is None else max_models
        if not sampler.max_models <= models <= MAX_MODELS:
            raise InputError(
                f"max_models is {models}",
                f"scenario '{self.scenario.name}' needs {sampler.max_models} to {MAX_MODELS}",
            )
        self.rule: Rule | None = None
        if suggestion is not None:
            self.rule = as_rule(suggestion)
        self.layout = Layout(models, sampler.full_verbs, suggestion is not None, privileged)
        self.num_envs = num_envs
        self.simulator = Simulator(sampler, num_envs)

    def reset(
        self, i: int, rng: np.random.Generator, options: Mapping[str, Any] | None = None
    ) -> None:
        """Draw an episode for node ``i`` and bring it to its first decision.

        Args:
            i: The node.
            rng: Its random stream.
            options: ``episode``, with ``split`` (``"dev"`` unless given), is one of the frozen
                episodes and leaves ``rng`` alone; everything else is for the scenario's sampler.

        Raises:
            InputError: An option is unknown or wrong.
        """
        left = dict(options or {})
        if "episode" in left:
            rng = episode_rng(left.pop("split", "dev"), left.pop("episode"))
        elif "split" in left:
            raise InputError("option split comes without episode", "give the number of an episode")
        self.simulator.reset(i, rng, left)
        if self.rule is not None:
            self.rule.prepare(self.simulator.nodes[i])
        self.simulator.dt_s[i] = 0.0
        self.simulator.reward_terms[i] = 0.0

    def info(self, i: int) -> EpisodeInfo:
        """Return what the sampler drew for node ``i``."""
        drawn: EpisodeInfo = self.simulator.infos[i]
        return drawn

    def field(self, name: str) -> npt.NDArray[Any]:
        """Return a field of NODE of all nodes, a view."""
        values: npt.NDArray[Any] = self.simulator.node_array[name]
        return values

    def observe(self, rows: slice = ALL) -> npt.NDArray[np.float32]:
        """Return new observations of the nodes of a slice, float32[K, observation size]."""
        simulator, layout = self.simulator, self.layout
        nodes, requests = simulator.node_array[rows], simulator.request_array[rows]
        out = np.empty((len(nodes), layout.observation_size), np.float32)
        simulator.observe(out, rows)
        if self.rule is not None:
            mark_suggestions(simulator, self.rule, out, layout.public_size, rows)
        if layout.privileged:
            write_futures(nodes, requests, layout.actor_size, out)
        return out

    def masks(self, rows: slice = ALL) -> npt.NDArray[np.bool_]:
        """Return which actions are legal on the nodes of a slice, a new bool[K, num_actions]."""
        nodes = len(range(*rows.indices(self.num_envs)))
        out = np.empty((nodes, self.layout.num_actions), np.bool_)
        self.simulator.masks(out, rows)
        return out

    def metrics(self, i: int) -> dict[str, float]:
        """Return `measured` of the episode of node ``i``, which has ended."""
        return measured(self.simulator.nodes[i], self.simulator.requests[i])


def measured(node: Record, requests: Nodes) -> dict[str, float]:
    """Return the metrics of an episode that could be measured, and ``<verb>_per_s``."""
    values = episode_metrics(node, requests).values
    metrics = {name: value for name, value in values.items() if not np.isnan(value)}
    for verb, count in zip(VERBS, node.actions.tolist(), strict=True):
        metrics[f"{verb}_per_s"] = count / values["elapsed_s"]
    return metrics
