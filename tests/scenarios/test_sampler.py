import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.errors import InputError
from mmrl.node.state import NODE, REQUEST, SEGMENT_STEPS, new_nodes, new_requests
from mmrl.profiles.costs import decode_ns, prefill_alone_ns, prefill_chunk_ns
from mmrl.profiles.interpolate import MARK
from mmrl.profiles.registry import get_profile
from mmrl.scenarios.registry import get_scenario, scenario_names
from mmrl.scenarios.requests import decode_alone_ns
from mmrl.scenarios.sampler import EpisodeInfo, EpisodeSampler
from mmrl.scenarios.seeds import SPLITS, episode_rng
from mmrl.scenarios.sources import busiest
from mmrl.scenarios.suite import get_suite
from mmrl.workloads.generators import WorkloadSpec, sample_trace
from mmrl.workloads.trace import Trace

SAMPLERS: dict[str, EpisodeSampler] = {}


def sampler_of(name: str) -> EpisodeSampler:
    if name not in SAMPLERS:
        SAMPLERS[name] = get_scenario(name).sampler()
    return SAMPLERS[name]


def draw(
    sampler: EpisodeSampler, seed: int, options: dict[str, Any] | None = None
) -> tuple[EpisodeInfo, np.record, np.recarray]:
    node, requests = new_nodes(1)[0], new_requests(1, sampler.capacity)[0]
    info = sampler.draw(np.random.default_rng(seed), node, requests, options)
    return info, node, requests


@pytest.mark.parametrize("name", scenario_names())
@pytest.mark.parametrize("seed", range(8))
def test_every_episode_is_sound(name: str, seed: int) -> None:
    sampler = sampler_of(name)
    scenario = sampler.scenario
    info, node, requests = draw(sampler, seed)
    models, n = int(node.n_models), int(node.n_requests)
    assert models == len(info.model_names) == len(set(info.model_names)) <= sampler.max_models
    assert n == info.requests <= sampler.capacity
    assert info.dropped == 0
    assert scenario.load[0] <= info.load <= scenario.load[1]

    r = requests[:n]
    assert (np.diff(r.arrival_ns) >= 0).all()
    assert (r.arrival_ns >= 0).all()
    assert (r.arrival_ns < scenario.duration_s * 1e9).all()
    assert ((r.model >= 0) & (r.model < models)).all()
    assert (r.prompt >= 1).all() and (r.output >= 1).all() and (r.ttft_ns > 0).all()
    assert (r.isolated_ns > 0).all() and (r.tpot_ns >= 0).all()
    assert (r.first_ns == -1).all() and (r.finish_ns == -1).all()
    for field in ("generated", "prefilled", "blocks", "preemptions", "state", "miss"):
        assert not r[field].any()
    assert requests[n:].tobytes() == bytes(REQUEST.itemsize * (sampler.capacity - n))

    for field in NODE.names or ():
        assert np.isfinite(np.asarray(node[field], np.float64)).all(), field
    for field in ("pieces", "base_bytes", "layer_bytes", "block_bytes", "load_layer_ns"):
        assert (node[field][:models] > 0).all(), field
        assert not node[field][models:].any(), field
    assert node.horizon_ns == (scenario.duration_s + scenario.drain_s) * 1e9
    assert node.full_verbs == (scenario.verbs == "full")


@pytest.mark.parametrize("name", scenario_names())
@pytest.mark.parametrize("seed", range(8))
def test_every_model_fits_the_budget(name: str, seed: int) -> None:
    sampler = sampler_of(name)
    _, node, requests = draw(sampler, seed)
    models = int(node.n_models)
    weights = node.base_bytes[:models].copy()
    if not node.full_verbs:
        weights += (node.pieces[:models] - 1) * node.layer_bytes[:models]
    longest = 8192 // 16 + 1
    left = node.budget_bytes - node.reserve_bytes - weights - longest * node.block_bytes[:models]
    assert (left >= 0).all()
    assert (requests.prompt + requests.output <= 8192).all()


def test_same_state_same_bytes() -> None:
    sampler = sampler_of("fast")
    for seed in range(5):
        first, second = draw(sampler, seed), draw(get_scenario("fast").sampler(), seed)
        assert first[0] == second[0]
        assert first[1].tobytes() == second[1].tobytes()
        assert first[2].tobytes() == second[2].tobytes()


