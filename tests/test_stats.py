"""Statistics against small cases worked by hand, and properties that must hold for any data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrl.stats import (
    Interval,
    bootstrap,
    holm,
    improvements,
    iqm,
    sign_flip_p,
)

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30)


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm([100, 1, 2, 3, 4, 5, 6, -50]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert iqm([1, 2, 6]) == pytest.approx(3)  # floor(3 / 4) = 0: nothing is cut off
    assert iqm([[0, 1, 3, 9], [4, 4, 4, 4]]) == pytest.approx([2, 4])


def test_bootstrap_of_two_values_by_hand():
    # Means of two draws of {0, 1}: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    assert bootstrap([[0.0, 1.0]], confidence=0.4) == Interval(0.5, 0.5, 0.5)
    assert bootstrap([[0.0, 1.0]], confidence=0.95) == Interval(0.5, 0.0, 1.0)


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap([[0.25] * 9]) == Interval(0.25, 0.25, 0.25)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [bootstrap([rng.normal(2, 1, 40)], seed=k, resamples=500) for k in range(300)]
    covered = np.mean([interval.low <= 2 <= interval.high for interval in intervals])
    assert 0.89 <= covered <= 0.98


def test_strata_weigh_the_same_whatever_their_size():
    assert bootstrap([[1.0] * 50, [3.0]]).estimate == 2.0


def test_same_seed_same_interval_and_batches_do_not_matter(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap([values], iqm, seed=3)
    assert bootstrap([values], iqm, seed=3) == whole
    assert bootstrap([values], iqm, seed=4) != whole
    monkeypatch.setattr("mmrl.stats.BATCH_VALUES", 1000)
    assert bootstrap([values], iqm, seed=3) == whole


@pytest.mark.parametrize("strata", [[], [[]], [[1.0, np.nan]]])
def test_bootstrap_refuses_what_has_no_mean(strata):
    with pytest.raises(ValueError, match="stratum"):
        bootstrap(strata)


@given(VALUES)
def test_interval_holds_within_the_range_of_the_values(values):
    interval = bootstrap([values], resamples=200)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_probability_of_improvement_pairs_episodes_and_halves_ties():
    assert improvements([1, 2, 3, 4], [0, 2, 4, 1]).mean() == pytest.approx(2.5 / 4)
    # Unpaired, each of ours would beat half of theirs; paired, all of them win.
    assert improvements([1, 2, 3], [0, 1, 2]).mean() == 1.0


@given(VALUES, VALUES)
def test_improvement_one_way_is_the_loss_of_the_other(ours, theirs):
    n = min(len(ours), len(theirs))
    one = improvements(ours[:n], theirs[:n]).mean()
    assert one + improvements(theirs[:n], ours[:n]).mean() == pytest.approx(1)


def test_sign_flip_of_all_positive_differences():
    # Exactly: all 2^5 sign patterns are enumerated, two of them are as extreme.
    assert sign_flip_p([1, 1, 2, 3, 4]) == pytest.approx(2 / 32)
    assert sign_flip_p([0, 0, 0]) == sign_flip_p([5]) == 1.0
    assert sign_flip_p(np.random.default_rng(0).normal(1, 1, 100)) < 0.001


def test_holm_by_hand():
    # Sorted .01 .03 .04 times 3, 2, 1: .03 .06 .04, made not to fall: .03 .06 .06.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert holm([0.02]) == pytest.approx([0.02])
