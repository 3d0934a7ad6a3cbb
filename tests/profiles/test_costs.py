"""The cost model: exact at what was measured, monotone, never faster than physics."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrl.profiles import registry
from mmrl.profiles.costs import (
    CONTEXT_KNOTS,
    CONTEXT_STEP_TOKENS,
    DECODE_BATCHES,
    PREFILL_KNOTS,
    PREFILL_STEP_TOKENS,
    CostModel,
    decode_ns,
    prefill_chunk_ns,
)
from mmrl.profiles.schema import DecodePoint, Overhead, Profile, TokenPoint


def without_overhead(platform: str, model: str) -> Profile:
    """Return a shipped profile as if its loop took no time: its points are then its prices."""
    return registry.get_profile(platform, model).model_copy(update={"overhead": None})


PAIRS = [(p, m) for p in registry.platforms() for m in registry.models(p)]
MODELS = {pair: CostModel(without_overhead(*pair)) for pair in PAIRS}
DECODE_TABLES = {pair: costs.decode_table() for pair, costs in MODELS.items()}
PREFILL_TABLES = {pair: costs.prefill_table() for pair, costs in MODELS.items()}

pairs = st.sampled_from(PAIRS)
batches = st.integers(1, DECODE_BATCHES)
contexts = st.integers(0, 40_000)
prompts = st.integers(1, 40_000)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the Python source of a compiled function (itself where compiling is off)."""
    return cast(Callable[..., Any], getattr(function, "py_func", function))


def with_decode(points: list[tuple[int, int, float]]) -> CostModel:
    profile = without_overhead("h200", "qwen2.5-7b")
    decode = [DecodePoint(batch=b, context_tokens=c, time_s=t) for b, c, t in points]
    return CostModel(profile.model_copy(update={"decode": tuple(decode)}))


def with_prefill(points: list[tuple[int, float]]) -> CostModel:
    profile = without_overhead("h200", "qwen2.5-7b")
    prefill = tuple(TokenPoint(tokens=n, time_s=t) for n, t in points)
    return CostModel(profile.model_copy(update={"prefill": prefill}))


@pytest.mark.parametrize("pair", PAIRS)
def test_exact_at_the_points(pair: tuple[str, str]) -> None:
    costs = MODELS[pair]
    for point in costs.profile.decode:
        predicted = costs.decode_s(point.batch, point.context_tokens)
        assert predicted == pytest.approx(point.time_s, rel=1e-9)
    for at in costs.profile.prefill:
        assert costs.prefill_s(at.tokens) == pytest.approx(at.time_s, rel=1e-9)
    for at in costs.profile.streamed_layer_s:
        assert costs.stream_layer_s(at.tokens) == pytest.approx(at.time_s)


def test_a_step_linear_in_total_tokens_is_found_from_two_points() -> None:
    # 5 ms + 1 us per KV token of the whole batch
    costs = with_decode([(1, 1000, 0.006), (8, 1000, 0.013)])
    assert costs.decode_s(4, 1000) == pytest.approx(0.009)
    assert costs.decode_s(4, 5000) == pytest.approx(0.025)
    assert costs.decode_s(32, 2000) == pytest.approx(0.069)


@given(st.integers(1, 64), st.integers(0, 32_000))
def test_a_full_grid_of_a_bilinear_step_is_reproduced(batch: int, context: int) -> None:
    def truth(b: int, c: int) -> float:
        return 0.005 + 50e-6 * b + 1e-7 * b * c

    grid = [(b, c, truth(b, c)) for b in (1, 4, 16, 64) for c in (128, 1024, 8192)]
    assert with_decode(grid).decode_s(batch, context) == pytest.approx(truth(batch, context))


def test_a_bent_grid_is_exact_at_its_points_and_linear_between() -> None:
    grid = [(b, c, 0.01 + 1e-4 * b + 1e-6 * c**1.2) for b in (1, 8) for c in (100, 1000, 4000)]
    costs = with_decode(grid)
    for batch, context, time_s in grid:
        assert costs.decode_s(batch, context) == pytest.approx(time_s, rel=1e-9)
    between = (costs.decode_s(1, 1000) + costs.decode_s(1, 4000)) / 2
    assert costs.decode_s(1, 2500) == pytest.approx(between)


