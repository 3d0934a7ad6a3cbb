from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.errors import InputError
from mmrl.workloads.readers import read_trace
from mmrl.workloads.trace import ARRAY_TYPES, Trace


def trace_of(rows, names=("a", "b"), duration_s=10.0, notes=()):
    """Make a trace of rows (arrival_s, model, prompt, output, batch)."""
    columns = list(zip(*rows, strict=True)) or [()] * 5
    arrival_ns = np.rint(np.array(columns[0], np.float64) * 1e9)
    return Trace(
        arrival_ns.astype(np.int64),
        *(
            np.array(column, dtype)
            for column, dtype in zip(columns[1:], list(ARRAY_TYPES.values())[1:], strict=True)
        ),
        model_names=tuple(names),
        duration_s=duration_s,
        notes=notes,
    )


ROWS = [(0.5, 0, 10, 20, False), (0.5, 1, 30, 40, True), (4.0, 1, 50, 60, False)]


def assert_same(one, other):
    for field in ARRAY_TYPES:
        assert np.array_equal(getattr(one, field), getattr(other, field)), field
    assert one.model_names == other.model_names
    assert one.duration_s == other.duration_s
    assert one.notes == other.notes


def test_rate_and_counts():
    trace = trace_of(ROWS)
    assert len(trace) == 3
    assert trace.rate_per_s == pytest.approx(0.3)
    assert trace.counts.tolist() == [1, 2]


def test_long_requests_are_left_out_and_counted():
    trace = trace_of(ROWS)
    assert trace.without_longer(110) is trace
    short = trace.without_longer(109)
    assert short.tokens.tolist() == [30, 70] and short.duration_s == trace.duration_s
    assert short.notes == ("left out 1 of 3 requests: over the limit of 109 tokens",)
    by_model = trace.without_longer(np.array([29, 70]))
    assert by_model.tokens.tolist() == [70]
    assert "over the limit of 29 to 70 tokens" in by_model.notes[0]
    with pytest.raises(InputError, match="no request is within the limit of 29 tokens"):
        trace.without_longer(29)


def test_slice_moves_the_zero_and_says_so():
    part = trace_of(ROWS).slice(0.5, 4.0)
    assert part.arrival_ns.tolist() == [0, 0]
    assert part.duration_s == 3.5
    assert part.notes == ("window 0.5 to 4 s: 2 of 3 requests kept",)


@pytest.mark.parametrize("window", [(-1, 2), (2, 2), (0, 11), (float("nan"), 2)])
def test_slice_outside_is_refused(window):
    with pytest.raises(InputError, match="it lasts 10 s"):
        trace_of(ROWS).slice(*window)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_ns": np.array([2, 1, 3])}, "request 1: arrival_ns is before"),
        ({"arrival_ns": np.array([-1, 1, 3])}, "request 0: arrival_ns is negative"),
        ({"duration_s": 4.0}, "request 2: arrival_ns is after the end"),
        ({"duration_s": float("nan")}, "duration_s"),
        ({"model": np.array([0, 2, 1], np.int32)}, "request 1: model"),
        ({"prompt_tokens": np.array([1, 0, 1], np.int32)}, "request 1: prompt_tokens"),
        ({"output_tokens": np.array([1, 1, -5], np.int32)}, "request 2: output_tokens"),
        ({"output_tokens": np.array([1, 1], np.int32)}, "output_tokens is int32"),
        ({"model": np.array([0, 1, 1])}, "model is int64"),
        ({"model_names": ("a", "a")}, "not unique"),
        ({"model_names": ("a", " b")}, "not a model name"),
    ],
)
def test_each_invariant_is_held(changes, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        replace(trace_of(ROWS), **changes)


names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
rows = st.tuples(
    st.integers(0, 10**16 - 1),
    st.integers(0, 2),
    st.integers(1, 2**24),
    st.integers(1, 2**24),
    st.booleans(),
)


@settings(max_examples=30)
@given(
    rows=st.lists(rows, min_size=1, max_size=20),
    fleet=st.lists(names, min_size=3, max_size=3, unique=True),
    notes=st.lists(st.text(max_size=20), max_size=3),
    more_s=st.floats(0, 1e6),
)
def test_our_csv_comes_back_exactly(tmp_path_factory, rows, fleet, notes, more_s):
    rows.sort()
    columns = [np.array(c) for c in zip(*rows, strict=True)]
    arrays = [c.astype(t) for c, t in zip(columns, ARRAY_TYPES.values(), strict=True)]
    trace = Trace(*arrays, tuple(fleet), 1e7 + more_s, tuple(notes))
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    trace.to_csv(path)
    assert_same(read_trace([path]), trace)


def test_csv_by_hand(tmp_path):
    path = tmp_path / "trace.csv"
    trace_of(ROWS, notes=("made by hand",)).to_csv(path)
    assert path.read_text() == (
        '# {"models": ["a", "b"], "duration_s": 10.0, "notes": ["made by hand"]}\n'
        "arrival_s,model,prompt_tokens,output_tokens,class\n"
        "0.500000000,a,10,20,interactive\n"
        "0.500000000,b,30,40,batch\n"
        "4.000000000,b,50,60,interactive\n"
    )