def test_fixing_the_load_changes_the_rate_alone() -> None:
    sampler = sampler_of("fast")
    free, node, _ = draw(sampler, 3)
    fixed, same, _ = draw(sampler, 3, {"load": 1.0})
    assert fixed.load == 1.0
    assert fixed.model_names == free.model_names
    assert fixed.rate_per_s == pytest.approx(free.rate_per_s / free.load)
    same.n_requests = node.n_requests
    assert same.tobytes() == node.tobytes()


def offered(name: str, episodes: int, **overrides: Any) -> tuple[float, float]:
    """Mean and standard error of the utilisation that the requests really offer."""
    sampler = get_scenario(name, jitter=0, **overrides).sampler()
    node, requests = new_nodes(1)[0], new_requests(1, sampler.capacity)[0]
    rng = np.random.default_rng(5)
    values = []
    for _ in range(episodes):
        n = sampler.draw(rng, node, requests).requests
        values.append(requests.isolated_ns[:n].sum() / 1e9 / sampler.scenario.duration_s)
    return float(np.mean(values)), float(np.std(values) / np.sqrt(episodes))


@pytest.mark.parametrize(
    ("name", "workload"),
    [
        ("demo", {"arrivals": {"kind": "poisson"}}),
        ("code", {"arrivals": {"kind": "poisson"}, "lengths": {"family": ["code", "chat"]}}),
        ("demo", {"popularity": {"zipf": 2.0, "drift_period_s": 20}}),
        ("fast", {"arrivals": {"kind": "poisson"}, "lengths": {"family": "mixed"}}),
    ],
)
def test_requests_offer_the_wanted_utilisation(name: str, workload: dict[str, Any]) -> None:
    mean, error = offered(name, 400, workload=workload, load=0.8, utilisation_at_load_1=1.5)
    assert error < 0.05
    assert abs(mean - 1.2) < 4 * error


def test_mean_rate_is_what_the_episode_says() -> None:
    sampler = get_scenario("demo", workload={"arrivals": {"kind": "poisson"}}).sampler()
    node, requests = new_nodes(1)[0], new_requests(1, sampler.capacity)[0]
    rng = np.random.default_rng(1)
    infos = [sampler.draw(rng, node, requests) for _ in range(400)]
    expected = infos[0].rate_per_s * sampler.scenario.duration_s
    assert abs(np.mean([i.requests for i in infos]) - expected) < 4 * np.sqrt(expected / 400)
    assert sampler.rates_at_load_1 == pytest.approx((infos[0].rate_per_s,) * 3)


def test_drawn_fleets_and_budgets_are_in_range() -> None:
    sampler = sampler_of("fast")
    fleet = sampler.scenario.fleet
    assert fleet is not None
    sizes, budgets = set(), []
    for seed in range(150):
        info, node, _ = draw(sampler, seed)
        names = [name.split("#")[0] for name in info.model_names]
        sizes.add(len(names))
        assert set(names) <= set(fleet.choose_from)
        assert set(names) & set(fleet.at_least_one_of)
        m = int(node.n_models)
        weights = node.base_bytes[:m] + (node.pieces[:m] - 1) * node.layer_bytes[:m]
        assert node.budget_bytes >= 1.08 * weights.max() + 2e9 - 1
        budgets.append(node.budget_bytes / weights.sum())
        assert budgets[-1] >= 0.3 - 1e-6
        for field in ("decode_scale", "prefill_scale"):
            assert ((node[field][:m] >= 0.85) & (node[field][:m] <= 1.15)).all()
    assert sizes == {4, 5, 6, 7, 8}
    # the range is left only where the largest model needs more
    assert 0.3 < np.median(budgets) < 0.6


def test_jitter_moves_loads_and_streams_too() -> None:
    sampler = get_scenario("demo", jitter=0.2).sampler()
    exact = draw(get_scenario("demo").sampler(), 0)[1]
    jittered = draw(sampler, 0)[1]
    for field in ("load_fixed_ns", "load_base_ns", "load_layer_ns", "stream_layer_ns"):
        some = np.flatnonzero(exact[field][:6])  # a measured load may have no fixed part
        ratio = jittered[field][some] / exact[field][some]
        assert ((ratio > 0.799) & (ratio < 1.201)).all()
        assert len(set(ratio.round(6))) == len(some) > 0
    assert (jittered.save_block_ns == exact.save_block_ns).all()