def test_a_batch_measured_once_takes_the_rise_of_the_nearest_row() -> None:
    rows = [(1, 1000, 0.006), (1, 3000, 0.008), (8, 1000, 0.013), (8, 3000, 0.029)]
    costs = with_decode([*rows, (16, 1000, 0.025)])
    assert costs.decode_s(16, 1000) == pytest.approx(0.025)
    assert costs.decode_s(16, 3000) == pytest.approx(0.025 + 2 * 0.016)
    assert costs.decode_s(12, 1000) == pytest.approx(0.019)


def test_measured_noise_never_makes_a_longer_job_faster() -> None:
    costs = with_decode([(1, 512, 0.0075), (1, 1024, 0.0074), (8, 512, 0.0074), (8, 1024, 0.011)])
    table = costs.decode_table()[1:]
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()


@given(pairs, batches, contexts, st.integers(0, 8), st.integers(0, 4000))
def test_decode_rises_with_batch_and_context(
    pair: tuple[str, str], batch: int, context: int, more: int, longer: int
) -> None:
    costs = MODELS[pair]
    bigger = costs.decode_s(batch + more, context + longer)
    assert bigger >= costs.decode_s(batch, context) * (1 - 1e-12)


@given(pairs, prompts, st.integers(0, 4000))
def test_prefill_rises_with_tokens(pair: tuple[str, str], tokens: int, more: int) -> None:
    costs = MODELS[pair]
    assert costs.prefill_s(tokens + more) >= costs.prefill_s(tokens) * (1 - 1e-12)
    assert costs.prefill_s(tokens) >= costs.prefill_s(0) > 0


@given(pairs, batches, st.integers(0, 10**6), st.integers(1, 10**6))
def test_nothing_is_faster_than_the_hardware(
    pair: tuple[str, str], batch: int, context: int, tokens: int
) -> None:
    costs = MODELS[pair]
    architecture, limits = costs.profile.architecture, costs.profile.limits
    weights = architecture.layers * costs.profile.layer_bytes
    kv = batch * context * costs.profile.kv_bytes_per_token
    assert costs.decode_s(batch, context) >= (weights + kv) / limits.memory_bytes_per_s
    flop = 2 * architecture.layers * architecture.layer_parameters * tokens
    assert costs.prefill_s(tokens) >= flop / limits.compute_flop_per_s


def test_the_bound_takes_over_where_the_points_are_flat() -> None:
    costs = with_decode([(1, 512, 0.02), (8, 512, 0.02)])
    read = costs.profile.architecture.read_bytes + 64 * 32_000 * 57_344
    assert costs.decode_s(64, 32_000) == pytest.approx(read / 4.8e12)


def test_a_row_that_ends_early_goes_on_between_its_neighbours() -> None:
    full = [(b, c, 0.01 + 1e-4 * b + 1e-8 * b * c) for b in (1, 64) for c in (1000, 4000, 16000)]
    costs = with_decode([*full, (48, 1000, 0.0151), (48, 4000, 0.0185)])  # steeper than the others
    for batch, context, time_s in full:
        assert costs.decode_s(batch, context) == pytest.approx(time_s, rel=1e-9)
    assert costs.decode_s(48, 16000) == pytest.approx(costs.decode_s(64, 16000))  # not above
    flatter = with_decode([*full, (48, 1000, 0.0151), (48, 4000, 0.0161)])
    assert flatter.decode_s(48, 16000) == pytest.approx(0.0161 + 4 * 0.001)


def test_short_prompts_take_the_launch_floor() -> None:
    floor = 0.0193
    costs = with_prefill([(128, floor), (1024, 0.0291), (4096, 0.124)])
    assert costs.prefill_table()[0] == costs.prefill_s(1) == costs.prefill_s(128) == floor
    # 1,024 tokens take 29.1 ms, so computing 512 takes about 14.5: hidden by the launches
    assert costs.prefill_s(512) == floor
    assert floor < costs.prefill_s(900) < costs.profile.prefill[1].time_s


@given(pairs, st.integers(0, 30_000), st.integers(1, 4096))
def test_a_chunk_costs_what_it_adds(pair: tuple[str, str], start: int, tokens: int) -> None:
    costs = MODELS[pair]
    chunk = costs.chunk_s(start, tokens)
    assert chunk >= costs.prefill_s(tokens)
    assert costs.prefill_s(start) + chunk >= costs.prefill_s(start + tokens) * (1 - 1e-12)
    assert costs.chunk_s(0, tokens) == costs.prefill_s(tokens)


