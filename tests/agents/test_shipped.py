"""The policy inside the package: what it knows, how large it is, and that it serves any fleet."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from mmrl.agents.export import DEFAULT_FOLDER, load_policy
from mmrl.agents.runner import play
from mmrl.node.state import MAX_MODELS
from mmrl.rollout import rollout
from mmrl.rules import get_rule
from mmrl.scenarios.registry import get_scenario

MOST_BYTES = 2_000_000


def do_nothing(observations: Any, masks: Any) -> npt.NDArray[np.int64]:
    return np.zeros(len(observations), np.int64)


def test_it_knows_both_verb_sets_and_is_small() -> None:
    policy = load_policy("default")
    assert policy.plays(full_verbs=False) and policy.plays(full_verbs=True)
    assert sum(file.stat().st_size for file in DEFAULT_FOLDER.iterdir()) <= MOST_BYTES


@pytest.mark.parametrize("verbs", ["core", "full"])
@pytest.mark.parametrize("models", [1, 6, MAX_MODELS])
def test_it_serves_fleets_of_any_size(models: int, verbs: Literal["core", "full"]) -> None:
    """Where nothing is done nothing is loaded, and nobody is served."""
    scenario = get_scenario(
        "demo", models=["qwen2.5-1.5b"] * models, verbs=verbs, duration_s=10, drain_s=4
    )
    episodes = [("dev", index) for index in range(3)]
    played, idle = (
        np.mean([result.metrics.values["goodput"] for result in results])
        for results in (
            play(load_policy("default"), scenario.sampler(), episodes),
            rollout(do_nothing, scenario.sampler(), episodes),
        )
    )
    assert played > idle


def test_it_beats_the_rule_on_a_fleet_that_it_never_saw() -> None:
    """By far; some points of that with so few episodes."""
    scenario = get_scenario("h200-24")
    episodes = [("test", index) for index in range(16)]
    learned, rule = (
        np.mean([result.metrics.values["goodput"] for result in results])
        for results in (
            play(load_policy("default"), scenario.sampler(), episodes),
            rollout(get_rule("slack"), scenario.sampler(), episodes),
        )
    )
    assert learned > rule + 0.025