def test_a_fleet_that_can_never_fit() -> None:
    models = ["llama3.2-3b", "qwen2.5-14b"]
    with pytest.raises(InputError) as caught:
        get_scenario("demo", models=models).sampler()
    text = str(caught.value)
    for part in ("scenario 'demo'", "qwen2.5-14b", "29.5 GB", "24.0 GB", "raise the budget to 3"):
        assert part in text
    # its layers can be streamed: two of them have room of their own
    streamed = draw(get_scenario("demo", models=models, verbs="full").sampler(), 0)[1]
    whole = draw(get_scenario("demo", models=models, budget_gb=80).sampler(), 0)[1]
    layer_bytes = get_profile("h200", "qwen2.5-14b").layer_bytes
    assert streamed.reserve_bytes == whole.reserve_bytes + 2 * layer_bytes
    with pytest.raises(InputError, match="base weights"):
        get_scenario("demo", models=models, verbs="full", budget_gb=3).sampler()


def test_models_that_never_fit_are_not_drawn() -> None:
    fleet = {"size": [2, 3], "choose_from": ["qwen2.5-14b", "llama3.2-3b"]}
    sampler = get_scenario("demo", fleet=fleet).sampler()
    assert {n.split("#")[0] for s in range(20) for n in draw(sampler, s)[0].model_names} == {
        "llama3.2-3b"
    }
    with pytest.raises(InputError, match=r"at_least_one_of: none of qwen2.5-14b fits"):
        get_scenario("demo", fleet=fleet | {"at_least_one_of": "qwen2.5-14b"}).sampler()
    with pytest.raises(InputError, match=r"choose_from: none of them fits in 5.0 GB of h200"):
        get_scenario("demo", fleet=fleet, budget_gb=5).sampler()


@pytest.mark.parametrize("verbs", ["core", "full"])
@pytest.mark.parametrize(
    ("budget_gb", "size", "choose_from"),
    [
        (22, 16, ["qwen2.5-7b", "qwen2.5-0.5b"]),
        (24, 8, ["qwen2.5-7b", "qwen2.5-0.5b"]),
        (40, [1, 12], ["qwen2.5-14b", "qwen2.5-7b", "llama3.2-3b"]),
    ],
)
def test_every_fleet_that_is_drawn_has_room_for_each_model(
    verbs: str, budget_gb: float, size: Any, choose_from: list[str]
) -> None:
    fleet = {"size": size, "choose_from": choose_from}
    sampler = get_scenario("demo", fleet=fleet, budget_gb=budget_gb, verbs=verbs).sampler()
    for seed in range(40):
        _, node, _ = draw(sampler, seed)
        rows = node.profile[: node.n_models]
        weights = sampler.bank.weight_bytes[rows]
        kv = sampler.bank.kv_bytes(rows, 8192)
        assert (weights + kv + node.reserve_bytes <= node.budget_bytes).all()


def test_fit_is_judged_by_the_fleets_that_can_be_drawn() -> None:
    six = ["qwen2.5-14b", "llama3.1-8b", "qwen2.5-7b", "llama3.2-3b", "qwen2.5-1.5b"]
    fleet = {"size": 1, "choose_from": [*six, "qwen2.5-0.5b"]}
    sampler = get_scenario("demo", fleet=fleet, budget_gb=18.6).sampler()
    drawn = {draw(sampler, seed)[0].model_names[0] for seed in range(60)}
    assert "qwen2.5-7b" in drawn and "qwen2.5-14b" not in drawn  # nobody else's graphs are held
    with pytest.raises(InputError, match="none of them fits"):  # eight times its graphs are
        fleet = {"size": 8, "choose_from": ["qwen2.5-7b"]}
        get_scenario("demo", fleet=fleet, budget_gb=18).sampler()


