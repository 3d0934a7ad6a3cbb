"""Targets are met or missed as worked by hand; intervals take seeds and episodes into account."""

import numpy as np
import pytest

from mmrl.agents.suite_results import adjust
from mmrl.agents.suite_run import BINS, ttft_counts, ttft_quantile
from mmrl.agents.suite_stats import Bootstrap, interval, p_value
from mmrl.agents.suite_verdicts import verdicts

NAMES = (
    "pooled",
    "cells won",
    "lru",
    "full-swap",
    "slow",
    "consumer",
    "latency",
    "p99",
    "worst model",
    "longest wait",
    "head-room",
    "zero-shot",
)


def pool(name, reference="cell", stronger=True, load=None, **values):
    row = {"pool": name, "policy": "mine", "reference": reference, "stronger": stronger}
    row |= {"load": load, "cells": 8, "platform": name.split()[0]}
    numbers = {
        "goodput": (0.02, 0.01, 0.03),
        "norm_latency": (-0.1, -0.2, 0.1),
        "goodput_worst_model": (0.0, -0.1, 0.1),
        "longest_wait_s": (1.0, 0.0, 2.0),
    } | values
    for key, (estimate, low, high) in numbers.items():
        row |= {key: estimate, f"{key}_low": low, f"{key}_high": high}
    references = {"goodput": 0.9, "norm_latency": 3.0, "goodput_worst_model": 0.8}
    row |= {f"{key}_reference": value for key, value in references.items()}
    return row | {
        "longest_wait_s_reference": 10.0,
        "all_ttft_p99_s": 5.5,
        "all_ttft_p99_s_reference": 5.0,
    }


def judge(pools, compared=(), figures=(), headroom=(), zero_shot=()):
    found = verdicts("mine", pools, compared, figures, headroom, zero_shot)
    assert len(found) == len(NAMES)
    return dict(zip(NAMES, found, strict=True))


def test_each_target_by_hand():
    pools = [
        pool("fast"),
        pool("fast", "once", False, goodput=(0.03, -0.01, 0.04)),  # the weaker comparator
        pool("fast 1", "lru", False, load=1.0, goodput=(0.13, 0.1, 0.2)),
        pool("fast 1", "full-swap", False, load=1.0, goodput=(0.49, 0.4, 0.6)),
        pool("slow", goodput=(-0.002, -0.004, 0.001)),
        pool("consumer", goodput=(0.001, -0.006, 0.01)),
    ]
    found = judge(pools)
    met = {name: row["met"] for name, row in found.items()}
    assert met == {
        "pooled": True,
        "cells won": None,
        "lru": True,  # 13 points of 12
        "full-swap": False,  # 49 points of 50
        "slow": True,  # above -0.5
        "consumer": False,  # -0.6: a small mean with a wide interval
        "latency": True,
        "p99": True,  # 5.5 / 5.0 = 1.10
        "worst model": True,  # 0.8 / 0.8
        "longest wait": True,  # 11 / 10
        "head-room": None,
        "zero-shot": None,
    }
    assert found["p99"]["value"] == pytest.approx(1.1)
    assert judge([])["pooled"]["met"] is None


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"goodput": (0.02, -0.001, 0.04)}, "pooled", 0.02),
        ({"norm_latency": (0.01, -0.1, 0.2)}, "latency", 0.01),
        ({"goodput_worst_model": (-0.13, -0.2, 0.0)}, "worst model", 0.67 / 0.8),
        ({"longest_wait_s": (1.6, 0.0, 2.0)}, "longest wait", 1.16),
    ],
)
def test_a_target_is_missed_just_beyond_its_limit(change, name, value):
    row = judge([pool("fast", **change)])[name]
    assert row["met"] is False and row["value"] == pytest.approx(value)


def test_latency_may_not_be_worse_at_any_load():
    worse = pool("fast 1.3", load=1.3, norm_latency=(0.2, 0.1, 0.3))
    row = judge([pool("fast"), worse])["latency"]
    assert row["met"] is False and "fast 1.3" in row["detail"]


def test_wins_count_where_there_is_head_room():
    """Five cells: three won, one lost, and one without head-room that does not count."""
    gains = {"a": 0.01, "b": 0.02, "c": 0.001, "d": -0.01, "e": -0.01}
    rules = {"a": 0.90, "b": 0.90, "c": 0.90, "d": 0.90, "e": 0.99}
    compared, figures = [], []
    for cell, gain in gains.items():
        about = {"cell": cell, "policy": "mine", "platform": "fast", "group": "core"}
        compared.append(about | {"reference": "once", "rule": "weak", "goodput": 0.3})
        compared.append(about | {"reference": "cell", "rule": "strong", "goodput": gain})
        figures.append({"cell": cell, "policy": "weak", "goodput": 0.5})
        figures.append({"cell": cell, "policy": "strong", "goodput": rules[cell]})
    row = judge([], compared, figures)["cells won"]
    assert (row["met"], row["value"]) == (True, 0.75)
    # Where the future was known it gained next to nothing in c: two of three are left.
    known = [{"place": "c", "policy": "", "headroom": 0.01}]
    row = judge([], compared, figures, known)["cells won"]
    assert (row["met"], row["value"]) == (False, pytest.approx(2 / 3))


