import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmrl.errors import InputError
from mmrl.workloads.describe import describe
from mmrl.workloads.generators import WorkloadSpec, generate, sample_trace

FLEET = ("a", "b", "c", "d")


def spec(**sections):
    return WorkloadSpec.model_validate(sections)


RICH = {
    "arrivals": {"kind": ["poisson", "gamma", "onoff"], "cv": [1, 8]},
    "popularity": {"zipf": [0.5, 2.1], "order": "random", "drift_period_s": 7},
    "lengths": {"family": "mixed"},
}


def test_pinned_keeps_a_file_of_lengths_for_its_family_alone(tmp_path):
    for families in (["chat", "empirical"], ["empirical", "chat"], "empirical"):
        lengths = {"family": families, "file": tmp_path / "lengths.csv"}
        pinned = spec(lengths=lengths).pinned().lengths
        assert pinned.family == (families if families == "empirical" else families[0])
        assert (pinned.file is not None) == (pinned.family == "empirical")


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))


def sample(rng, workload, rate=20.0, duration_s=60.0, capacity=0):
    return generate(rng, rate * workload.shares, workload, duration_s, capacity)


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [
        ({"kind": "poisson"}, 1.0),
        ({"kind": "gamma", "cv": 0.5}, 0.5),
        ({"kind": "gamma", "cv": 2}, 2.0),
        ({"kind": "gamma", "cv": 4}, 4.0),
    ],
)
def test_rate_and_cv_are_as_asked(arrivals, cv):
    trace = sample_trace(spec(arrivals=arrivals), ("a",), 10.0, 20_000.0, seed=1)
    (summary,) = describe(trace)
    assert summary.rate_per_s == pytest.approx(10, rel=0.05)
    assert summary.cv == pytest.approx(cv, rel=0.08)


def test_poisson_counts_are_neither_bursty_nor_regular():
    (summary,) = describe(sample_trace(spec(), ("a",), 10.0, 20_000.0, seed=2))
    assert summary.dispersion == pytest.approx((1, 1, 1), rel=0.15)


def test_on_off_keeps_the_mean_rate_and_is_silent_between_phases():
    arrivals = {"kind": "onoff", "on_s": 5, "off_ratio": 4}
    trace = sample_trace(spec(arrivals=arrivals), ("a",), 20.0, 20_000.0, seed=3)
    assert trace.rate_per_s == pytest.approx(20, rel=0.05)
    per_second = np.bincount(trace.arrival_ns // 10**9, minlength=20_000)
    # On for 1/5 of the time at 100/s; a second without arrivals is all but surely off.
    assert (per_second > 0).mean() == pytest.approx(0.2, abs=0.05)
    assert np.median(per_second[per_second > 0]) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("arrivals", [{"kind": "gamma", "cv": 6}, {"kind": "onoff"}])
def test_the_first_seconds_are_as_busy_as_the_rest(arrivals):
    workload_spec = spec(arrivals=arrivals)
    rng = np.random.default_rng(4)
    counts = np.zeros(2)
    for _ in range(3000):
        arrival_ns = sample(rng, workload_spec.draw(rng, 1), 1.0, 20.0).arrival_ns
        counts += (arrival_ns < 2e9).sum() / 2, (arrival_ns >= 2e9).sum() / 18
    assert counts / 3000 == pytest.approx([1, 1], rel=0.15)


def test_popularity_follows_zipf_or_the_shares():
    trace = sample_trace(spec(popularity={"zipf": 1.5}), FLEET, 50.0, 1000.0)
    weights = np.arange(1, 5) ** -1.5
    assert trace.counts / len(trace) == pytest.approx(weights / weights.sum(), rel=0.1)
    trace = sample_trace(spec(popularity={"shares": [1, 2, 3, 4]}), FLEET, 50.0, 1000.0)
    assert trace.counts / len(trace) == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=0.1)


