"""Platforms and profiles are found by name or path; derived ones follow their rule."""

import shutil
from pathlib import Path

import pytest

from mmrl.errors import InputError
from mmrl.profiles import registry
from mmrl.profiles.costs import CostModel
from mmrl.profiles.derive import derive_profile, rule, scale_profile
from mmrl.profiles.schema import Limits, Platform, Transfer, save

MODELS = registry.models("h200")
DERIVED = ["consumer-pcie4", "l40s", "study-a6000", "study-rtx5000ada"]


def test_names() -> None:
    assert registry.platforms() == ["h200", *DERIVED]
    sizes = [registry.get_profile("h200", model).parameters for model in MODELS]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.6e9 and sizes[-1] > 14e9
    for platform in registry.platforms():
        assert registry.models(platform) == MODELS
        assert registry.get_platform(platform).name == platform


@pytest.mark.parametrize("model", MODELS)
def test_bytes_follow_from_the_shape(model: str) -> None:
    profile = registry.get_profile("h200", model)
    shape = profile.architecture
    assert profile.parameters == shape.parameters
    assert profile.weight_bytes == 2 * shape.parameters
    assert profile.kv_bytes_per_token == shape.kv_bytes_per_token
    assert profile.limits == registry.get_platform("h200").limits
    assert profile.usable_bytes == registry.get_platform("h200").usable_bytes


@pytest.mark.parametrize("platform", DERIVED)
def test_derived_loads_are_the_platforms(platform: str) -> None:
    load = registry.get_platform(platform).load
    for model in MODELS:
        profile = registry.get_profile(platform, model)
        whole = CostModel(profile).load_s(profile.weight_bytes)
        assert whole == pytest.approx(load.fixed_s + profile.weight_bytes / load.bytes_per_s)


@pytest.mark.parametrize("platform", DERIVED)
@pytest.mark.parametrize("model", MODELS)
def test_derived_decode_keeps_the_floor_and_scales_the_rest(platform: str, model: str) -> None:
    source, derived = registry.get_profile("h200", model), registry.get_profile(platform, model)
    ratio = source.limits.memory_bytes_per_s / derived.limits.memory_bytes_per_s
    for before, after in zip(source.decode, derived.decode, strict=True):
        assert before.time_s < after.time_s < before.time_s * ratio
    spans = [p.decode[-1].time_s - p.decode[0].time_s for p in (source, derived)]
    assert spans[1] == pytest.approx(spans[0] * ratio)
    assert derived.prefill[0].time_s >= source.prefill[0].time_s
    assert derived.prefill[-1].time_s > source.prefill[-1].time_s
    assert derived.layer_bytes == source.layer_bytes
    assert derived.kind == "derived"
    assert any("launch floor" in note for note in derived.provenance.notes)


@pytest.mark.parametrize(
    ("platform", "model", "tokens_per_s"),
    [  # what the study's runs of 7,000 tokens imply (its 3B and 8B are other models than ours)
        ("study-rtx5000ada", "llama3.2-3b", 48),
        ("study-rtx5000ada", "qwen2.5-7b", 28.6),
        ("study-rtx5000ada", "qwen2.5-14b", 16.8),
        ("study-a6000", "llama3.2-3b", 46),
        ("study-a6000", "qwen2.5-7b", 32.1),
        ("study-a6000", "qwen2.5-14b", 19.7),
    ],
)
def test_derived_decode_is_within_a_factor_of_two_of_the_study(
    platform: str, model: str, tokens_per_s: float
) -> None:
    run_s = float(CostModel(registry.get_profile(platform, model)).isolated_latency_s(100, 7000))
    assert 0.5 < 7000 / run_s / tokens_per_s < 2


@pytest.mark.parametrize("model", MODELS)
def test_rules_alone_come_near_the_measurement(model: str) -> None:
    measured = registry.get_profile("h200", model)
    derived = derive_profile(model, measured.architecture, registry.get_platform("h200"))
    assert derived.kind == "derived"
    assert derived.weight_bytes == measured.weight_bytes
    costs = CostModel(derived)
    for point in measured.decode:
        predicted = costs.decode_s(point.batch, point.context_tokens)
        assert predicted == pytest.approx(point.time_s, rel=rule().decode_error + 0.05)
    for at in measured.prefill:  # between the points of the derived grid, a little more
        predicted = costs.prefill_s(at.tokens)
        assert predicted == pytest.approx(at.time_s, rel=rule().prefill_error + 0.05)