SHIPPED = {name: get_scenario(name) for name in scenario_names()} | get_suite("v1").bases()
LEFT_OUT = {  # of the shipped scenarios and the frozen cells, by platform
    "study-rtx5000ada": {"qwen2.5-14b"},
    "consumer-pcie4": {"qwen2.5-14b", "~9.46b", "~11.71b"},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_shipped_scenarios_draw_from_stays(name: str) -> None:
    for scenario in SHIPPED[name].parts():
        if scenario.fleet is None:
            continue
        sampler = EpisodeSampler(scenario)
        bank, between = sampler.bank, scenario.fleet.between
        sizes = {m for m in bank.models if m.startswith(MARK)} if between else set[str]()
        named = sizes | set(scenario.fleet.choose_from)
        for platform in sampler.platforms:
            drawn = {bank.profiles[row].model for row in sampler.rows(platform)}
            left_out = LEFT_OUT.get(bank.platforms[platform].name, set())
            assert drawn == named - left_out


@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(1, 8000), output=st.integers(1, 600), scale=st.floats(0.8, 1.2))
def test_latency_alone_is_that_of_the_steps(prompt: int, output: int, scale: float) -> None:
    sampler = sampler_of("demo")
    decode, prefill = sampler.decode_tables[0], sampler.prefill_tables[0]
    total = sum(
        decode_ns(decode, scale, 1, prompt + step // SEGMENT_STEPS * SEGMENT_STEPS)
        for step in range(output - 1)
    )
    assert decode_alone_ns(decode, scale, prompt, output) == pytest.approx(total, rel=1e-3)
    chunks = sum(
        prefill_chunk_ns(prefill, scale, start, min(2048, prompt - start))
        for start in range(0, prompt, 2048)
    )
    assert prefill_alone_ns(prefill, scale, prompt) == chunks


def test_batch_work_has_no_tpot_target() -> None:
    _, _, requests = draw(sampler_of("batch"), 1, {"load": 1.5})
    requests = requests[requests.output > 0]
    batch = requests.model % 2 == 1
    assert batch.any() and not batch.all()
    assert (requests.tpot_ns[batch] == 0).all() and (requests.ttft_ns[batch] == 60e9).all()
    assert (requests.tpot_ns[~batch] == 100e6).all() and (requests.ttft_ns[~batch] == 2e9).all()


def make_trace(models: tuple[str, ...], rate_per_s: float, duration_s: float) -> Trace:
    spec = WorkloadSpec.model_validate({"arrivals": {"kind": "poisson"}})
    return sample_trace(spec, models, rate_per_s, duration_s, seed=4)


def test_a_trace_as_an_option_is_played_as_it_is() -> None:
    sampler = sampler_of("demo")
    trace = make_trace(tuple("abcdef"), 0.5, 100.0)
    info, node, requests = draw(sampler, 0, {"trace": trace})
    inside = trace.arrival_ns < 60e9
    n = int(inside.sum())
    assert info.requests == node.n_requests == n > 10
    assert (requests.arrival_ns[:n] == trace.arrival_ns[inside]).all()
    assert (requests.model[:n] == trace.model[inside]).all()
    assert (requests.output[:n] == trace.output_tokens[inside]).all()
    assert info.rate_per_s == n / 60
    service_s = requests.isolated_ns[:n].sum() / 1e9
    assert info.load * sampler.scenario.utilisation_at_load_1 == pytest.approx(service_s / 60)
    with pytest.raises(InputError, match="the trace has 2 models, the fleet has 6"):
        draw(sampler, 0, {"trace": make_trace(("a", "b"), 0.5, 100.0)})


def test_a_scenarios_trace_is_stretched_to_the_load(tmp_path: Path) -> None:
    path = tmp_path / "day.csv"
    trace = make_trace(tuple("abcdef"), 4.0, 300.0)
    trace.to_csv(path)
    sampler = get_scenario("demo", trace={"paths": path}, utilisation_at_load_1=2.0).sampler()
    assert sampler.trace_notes
    counts, service = [], []
    lengths = set(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))
    for seed in range(100):
        info, _, requests = draw(sampler, seed)
        r = requests[: info.requests]
        assert (np.diff(r.arrival_ns) >= 0).all() and (r.arrival_ns < 60e9).all()
        assert set(zip(r.prompt.tolist(), r.output.tolist(), strict=True)) <= lengths
        counts.append(info.requests)
        service.append(r.isolated_ns.sum() / 60e9)
    assert np.mean(counts) == pytest.approx(info.rate_per_s * 60, rel=0.05)
    assert np.mean(service) == pytest.approx(2.0, rel=0.05)


def test_a_trace_that_does_not_fit_says_what_to_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    trace = make_trace(tuple("abcdef"), 4.0, 300.0)
    prompts = trace.prompt_tokens.copy()
    prompts[7] = 2**20
    replace(trace, prompt_tokens=prompts).to_csv(path)
    options = {"trace": {"paths": path}, "utilisation_at_load_1": 2.0}
    with pytest.raises(InputError, match="KV cache for 1,04") as caught:
        get_scenario("demo", **options).sampler()
    found = re.search(r"--longest (\d+)", caught.value.remedy or "")
    assert found
    trace.without_longer(int(found[1])).to_csv(path)
    get_scenario("demo", **options).sampler()


