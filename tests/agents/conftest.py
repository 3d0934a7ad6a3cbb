from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch as th

from mmrl.agents.nodes import NodePlan, TrainingNodes
from mmrl.agents.policy import EquivariantPolicy
from mmrl.envs.layout import Layout
from mmrl.rules import get_rule
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.schema import Scenario


@dataclass
class Recorded:
    """What was seen of nodes driven by a mixture of the rule's and random legal actions."""

    layout: Layout
    observations: npt.NDArray[np.float32]
    masks: npt.NDArray[np.bool_]


@pytest.fixture(scope="session")
def busy() -> Scenario:
    """Six models that compete hard for 14 s, under the core verbs."""
    return get_scenario("demo", utilisation_at_load_1=2.5, duration_s=10, drain_s=4)


@pytest.fixture(scope="session")
def recorded(busy: Scenario) -> Recorded:
    nodes = TrainingNodes(NodePlan([busy], 16, get_rule("slack"), privileged=True, seed=0))
    rng = np.random.default_rng(0)
    seen = [nodes.reset()]
    masks = [nodes.action_masks()]
    layout = nodes.layout
    for _ in range(120):
        actions = seen[-1][:, layout.public_size : layout.actor_size].argmax(axis=1)
        for i in np.flatnonzero(rng.random(16) < 0.2):
            actions[i] = rng.choice(np.flatnonzero(masks[-1][i]))
        seen.append(nodes.step(actions)[0])  # type: ignore[arg-type]
        masks.append(nodes.action_masks())
    nodes.close()
    return Recorded(layout, np.concatenate(seen), np.concatenate(masks))


def _make_policy(layout: Layout, trained: bool = True, seed: int = 0) -> EquivariantPolicy:
    """Return a network; a trained one has weights in its last layers, too."""
    th.manual_seed(seed)
    policy = EquivariantPolicy(
        layout.observation_space, layout.action_space, lambda left: 1e-3, layout=layout
    )
    if trained:
        with th.no_grad():
            for last in (policy.actor.verbs, policy.actor.wait, policy.critic.value):
                last.weight.normal_()
                last.bias.normal_()
    return policy


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., EquivariantPolicy]:
    """How to make a network, see `_make_policy`."""
    return _make_policy