def test_transfers() -> None:
    costs = MODELS["consumer-pcie4", "llama3.2-3b"]
    assert costs.load_s(5e9) == pytest.approx(0.202)
    assert costs.kv_save_s(1e9) == costs.kv_restore_s(1e9) == pytest.approx(0.04015)
    assert costs.host_layer_s() is None
    measured = MODELS["h200", "qwen2.5-7b"]
    assert measured.host_layer_s(1) == pytest.approx(measured.profile.host_layer_s[0].time_s)


@given(pairs, st.integers(1, 3000), st.integers(1, 60))
def test_isolated_latency_is_prefill_and_steps(
    pair: tuple[str, str], prompt: int, output: int
) -> None:
    costs = MODELS[pair]
    steps = [costs.decode_s(1, prompt + k) for k in range(1, output)]
    expected = costs.prefill_s(prompt) + sum(steps)
    assert costs.isolated_latency_s(prompt, output) == pytest.approx(expected)


def test_isolated_latency_of_many() -> None:
    costs = MODELS["h200", "qwen2.5-7b"]
    many = costs.isolated_latency_s([10, 500], [1, 20])
    assert many.tolist() == [
        pytest.approx(costs.prefill_s(10)),
        pytest.approx(float(costs.isolated_latency_s(500, 20))),
    ]


def test_what_the_loop_adds_is_part_of_every_price() -> None:
    profile = without_overhead("h200", "qwen2.5-7b")
    alone = CostModel(profile)
    added = Overhead(decode_s=1e-3, prefill_s=2e-3, kv_s=3e-3)
    costs = CostModel(profile.model_copy(update={"overhead": added}))
    assert costs.decode_s(3, 700) == pytest.approx(alone.decode_s(3, 700) + 1e-3)
    assert costs.prefill_s(300) == pytest.approx(alone.prefill_s(300) + 2e-3)
    more = costs.isolated_latency_s(300, 5) - alone.isolated_latency_s(300, 5)
    assert more == pytest.approx(2e-3 + 4 * 1e-3)
    assert costs.decode_table()[1:] == pytest.approx(alone.decode_table()[1:] + 1e-3)
    assert costs.prefill_table() == pytest.approx(alone.prefill_table() + 2e-3)
    assert costs.kv_save_s(1e6) == pytest.approx(alone.kv_save_s(1e6) + 3e-3)
    assert costs.kv_restore_s(1e6) == pytest.approx(alone.kv_restore_s(1e6) + 3e-3)


@pytest.mark.parametrize("pair", PAIRS)
def test_tables_agree_with_the_model_at_their_knots(pair: tuple[str, str]) -> None:
    costs, decode, prefill = MODELS[pair], DECODE_TABLES[pair], PREFILL_TABLES[pair]
    assert decode.shape == (DECODE_BATCHES + 1, CONTEXT_KNOTS)
    assert prefill.shape == (PREFILL_KNOTS,)
    assert decode.dtype == prefill.dtype == np.float64
    assert not decode[0].any()
    for batch in (1, 7, 8, 33, DECODE_BATCHES):
        for knot in (0, 1, 5, CONTEXT_KNOTS - 1):
            context = knot * CONTEXT_STEP_TOKENS
            expected = round(costs.decode_s(batch, context) * 1e9)
            assert abs(decode_ns(decode, 1.0, batch, batch * context) - expected) <= 1
    for knot in (1, 8, 100, PREFILL_KNOTS - 1):
        tokens = knot * PREFILL_STEP_TOKENS
        expected = round(costs.prefill_s(tokens) * 1e9)
        assert abs(prefill_chunk_ns(prefill, 1.0, 0, tokens) - expected) <= 1
    for start, tokens in ((128, 128), (2048, 2048), (16384, 2048)):
        expected = round(costs.chunk_s(start, tokens) * 1e9)
        assert abs(prefill_chunk_ns(prefill, 1.0, start, tokens) - expected) <= 1


@given(pairs, batches, contexts, st.integers(0, 30_000), st.integers(1, 2048))
def test_tables_follow_the_model_between_their_knots(
    pair: tuple[str, str], batch: int, context: int, start: int, tokens: int
) -> None:
    costs = MODELS[pair]
    # bends between two knots are smoothed; those of derived profiles' short prompts are sharper
    measured = costs.profile.kind == "measured"
    step = decode_ns(DECODE_TABLES[pair], 1.0, batch, batch * context) / 1e9
    assert step == pytest.approx(costs.decode_s(batch, context), rel=0.06 if measured else 0.1)
    chunk = prefill_chunk_ns(PREFILL_TABLES[pair], 1.0, start, tokens) / 1e9
    assert chunk == pytest.approx(costs.chunk_s(start, tokens), rel=0.12 if measured else 0.4)


