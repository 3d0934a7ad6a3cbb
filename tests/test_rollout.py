"""Episodes are paired, do not depend on how they are batched, and rank rules as they should."""

from typing import Any

import numpy as np
import pytest

from mmrl.rollout import BATCH, rollout
from mmrl.rules import get_rule
from mmrl.scenarios.registry import get_scenario

DEV = [("dev", i) for i in range(6)]


@pytest.fixture(scope="module")
def sampler() -> Any:
    return get_scenario("demo", load=1.0, utilisation_at_load_1=1.8).sampler()


def goodput(results: Any) -> float:
    return float(np.mean([result.metrics["goodput"] for result in results]))


def test_the_champion_beats_what_it_should(sampler: Any) -> None:
    reached = {
        n: goodput(rollout(get_rule(n), sampler, DEV)) for n in ("slack", "lru", "full-swap")
    }
    assert reached["slack"] > reached["lru"] + 0.02 > reached["full-swap"] + 0.04


def test_every_policy_meets_the_same_requests(sampler: Any) -> None:
    one = rollout(get_rule("slack"), sampler, DEV)
    other = rollout(get_rule("static"), sampler, DEV)
    assert [a.info for a in one] == [b.info for b in other]
    assert [(a.split, a.index) for a in one] == DEV
    assert any(a.metrics.values != b.metrics.values for a, b in zip(one, other, strict=True))


def test_an_episode_does_not_depend_on_its_company(sampler: Any) -> None:
    assert BATCH % 3 == 2
    many = rollout(get_rule("lru"), sampler, [("dev", i % 3) for i in range(BATCH + 2)])
    (alone,) = rollout(get_rule("lru"), sampler, [("dev", 2)])
    assert many[2].metrics.values == alone.metrics.values == many[BATCH].metrics.values


def test_a_function_that_follows_the_champion_does_what_the_champion_does(sampler: Any) -> None:
    champion = get_rule("slack")

    def follow(observations: Any, masks: Any) -> Any:
        suggested = observations[:, -masks.shape[1] :].argmax(axis=1)
        assert masks[np.arange(len(masks)), suggested].all()
        return suggested

    by_function = rollout(follow, sampler, DEV[:3], dispatch="edf", champion=champion)
    by_rule = rollout(champion, sampler, DEV[:3])
    for a, b in zip(by_function, by_rule, strict=True):
        assert a.metrics.values == b.metrics.values


def test_requests_without_room_are_told(sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "capacity", 10)
    with pytest.warns(RuntimeWarning, match=r"requests were left out: .* more than the 10 that"):
        (result,) = rollout(get_rule("slack"), sampler, DEV[:1])
    assert result.info.requests == 10


def test_no_episodes_no_results(sampler: Any) -> None:
    assert rollout(get_rule("lru"), sampler, []) == []