@pytest.mark.parametrize("platform", ["h200", *DERIVED])
def test_an_unprofiled_model_gets_a_valid_profile_anywhere(platform: str) -> None:
    shape = registry.get_profile("h200", "llama3.2-3b").architecture.model_copy(
        update={"layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
    )
    profile = derive_profile("llama-70b", shape, registry.get_platform(platform))
    assert profile.weight_bytes > 100e9
    assert profile.platform == platform


def on_hardware(memory_bytes_per_s: float, compute_flop_per_s: float) -> Platform:
    limits = Limits(memory_bytes_per_s=memory_bytes_per_s, compute_flop_per_s=compute_flop_per_s)
    return registry.get_platform("consumer-pcie4").model_copy(update={"limits": limits})


@pytest.mark.parametrize("memory_bytes_per_s", [1e10, 2e11, 8e11, 2e12, 8e12, 1e14])
@pytest.mark.parametrize("compute_flop_per_s", [1e12, 27e12, 2e14, 2.25e15, 1e18])
@pytest.mark.parametrize("model", MODELS)
def test_any_hardware_gets_a_profile_within_its_limits(
    memory_bytes_per_s: float, compute_flop_per_s: float, model: str
) -> None:
    platform = on_hardware(memory_bytes_per_s, compute_flop_per_s)
    measured = registry.get_profile("h200", model)
    for profile in (
        scale_profile(measured, registry.get_platform("h200"), platform),
        derive_profile(model, measured.architecture, platform),
    ):
        prefill = [point.time_s for point in profile.prefill]
        assert prefill == sorted(prefill)
        for point in profile.prefill:
            assert point.time_s >= profile.prefill_bound_s(point.tokens)
        for at in profile.decode:
            kv_tokens = at.batch * at.context_tokens
            assert at.time_s >= profile.decode_bound_s(at.batch, kv_tokens)
            assert all(
                at.time_s >= other.time_s
                for other in profile.decode
                if other.batch <= at.batch and other.context_tokens <= at.context_tokens
            )


def test_hardware_that_no_profile_describes() -> None:
    platform = registry.get_platform("consumer-pcie4")
    stuck = platform.model_copy(update={"stream": Transfer(fixed_s=0, bytes_per_s=1e-305)})
    shape = registry.get_profile("h200", MODELS[0]).architecture
    with pytest.raises(InputError, match=f"{MODELS[0]} on consumer-pcie4: time_s: "):
        derive_profile(MODELS[0], shape, stuck)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'h200'"):
        registry.get_platform("h20")
    with pytest.raises(InputError, match=r"did you mean 'qwen2\.5-7b'"):
        registry.get_profile("study-a6000", "qwen2.5-70b")
    with pytest.raises(InputError, match="unknown model"):
        registry.get_profile("h200", "platform")


def test_a_folder_of_the_users_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(registry.DATA / "h200", mine)
    (mine / f"{MODELS[-1]}.json").unlink()
    assert registry.models(mine) == MODELS[:-1]
    assert registry.get_platform(mine) == registry.get_platform("h200")
    assert registry.get_profile(str(mine), "qwen2.5-7b") == registry.get_profile(
        "h200", "qwen2.5-7b"
    )
    with pytest.raises(InputError, match="unknown model"):
        registry.get_profile(mine, MODELS[-1])


def test_a_measured_file_wins_over_derivation(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(registry.DATA / "study-a6000", mine)
    profile = registry.get_profile("study-a6000", "qwen2.5-7b")
    save(mine / "qwen2.5-7b.json", profile.model_copy(update={"kind": "measured"}))
    assert registry.get_profile(mine, "qwen2.5-7b").kind == "measured"
    assert registry.get_profile(mine, "qwen2.5-14b").kind == "derived"
    assert registry.models(mine) == MODELS


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    profile = registry.get_profile("h200", "qwen2.5-7b")
    save(tmp_path / "tuned.json", profile)
    assert registry.get_profile("h200", tmp_path / "tuned.json") == profile
    with pytest.raises(InputError, match=r"tuned\.json: platform: 'h200', wanted 'study-a6000'"):
        registry.get_profile("study-a6000", tmp_path / "tuned.json")


def test_a_folder_without_a_platform(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no platform\.json"):
        registry.get_platform(tmp_path)