def test_drift_deals_the_rates_anew_and_keeps_their_sum():
    popularity = {"shares": [97, 1, 1, 1], "drift_period_s": 100}
    trace = sample_trace(spec(popularity=popularity), FLEET, 20.0, 2000.0, seed=5)
    counts = np.zeros((20, 4))
    np.add.at(counts, (trace.arrival_ns // (100 * 10**9), trace.model), 1)
    assert counts[0].argmax() == 0
    assert set(counts.argmax(axis=1)) == {0, 1, 2, 3}
    assert counts.max(axis=1).min() > 0.9 * 20 * 100
    assert trace.rate_per_s == pytest.approx(20, rel=0.05)


def test_a_gap_goes_on_across_changes_of_the_rate():
    sections = {"arrivals": {"kind": "gamma", "cv": 0.3}, "popularity": {"drift_period_s": 1}}
    trace = sample_trace(spec(**sections), ("a", "b"), 0.6, 20_000.0, seed=5)
    assert trace.rate_per_s == pytest.approx(0.6, rel=0.03)


@given(seed=st.integers(0, 2**32), models=st.integers(1, 9), rate=st.floats(0.1, 50))
def test_every_sample_is_a_valid_trace_and_repeats(seed, models, rate):
    names = tuple(f"m{i}" for i in range(models))
    trace = sample_trace(spec(**RICH), names, rate, 30.0, seed)  # validated when made
    again = sample_trace(spec(**RICH), names, rate, 30.0, seed)
    for field in ("arrival_ns", "model", "prompt_tokens", "output_tokens", "batch_work"):
        assert np.array_equal(getattr(trace, field), getattr(again, field))
    assert (trace.prompt_tokens + trace.output_tokens <= 8192).all()
    ties = np.diff(trace.arrival_ns) == 0
    assert (np.diff(trace.model)[ties] >= 0).all()


def test_one_generator_goes_on_and_never_repeats_an_episode():
    rng = np.random.default_rng(0)
    workload = spec(**RICH).draw(rng, 4)
    assert not same(sample(rng, workload), sample(rng, workload))


def test_capacity_keeps_the_earliest_and_counts_the_rest():
    workload = spec(**RICH).draw(np.random.default_rng(6), 4)
    everything = sample(np.random.default_rng(7), workload)
    some = sample(np.random.default_rng(7), workload, capacity=100)
    assert len(some.arrival_ns) == 100
    assert some.dropped == len(everything.arrival_ns) - 100
    assert everything.dropped == 0
    assert np.array_equal(some.arrival_ns, everything.arrival_ns[:100])


def test_ranges_are_drawn_within_and_fixed_numbers_stay():
    workload_spec = spec(
        arrivals={"kind": "gamma", "cv": [2, 4]}, popularity={"drift_period_s": [10, 20]}
    )
    rng = np.random.default_rng(8)
    draws = [workload_spec.draw(rng, 3) for _ in range(200)]
    cvs = np.array([draw.gap_shape for draw in draws]) ** -0.5
    assert 2 <= cvs.min() < 2.1
    assert 3.9 < cvs.max() <= 4
    assert all(10 <= draw.drift_period_s <= 20 for draw in draws)
    assert all(np.array_equal(draw.shares, draws[0].shares) for draw in draws)


def test_families_are_dealt_in_fleet_order():
    lengths = {"family": ["batch", "code"], "assign": "fleet"}
    trace = sample_trace(spec(lengths=lengths), FLEET, 50.0, 200.0)
    assert np.array_equal(trace.batch_work, trace.model % 2 == 0)
    assert np.median(trace.output_tokens[trace.model == 1]) < 20


def test_plain_python_gives_the_same_bits():
    code = """
import json, sys
import numpy as np
from mmrl.workloads.generators import WorkloadSpec, generate
spec = WorkloadSpec.model_validate(json.loads(sys.argv[1]))
rng = np.random.default_rng(9)
workload = spec.draw(rng, 6)
arrivals = generate(rng, 5.0 * workload.shares, workload, 60.0, 0)
print(json.dumps([array.tolist() for array in arrivals[:5]]))
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(RICH)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    rng = np.random.default_rng(9)
    compiled = sample(rng, spec(**RICH).draw(rng, 6), 5.0)
    assert len(compiled.arrival_ns) > 50
    assert [array.tolist() for array in compiled[:5]] == json.loads(done.stdout)


def test_a_specification_comes_back_from_what_it_writes():
    one = spec(**RICH)
    assert spec(**one.model_dump(mode="json")) == one
    assert one.model_dump(mode="json", exclude_defaults=True) == RICH


@pytest.mark.parametrize(
    "sections",
    [
        {"arrivals": {"kind": "bursty"}},
        {"arrivals": {"cv": [4, 2]}},
        {"arrivals": {"cv": 100}},
        {"arrivals": {"cv": float("nan")}},
        {"arrivals": {"speed": 1}},
        {"popularity": {"shares": [1, 0]}},
        {"popularity": {"drift_period_s": [0, 10]}},
        {"lengths": {"family": "empirical"}},
        {"lengths": {"file": "lengths.csv"}},
        {"lengths": {"family": []}},
    ],
)
def test_bad_specifications_are_refused(sections):
    with pytest.raises(ValidationError):
        spec(**sections)


def test_unknown_family_suggests_the_nearest():
    with pytest.raises(ValidationError, match="did you mean 'chat'"):
        spec(lengths={"family": "chatt"})


def test_shares_must_suit_the_fleet():
    with pytest.raises(InputError, match="2 popularity shares for a fleet of 4"):
        sample_trace(spec(popularity={"shares": [1, 2]}), FLEET, 1.0, 1.0)


@pytest.mark.parametrize(("rate", "duration_s"), [(0, 1), (1, -1), (float("nan"), 1)])
def test_rate_and_duration_must_be_positive(rate, duration_s):
    with pytest.raises(InputError, match="not a positive number"):
        sample_trace(spec(), FLEET, rate, duration_s)