def test_each_model_is_sized_by_the_requests_that_it_gets(tmp_path: Path) -> None:
    rows = ["arrival_s,model,prompt_tokens,output_tokens"]
    for k in range(30):
        rows += [f"{k}.1,short,100,20", f"{k}.2,short,100,20", f"{k}.3,long,8000,20"]
    path = tmp_path / "three.csv"
    path.write_text("\n".join([*rows, "30,rare,900000,10", ""]))
    given = {"trace": {"paths": path, "mapping": "services"}, "utilisation_at_load_1": 1.0}
    fixed = get_scenario("demo", models=["llama3.2-3b", "qwen2.5-7b"], **given)
    sampler = fixed.sampler()  # the one long request is to no model of this fleet
    assert sampler.longest_tokens == 8020
    # a fraction is raised to what the models need, with no regard to the long request either
    tight = {"models": ["qwen2.5-7b", "qwen2.5-0.5b"], "budget_fraction": 0.01}
    budgets = [
        draw(get_scenario("demo", **tight, **source).sampler(), 0)[0].budget_gb
        for source in (given, {"utilisation_at_load_1": 1.0})
    ]
    assert budgets[0] == budgets[1]
    # drawn models change places, so each of them has room for the longest of all
    drawn = {"size": [1, 2], "choose_from": ["llama3.2-3b"]}
    assert get_scenario("demo", fleet=drawn, **given).sampler().longest_tokens == 8020
    with pytest.raises(InputError, match="none of them fits"):
        get_scenario("demo", fleet=drawn | {"size": [2, 3]}, **given).sampler()


def test_a_short_trace_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "short.csv"
    make_trace(tuple("abcdef"), 20.0, 1.0).to_csv(path)
    sampler = get_scenario("demo", trace={"paths": path}, utilisation_at_load_1=2.0).sampler()
    info, _, _ = draw(sampler, 0)
    assert info.requests == pytest.approx(info.rate_per_s * 60, rel=0.3)


@pytest.mark.parametrize("fleet", [None, {"size": [2, 3], "choose_from": ["qwen2.5-0.5b"]}])
def test_no_burst_of_a_trace_is_too_large_for_the_table(tmp_path: Path, fleet: Any) -> None:
    path = tmp_path / "burst.csv"
    calm, burst = np.arange(0, 20_000, 10.0), 7000 + np.arange(0, 20, 0.01)
    rows = [f"{at},{k % 3},200,20" for k, at in enumerate(np.sort([*calm, *burst]).tolist())]
    path.write_text("arrival_s,model,prompt_tokens,output_tokens\n" + "\n".join(rows))
    what = {"fleet": fleet} if fleet else {"models": ["qwen2.5-0.5b"] * 3}
    sampler = get_scenario(
        "demo", **what, trace={"paths": path, "mapping": "services"}, utilisation_at_load_1=0.02
    ).sampler()
    assert sampler.capacity >= 2000
    infos = [draw(sampler, seed, {"load": sampler.highest_load})[0] for seed in range(2000)]
    assert not any(info.dropped for info in infos)
    most = max(info.requests for info in infos)
    assert most > 500  # some have met the burst
    if fleet is None:
        assert most <= sampler.capacity


def test_the_busiest_window_of_a_trace() -> None:
    one = Trace(
        np.array([0, 1, 2, 5, 9]) * 10**9,
        *(np.ones(5, dtype) for dtype in (np.int32, np.int32, np.int32, np.bool_)),
        model_names=("a", "b"),
        duration_s=10.0,
    )
    for window_s, expected in ((0.5, 1), (1, 2), (2, 3), (3, 4), (10, 6), (12, 8), (23, 14)):
        assert busiest(one, int(window_s * 1e9)) == expected


def test_wrong_options() -> None:
    sampler = sampler_of("demo")
    with pytest.raises(InputError, match=r"unknown reset option 'lod'.*did you mean 'load'"):
        draw(sampler, 0, {"lod": 1.0})
    for load in (0.0, -1.0, 99.0, float("nan")):
        with pytest.raises(InputError, match="option load is"):
            draw(sampler, 0, {"load": load})


def test_seeds_of_the_splits_are_apart_and_frozen() -> None:
    streams = {episode_rng(s, i).integers(2**63) for s in SPLITS for i in range(50)}
    assert len(streams) == 150
    # frozen: a change of these numbers changes every figure that was ever reported
    assert [int(episode_rng(split, 7).integers(10**6)) for split in SPLITS] == FROZEN
    with pytest.raises(InputError, match=r"unknown split 'tset'.*did you mean 'test'"):
        episode_rng("tset", 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="-1"):
        episode_rng("test", -1)


FROZEN = [707084, 532028, 311621]
