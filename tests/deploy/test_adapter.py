"""One door between policy and node: the policy decides, and the champion where it cannot."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mmrl.agents.export import ExportedPolicy, PolicyCard, PriorRule
from mmrl.deploy.adapter import DeployAdapter
from mmrl.deploy.node import LiveNode
from mmrl.errors import InputError
from mmrl.node.actions import verb_names
from mmrl.node.observe import GLOBAL_FEATURES, MODEL_FEATURES
from mmrl.node.state import DISPATCHES, NEVER
from mmrl.rules import get_rule
from mmrl.rules.dispatch import act
from tests.deploy.test_node import instant, live
from tests.sim.scenes import random_scene

CHAMPION = get_rule("slack")


class Policy(ExportedPolicy):
    """A policy whose scores are what a function says, for any observation."""

    def __init__(self, scores: Callable[[int], Any], full_verbs: bool, prior: bool = False) -> None:
        card = PolicyCard(
            global_features=GLOBAL_FEATURES,
            model_features=MODEL_FEATURES,
            verb_set="full" if full_verbs else "core",
            verbs=verb_names(full_verbs),
            width=4,
            prior=PriorRule.of(CHAMPION) if prior else None,
        )
        super().__init__(card, {}, "made-up")
        self._scores = scores
        self.seen: list[np.ndarray] = []

    def logits(self, observations: Any) -> Any:
        self.seen.append(observations)
        return np.asarray(self._scores(self.layout(observations.shape[-1]).num_actions), np.float32)


@pytest.fixture
def node() -> LiveNode:
    """A node at an instant at which somebody has to be loaded."""
    for seed in range(100):
        scene = random_scene(seed, n_models=3, full=True, n_requests=20)
        scene[0].horizon_ns = NEVER
        node = live(scene)
        for _ in range(30):
            node.start_work()
            if instant(node) and node.begin_decision() and node.state.in_system > 2:
                return node
    raise AssertionError("no such instant")


def adapter_of(policy: Any, node: LiveNode, **more: Any) -> DeployAdapter:
    tables = node.decode_tables, node.prefill_tables
    return DeployAdapter(policy, CHAMPION, *tables, **more)


def legal_other_than_wait(node: LiveNode) -> int:
    return int(np.flatnonzero(node.look()[1])[1])


def scores_for(action: int) -> Callable[[int], Any]:
    return lambda count: np.eye(count)[action]


def test_a_policy_decides(node: LiveNode) -> None:
    wanted = legal_other_than_wait(node)
    policy = Policy(scores_for(wanted), True)
    adapter = adapter_of(policy, node)
    verdict = adapter.decide(node.nodes, node.table)
    assert (verdict.action, verdict.by) == (wanted, "policy")
    assert not adapter.fallbacks and verdict.latency_s > 0
    assert np.array_equal(policy.seen[0], node.look()[0])


def test_a_policy_sees_the_suggestion_of_its_prior(node: LiveNode) -> None:
    policy = Policy(scores_for(0), True, prior=True)
    adapter = adapter_of(policy, node)
    adapter.decide(node.nodes, node.table)
    seen, mask = node.look()
    suggestion = policy.seen[0][len(seen) :]
    tables = node.decode_tables, node.prefill_tables
    champions = act(CHAMPION, node.state, node.requests, *tables)
    assert suggestion.argmax() == champions and suggestion.sum() == 1
    assert len(suggestion) == len(mask)


def test_a_rule_decides_at_once(node: LiveNode) -> None:
    adapter = adapter_of(get_rule("lru"), node)
    adapter.ask(node.nodes, node.table)
    verdict = adapter.poll(node.nodes, node.table)
    assert verdict is not None and verdict.by == "policy" and node.look()[1][verdict.action]


def test_a_rule_without_a_dispatch_leaves_the_nodes_own(node: LiveNode) -> None:
    s = node.state
    s.dispatch = own = DISPATCHES.index("las")
    adapter = adapter_of(get_rule("lru"), node)
    adapter.prepare(s)
    assert s.dispatch == own
    adapter.change(get_rule("slack"), s)
    assert s.dispatch == DISPATCHES.index("edf")
    adapter.change(get_rule("lru"), s)
    assert s.dispatch == own


def raising(count: int) -> Any:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        (lambda count: np.full(count, np.nan), "not_finite"),
        (lambda count: np.where(np.arange(count) == 0, np.inf, 0.0), "not_finite"),
        (raising, "error"),
        (lambda count: np.zeros(count + 9), "error"),
    ],
)
def test_the_champion_decides_where_the_policy_fails(node: LiveNode, scores: Any, why: str) -> None:
    adapter = adapter_of(Policy(scores, True), node)
    verdict = adapter.decide(node.nodes, node.table)
    assert verdict.by == "champion" and adapter.fallbacks == {why: 1}
    tables = node.decode_tables, node.prefill_tables
    assert verdict.action == act(CHAMPION, node.state, node.requests, *tables)


def test_an_illegal_action_is_not_done(node: LiveNode, monkeypatch: pytest.MonkeyPatch) -> None:
    illegal = int(np.flatnonzero(~node.look()[1])[0])
    monkeypatch.setattr("mmrl.deploy.adapter._think", lambda *question: illegal)
    adapter = adapter_of(Policy(scores_for(0), True), node)
    verdict = adapter.decide(node.nodes, node.table)
    assert verdict.by == "champion" and adapter.fallbacks == {"illegal": 1}
    assert node.look()[1][verdict.action]


def test_a_late_policy_is_not_waited_for(node: LiveNode) -> None:
    release = threading.Event()

    def slow(count: int) -> Any:
        release.wait(30)
        return np.zeros(count)

    policy = Policy(slow, True)
    adapter = adapter_of(policy, node, deadline_s=0.02)
    begun = time.monotonic()
    first = adapter.decide(node.nodes, node.table)
    second = adapter.decide(node.nodes, node.table)  # it still thinks about the first
    assert time.monotonic() - begun < 10
    assert (first.by, second.by) == ("champion", "champion")
    assert adapter.fallbacks == {"deadline": 2}
    release.set()
    while adapter._busy():
        time.sleep(0.001)
    adapter.deadline_s = 10.0
    assert adapter.decide(node.nodes, node.table).by == "policy"
    assert len(policy.seen) == 2  # the second question was not put on top of the first


def test_after_a_revert_the_champion_decides(node: LiveNode) -> None:
    adapter = adapter_of(Policy(scores_for(0), True), node)
    assert adapter.name == "made-up"
    adapter.reverted = True
    verdict = adapter.decide(node.nodes, node.table)
    assert verdict.by == "champion" and adapter.name == "slack" and not adapter.fallbacks


def test_a_policy_with_other_verbs_is_refused(node: LiveNode) -> None:
    with pytest.raises(InputError, match=r"verbs 'core', the node has 'full'"):
        adapter_of(Policy(scores_for(0), False), node).check(node.state)
