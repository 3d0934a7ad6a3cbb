from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmrl.errors import InputError
from mmrl.node.state import new_nodes, new_requests
from mmrl.profiles.registry import get_platform
from mmrl.profiles.schema import save
from mmrl.rollout import rollout
from mmrl.rules import get_rule
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.sampler import EpisodeSampler
from mmrl.scenarios.schema import build_scenario
from mmrl.sim.batch import Sampler
from mmrl.workloads.generators import WorkloadSpec, sample_trace


def data(**more: Any) -> dict[str, Any]:
    """A short scenario as in a file, with two variants that differ in everything that may."""
    variants = [
        {"targets": "sliding", "utilisation_at_load_1": 1.0},
        {"platform": "consumer-pcie4", "prefetch": True, "models": ["qwen2.5-1.5b"] * 3},
    ]
    return {
        "name": "two",
        "platform": "h200",
        "budget_fraction": [0.5, 0.7],
        "fleet": {"size": [2, 4], "choose_from": ["qwen2.5-0.5b", "qwen2.5-7b"], "between": 1},
        "workload": {},
        "targets": "relative",
        "utilisation_at_load_1": 0.7,
        "duration_s": 10,
        "drain_s": 5,
        "variants": variants,
    } | more


def draw(sampler: Sampler, seed: int) -> tuple[Any, Any, Any]:
    node, requests = new_nodes(1)[0], new_requests(1, 5000)[0]
    info = sampler.draw(np.random.default_rng(seed), node, requests)
    return info, node, requests


def test_an_episode_is_one_of_a_variant() -> None:
    scenario = build_scenario(data(), "two")
    mixed = scenario.sampler()
    parts = [EpisodeSampler(part) for part in scenario.parts()]
    assert mixed.max_models == 4
    drawn: Counter[str] = Counter()
    for seed in range(40):
        info, node, requests = draw(mixed, seed)
        drawn[info.platform] += 1
        rng = np.random.default_rng(seed)
        part = parts[int(rng.random() * 2)]
        other, alone = new_nodes(1)[0], new_requests(1, 5000)[0]
        assert part.draw(rng, other, alone) == info  # the same episode, but for the rows of tables
        assert requests.tobytes() == alone.tobytes()
        for m in range(int(node.n_models)):
            row, own = int(node.profile[m]), int(other.profile[m])
            assert np.array_equal(mixed.decode_tables[row], part.decode_tables[own])
            assert np.array_equal(mixed.prefill_tables[row], part.prefill_tables[own])
        assert node.prefetch == (info.platform == "consumer-pcie4")
    assert min(drawn.values()) > 10 and len(drawn) == 2
    assert len(rollout(get_rule("slack"), mixed, [("dev", i) for i in range(4)])) == 4


def test_what_options_may_ask_does_not_depend_on_the_variant_that_is_drawn() -> None:
    sampler = build_scenario(data(variants=[{"load": [1, 3]}, {"load": 1}]), "two").sampler()
    node, requests = new_nodes(1)[0], new_requests(1, sampler.capacity)[0]
    for seed in range(10):
        rng = np.random.default_rng(seed)
        assert sampler.draw(rng, node, requests, {"load": 1.5}).load == 1.5
        for option, message in (
            ({"load": 2.5}, r"load is 2.5, not above 0 and up to 1\.5"),
            ({"lode": 1.0}, "unknown reset option 'lode'"),
            ({"trace": sample_trace(WorkloadSpec(), ("one",), 1.0, 10.0)}, "draws a variant"),
        ):
            with pytest.raises(InputError, match=message):
                sampler.draw(rng, node, requests, option)


def test_two_folders_may_hold_platforms_of_one_name(tmp_path: Path) -> None:
    source = get_platform("consumer-pcie4")
    for folder, usable_bytes in (("roomy", source.usable_bytes), ("tight", 15 * 10**9)):
        (tmp_path / folder).mkdir()
        changes = {"usable_bytes": usable_bytes, "budgets_gb": ()}
        save(tmp_path / folder / "platform.json", source.model_copy(update=changes))
    places = [str(tmp_path / "roomy"), str(tmp_path / "tight")]
    for content in (
        data(variants=[], platform=places),
        data(variants=[{"platform": place} for place in places]),
    ):
        sampler = build_scenario(content, "two").sampler()
        assert len(sampler.bank.platforms) == 2
        assert len(sampler.rows(0)) > len(sampler.rows(1))  # qwen2.5-7b is too large for one
        assert {draw(sampler, seed)[1].profile[0] // 3 for seed in range(20)} == {0, 1}


def test_sizes_between_the_measured_ones_are_drawn() -> None:
    sampler = build_scenario(data(variants=[]), "one").sampler()
    names: set[str] = set()
    for seed in range(40):
        names |= {name.split("#")[0] for name in draw(sampler, seed)[0].model_names}
    assert len(names) == 3 and {"qwen2.5-0.5b", "qwen2.5-7b"} < names


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"verbs": "full"}, "'verbs' cannot vary"),
        ({"colour": 1}, "'colour' cannot vary"),
        ({"load": [2, 1]}, r"variants.0.load.*the lower end comes first"),
        ({"platform": "h201"}, "unknown platform 'h201'"),
    ],
)
def test_wrong_variants_are_explained(variant: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_scenario(data(variants=[variant]), "two").sampler()


def test_the_universal_scenario_is_balanced() -> None:
    scenario = get_scenario("universal")
    for verbs in ("core", "full"):
        part = scenario.model_copy(update={"verbs": verbs, "load": (1.0, 1.0)})
        results = rollout(get_rule("slack"), part.sampler(), [("dev", i) for i in range(120)])
        goodput = np.nanmean([result.metrics["goodput"] for result in results])
        assert 0.84 < goodput < 0.94  # load 1 is where the slack rule reaches .90