@given(pairs, st.integers(32_768, 300_000), st.integers(128, 2048))
def test_prefill_keeps_attention_beyond_the_table(
    pair: tuple[str, str], start: int, tokens: int
) -> None:
    costs = MODELS[pair]
    chunk = prefill_chunk_ns(PREFILL_TABLES[pair], 1.0, start, tokens) / 1e9
    assert chunk == pytest.approx(costs.chunk_s(start, tokens), rel=0.01)
    bound = costs.profile.prefill_bound_s
    assert chunk >= float(bound(start + tokens) - bound(start))
    whole = prefill_chunk_ns(PREFILL_TABLES[pair], 1.0, 0, start) / 1e9
    assert whole == pytest.approx(costs.prefill_s(start), rel=1e-6)


@given(
    pairs, st.floats(0.5, 2), batches, st.integers(0, 3_000_000), st.integers(0, 100_000), prompts
)
def test_compiled_equals_plain_python(
    pair: tuple[str, str], scale: float, batch: int, total: int, start: int, tokens: int
) -> None:
    decode, prefill = DECODE_TABLES[pair], PREFILL_TABLES[pair]
    compiled = decode_ns(decode, scale, batch, total)
    assert compiled == plain(decode_ns)(decode, scale, batch, total)
    assert isinstance(compiled, int)
    chunk = prefill_chunk_ns(prefill, scale, start, tokens)
    assert chunk == plain(prefill_chunk_ns)(prefill, scale, start, tokens)


def test_decode_ns_worked_by_hand() -> None:
    table = np.zeros((DECODE_BATCHES + 1, CONTEXT_KNOTS))
    table[2] = 1e-3 + 2e-4 * np.arange(CONTEXT_KNOTS)
    assert decode_ns(table, 1.0, 2, 0) == 1_000_000
    assert decode_ns(table, 1.0, 2, 2 * 1536) == 1_300_000
    assert decode_ns(table, 2.0, 2, 2 * 1536) == 2_600_000
    assert decode_ns(table, 1.0, 2, 2 * 40 * 1024) == 9_000_000  # beyond the last knot
    assert decode_ns(table, 1.0, 1, 0) == 1  # never nothing


def test_prefill_chunk_ns_worked_by_hand() -> None:
    knots = np.arange(PREFILL_KNOTS)
    table = np.maximum(1e-3, 1e-6 * knots**2)
    assert prefill_chunk_ns(table, 1.0, 0, 64) == 1_000_000  # the launch floor
    assert prefill_chunk_ns(table, 1.0, 128 * 40, 128) == 1_000_000  # adds 81 us: the floor again
    assert prefill_chunk_ns(table, 1.0, 128 * 100, 128 * 10) == 2_100_000  # 110^2 - 100^2
    assert prefill_chunk_ns(table, 1.0, 128 * 300, 128 * 10) == 6_100_000  # beyond the last knot


@pytest.mark.parametrize("model", registry.models("h200"))
def test_leave_one_out(model: str) -> None:
    costs = MODELS["h200", model]
    held_out = costs.leave_one_out()
    decode = [held for held in held_out if held.table == "decode"]
    assert [held.measured_s for held in decode] == [p.time_s for p in costs.profile.decode]
    assert np.quantile([abs(held.error) for held in decode], 0.9) < 0.1
    assert any(held.error for held in decode) and any(held.extrapolated for held in decode)
    inside = [held for held in held_out if held.table == "prefill" and not held.extrapolated]
    assert all(abs(held.error) < 0.2 for held in inside)


def test_a_held_out_point_does_not_help_to_predict_itself() -> None:
    honest = with_decode([(1, 512, 0.008), (8, 512, 0.010), (32, 512, 0.030)])
    moved = with_decode([(1, 512, 0.008), (8, 512, 0.012), (32, 512, 0.030)])
    assert honest.leave_one_out()[1].predicted_s == moved.leave_one_out()[1].predicted_s


def test_points_pooled_at_the_launch_floor_are_not_held_out() -> None:
    costs = with_prefill([(128, 0.02), (1024, 0.02), (4096, 0.02), (16384, 0.5)])
    prefill = [held for held in costs.leave_one_out() if held.table == "prefill"]
    assert [held.point for held in prefill] == ["16384 tokens"]


def test_a_profile_says_what_it_is() -> None:
    for (platform, _), costs in MODELS.items():
        profile: Profile = costs.profile
        assert profile.kind == ("measured" if platform == "h200" else "derived")
