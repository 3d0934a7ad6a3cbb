from typing import Any

import numpy as np
import pytest

from mmrl.agents import runner
from mmrl.agents.export import ExportedPolicy, PolicyCard, PriorRule
from mmrl.agents.runner import PolicyRunner, play
from mmrl.envs.batch import ServingBatch
from mmrl.errors import InputError
from mmrl.node.observe import GLOBAL_FEATURES, MODEL_FEATURES
from mmrl.rollout import rollout
from mmrl.rules import get_rule
from mmrl.scenarios.seeds import episode_rng
from mmrl.sim.batch import Simulator


def exported(network: Any, verbs: tuple[str, ...], verb_set: Any = "core") -> ExportedPolicy:
    card = PolicyCard(
        global_features=GLOBAL_FEATURES,
        model_features=MODEL_FEATURES,
        verb_set=verb_set,
        verbs=verbs,
        width=32,
        prior=PriorRule.of(get_rule("slack", dispatch="las")),
    )
    weights = {k: v.numpy() for k, v in network.actor.state_dict().items()}
    return ExportedPolicy(card, weights)


def test_before_training_the_episodes_are_those_of_the_rule(
    busy: Any, recorded: Any, make_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SLOTS", 3)
    policy = exported(make_policy(recorded.layout, trained=False), recorded.layout.verbs)
    episodes = [("dev", i) for i in range(8)]
    sampler = busy.sampler()
    assert policy.rule is not None
    rule = rollout(policy.rule, sampler, episodes)  # type: ignore[arg-type]
    learned = play(policy, sampler, episodes)  # type: ignore[arg-type]
    for one, other in zip(rule, learned, strict=True):
        assert (one.split, one.index, one.info) == (other.split, other.index, other.info)
        assert one.metrics.values == other.metrics.values
    other_rule = rollout(get_rule("slack"), sampler, episodes)  # type: ignore[arg-type]
    assert any(
        a.metrics.values != b.metrics.values for a, b in zip(rule, other_rule, strict=True)
    )  # the dispatch of the rule is in force


def test_it_sees_what_the_training_environment_shows(
    busy: Any, recorded: Any, make_policy: Any
) -> None:
    policy = exported(make_policy(recorded.layout), recorded.layout.verbs)
    batch = ServingBatch(busy, 4, suggestion=policy.rule)
    working = PolicyRunner(policy, Simulator(busy.sampler(), 4))
    for i in range(4):
        batch.reset(i, episode_rng("dev", i))
        working.reset(i, episode_rng("dev", i))
    for _ in range(60):
        actions = working.act()
        assert np.array_equal(working.observations, batch.observe())
        assert np.array_equal(working.masks, batch.masks())
        batch.simulator.step(actions)
        working.simulator.step(actions)


def test_another_verb_set_is_refused(busy: Any, recorded: Any, make_policy: Any) -> None:
    policy = exported(make_policy(recorded.layout), recorded.layout.verbs, "full")
    with pytest.raises(InputError, match="has the verbs 'full'"):
        PolicyRunner(policy, Simulator(busy.sampler(), 1))