def test_half_of_the_head_room():
    row = {"place": "fast", "policy": "mine", "gain": 0.02, "headroom": 0.04, "share": 0.5}
    row |= {"cells": 8, "over_half_low": -0.01, "over_half_high": 0.01}
    assert judge([], headroom=[row])["head-room"]["met"] is True
    assert judge([], headroom=[row | {"share": 0.49}])["head-room"]["met"] is False
    assert judge([], headroom=[row | {"headroom": -0.01}])["head-room"]["met"] is None


def test_what_is_lost_against_a_policy_trained_there():
    row = {"policy": "mine", "against": "there@*-fleet16", "cells": 3, "seeds_against": 2}
    row |= {"goodput": -0.008, "goodput_low": -0.02, "goodput_high": 0.004}
    found = judge([], zero_shot=[row, row | {"policy": "another's", "goodput": -0.5}])["zero-shot"]
    assert found["met"] is True and "there@*-fleet16" in found["detail"]
    assert judge([], zero_shot=[row | {"goodput": -0.012}])["zero-shot"]["met"] is False


def test_holm_within_each_policy_and_reference():
    rows = [
        {"policy": "mine", "reference": "once", "p": 0.01},
        {"policy": "mine", "reference": "once", "p": 0.04},
        {"policy": "mine", "reference": "once", "p": 0.03},
        {"policy": "mine", "reference": "cell", "p": 0.04},
    ]
    adjust(rows)
    # 3 x .01; 2 x .03; then 1 x .04, but no less than the one before
    assert [row["p_holm"] for row in rows] == pytest.approx([0.03, 0.06, 0.06, 0.04])


def test_intervals_hold_what_chance_gives():
    """Seeds that differ widen an interval that many episodes alone make narrow."""
    rng = np.random.default_rng(0)
    episodes = rng.normal(0.0, 0.01, 400)
    seeds = np.array([-0.1, 0.0, 0.1])
    draws = Bootstrap(resamples=2000)
    means = draws.cell_means(0, episodes[:, None] + seeds)
    one = interval(float(episodes.mean()), draws.over_seeds(means[:, 1:2]))
    three = interval(float(episodes.mean()), draws.over_seeds(means))
    expected = 2 * 1.96 * 0.01 / 20  # of a mean of 400
    assert one.high - one.low == pytest.approx(expected, rel=0.1)
    assert three.high - three.low == pytest.approx(2 * 1.96 * np.std(seeds) / 3**0.5, rel=0.2)


def test_an_episode_without_requests_says_nothing():
    columns = np.array([[1.0, np.nan], [1.0, 3.0], [1.0, 3.0]])
    means = Bootstrap(resamples=50).cell_means(0, columns)
    assert (means[:, 0] == 1.0).all()
    assert set(means[:, 1].tolist()) <= {0.0, 3.0} and (means[:, 1] == 3.0).mean() > 0.8
    none = np.zeros(100, np.float32)
    assert p_value([np.array([[np.nan, 0.0, 0.0]])], none, 0) == 1.0
    assert p_value([np.zeros((2, 3))], none, 0) == 1.0


def test_seeds_that_disagree_are_not_sure_however_many_the_episodes():
    episodes = np.random.default_rng(0).normal(0.01, 0.05, 1000)
    agreed, split = np.stack([episodes] * 4), np.stack([episodes, episodes, -episodes, episodes])
    bootstrap = Bootstrap(0)
    found = {}
    for name, matrix in (("agreed", agreed), ("split", split)):
        draws = bootstrap.over_seeds(bootstrap.cell_means(0, matrix.T))
        found[name] = p_value([matrix], draws, 0), interval(float(matrix.mean()), draws).low > 0
    assert found["agreed"][0] < 0.001 and found["agreed"][1]
    assert found["split"][0] > 0.05 and not found["split"][1]


def test_seeds_of_two_sides_are_drawn_apart():
    bootstrap = Bootstrap(0)
    means = np.tile(np.array([0.0, 0.02], np.float32), (bootstrap.resamples, 1))
    draws = bootstrap.over_seeds(means) - bootstrap.over_seeds(means, side=1)
    assert np.quantile(draws, [0.025, 0.975]) == pytest.approx([-0.02, 0.02])


def test_ttft_quantiles_are_right_to_a_percent():
    values = np.random.default_rng(0).lognormal(0, 2, 5000).astype(np.float32)
    counts = ttft_counts(values)
    assert counts.sum() == 5000 and len(counts) == BINS
    assert ttft_quantile(counts, 0.99) == pytest.approx(np.quantile(values, 0.99), rel=0.02)
    assert np.isnan(ttft_quantile(np.zeros(BINS, np.int64), 0.99))
