import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrl.errors import InputError
from mmrl.workloads.describe import describe
from mmrl.workloads.fleet import dilate, fit_to_fleet, thin
from mmrl.workloads.generators import WorkloadSpec, sample_trace


def services(names=("x", "y", "z"), rate=10.0, duration_s=200.0, seed=0, **arrivals):
    """Make a trace whose services have shares 1:4:2."""
    spec = WorkloadSpec.model_validate(
        {"arrivals": arrivals, "popularity": {"shares": [1, 4, 2][: len(names)]}}
    )
    return sample_trace(spec, tuple(names), rate, duration_s, seed)


@given(rate=st.floats(0.001, 1e4), seed=st.integers(0, 20))
def test_dilation_conserves_requests_and_reaches_the_rate(rate, seed):
    trace = services(duration_s=20.0, seed=seed)
    dilated = dilate(trace, rate)
    assert dilated.rate_per_s == pytest.approx(rate)
    for field in ("model", "prompt_tokens", "output_tokens", "batch_work"):
        assert np.array_equal(getattr(dilated, field), getattr(trace, field))
    factor = trace.rate_per_s / rate
    assert np.abs(dilated.arrival_ns - trace.arrival_ns * factor).max() <= 2


def test_dilation_keeps_bursts_and_thinning_destroys_them():
    trace = services(("x",), rate=50.0, duration_s=2000.0, kind="gamma", cv=4)
    burstiness = [describe(t)[0].cv for t in (trace, dilate(trace, 2.0), thin(trace, 2.0))]
    assert burstiness[1] == pytest.approx(burstiness[0], rel=0.001)
    assert burstiness[2] < burstiness[0] / 2


def test_thinning_keeps_lengths_and_popularity():
    trace = services(rate=100.0, duration_s=400.0)
    thinned = thin(trace, 25.0, seed=1)
    assert thinned.rate_per_s == pytest.approx(25, rel=0.05)
    assert thinned.duration_s == trace.duration_s
    assert set(thinned.arrival_ns) <= set(trace.arrival_ns)
    assert thinned.counts / len(thinned) == pytest.approx(trace.counts / len(trace), rel=0.1)
    levels = [0.1, 0.5, 0.9]
    assert np.quantile(thinned.prompt_tokens, levels) == pytest.approx(
        np.quantile(trace.prompt_tokens, levels), rel=0.1
    )
    assert "thinning destroys bursts" in thinned.notes[-1]


def test_services_go_to_models_by_popularity():
    trace = services()
    fitted = fit_to_fleet(trace, ["big", "small"])
    assert fitted.model_names == ("big", "small")
    assert fitted.counts.tolist() == [trace.counts[1], trace.counts[2]]
    left_out = trace.counts[0]
    assert fitted.notes[-1] == (
        "mapped services by popularity: big = y, small = z; "
        f"{left_out:,} requests of the other services left out"
    )


def test_names_go_to_the_model_of_that_name():
    trace = services()
    fitted = fit_to_fleet(trace, ["z", "other", "y", "x"])
    assert fitted.counts.tolist() == [trace.counts[2], 0, trace.counts[1], trace.counts[0]]
    with pytest.raises(InputError, match="model 'x', which is not in the fleet"):
        fit_to_fleet(trace, ["y", "z"])


@given(models=st.integers(1, 9), seed=st.integers(0, 20))
def test_segments_of_one_service_use_every_request_once(models, seed):
    trace = services(("x",), duration_s=50.0, seed=seed)
    names = [f"m{i}" for i in range(models)]
    fitted = fit_to_fleet(trace, names, mapping="segments")
    assert fitted.duration_s == pytest.approx(50 / models)
    edges = np.ceil(50e9 / models) * np.arange(models + 1)
    assert fitted.counts.tolist() == np.histogram(trace.arrival_ns, edges)[0].tolist()
    assert fitted.prompt_tokens.sum() == trace.prompt_tokens.sum()


def test_segments_of_two_services_stay_apart():
    trace = services(("x", "y"))
    fitted = fit_to_fleet(trace, ["a", "b", "c", "d"])
    half = trace.arrival_ns < 100 * 10**9
    y, x = trace.model == 1, trace.model == 0  # y is the more popular one
    assert fitted.counts.tolist() == [
        (y & half).sum(),
        (x & half).sum(),
        (y & ~half).sum(),
        (x & ~half).sum(),
    ]
    assert "cut 2 services into 2 segments of 100.0 s" in fitted.notes[-1]


def test_a_window_and_a_rate():
    fitted = fit_to_fleet(services(), ["a", "b"], rate_per_s=3.0, window=(50.0, 100.0))
    assert fitted.rate_per_s == pytest.approx(3)
    assert [note.split()[0] for note in fitted.notes] == [
        "generated:",
        "window",
        "mapped",
        "rescaled",
    ]
    assert fit_to_fleet(services(), ["a"], window=(150.0, None)).duration_s == 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mapping": "service"}, "did you mean 'services'"),
        ({"rescale": "thinning"}, "did you mean 'thin'"),
        ({"rate_per_s": -1.0}, "rate_per_s is -1"),
        ({"rate_per_s": 1e3, "rescale": "thin"}, "use time dilation"),
        ({"window": (500.0, 10.0)}, "not within the trace"),
        ({"window": (0.0, 1e-9)}, "holds no requests"),
        ({"mapping": "services"}, "3 services for 4 models"),
        ({"mapping": "names"}, "'y', which is not in the fleet|'x', which"),
    ],
)
def test_what_cannot_be_done(settings, message):
    with pytest.raises(InputError, match=message):
        fit_to_fleet(services(), ["a", "b", "c", "d"], **settings)
