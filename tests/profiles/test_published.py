"""Derived platforms follow from published totals, and the rule from the measured profiles."""

import pytest

from mmrl.profiles import registry
from mmrl.profiles.derive import Rule, derive_profile, rule
from mmrl.profiles.fit_rule import decode_errors, fit_rule
from mmrl.profiles.published import (
    HOSTS,
    MODELS,
    PREEMPTIONS,
    fit_kv,
    fit_loads,
    held_out_errors,
    predicted_total_s,
    weight_bytes,
)

MEASURED = [registry.get_profile("h200", model) for model in registry.models("h200")]


def test_two_models_predict_the_third_within_ten_percent() -> None:
    errors = held_out_errors()
    assert errors.keys() == {(host, model) for host in HOSTS for model in MODELS}
    assert max(map(abs, errors.values())) < 0.10


def test_a_held_out_model_is_not_fitted_to() -> None:
    others = ["qwen3-8b", "qwen2.5-14b"]
    total_s = predicted_total_s(HOSTS[0], "qwen2.5-3b", others)
    load = fit_loads(others)[HOSTS[0]]
    assert load != fit_loads()[HOSTS[0]]
    assert 0 < total_s - load.seconds(weight_bytes("qwen2.5-3b")) < 0.05  # the KV cache


def test_shapes_make_the_published_kv_caches() -> None:
    """178, 713 and 951 MiB are 5,000 tokens and a prompt of some 70."""
    for model in MODELS.values():
        assert model.kv_mib * 2**20 / model.architecture.kv_bytes_per_token == pytest.approx(
            5068, abs=6
        )


def test_implied_rates_of_undisturbed_runs() -> None:
    rates = [point.decode_tokens_per_s for point in PREEMPTIONS]
    assert rates == pytest.approx([48, 28.6, 16.8, 46, 32.1, 19.7], abs=0.1)


@pytest.mark.parametrize("host", HOSTS)
def test_shipped_hosts_have_the_fitted_transfers(host: str) -> None:
    platform = registry.get_platform(host)
    wanted = (fit_loads()[host], *fit_kv()[host])
    for shipped, fitted in zip(
        (platform.load, platform.kv_save, platform.kv_restore), wanted, strict=True
    ):
        assert shipped.fixed_s == pytest.approx(fitted.fixed_s, rel=0.005)
        assert shipped.bytes_per_s == pytest.approx(fitted.bytes_per_s, rel=0.005)
    assert platform.stream == platform.kv_restore
    for point in PREEMPTIONS:
        if point.host == host:
            profile = derive_profile(point.model, MODELS[point.model].architecture, platform)
            assert profile.load.seconds(profile.weight_bytes) == pytest.approx(
                point.swap_s, rel=0.04
            )


def test_the_shipped_rule_is_fitted_to_the_shipped_measurements() -> None:
    """After a measurement: python benchmarks/fit_derivation.py --write."""
    fitted, shipped = fit_rule(MEASURED).model_dump(), rule().model_dump()
    assert set(fitted.pop("fitted_to")) == set(shipped.pop("fitted_to"))
    assert fitted == pytest.approx(shipped, rel=0.01)
    assert shipped["decode_error"] < 0.25


def test_the_fit_finds_the_rule_that_made_the_points() -> None:
    truth = Rule(
        layer_s=50e-6,
        sequence_s=20e-6,
        weight_passes=1.2,
        kv_passes=1.5,
        expanded_kv_passes=0.0,
        prefill_layer_s=0.3e-3,
        chunk_layer_s=0.2e-3,
        prefill_weight_passes=1.1,
        activation_passes=5.0,
        matrix_efficiency=0.6,
        attention_efficiency=0.25,
        fitted_to=(),
        decode_error=0,
        prefill_error=0,
    )
    made = [
        profile.model_copy(
            update={
                "decode": tuple(
                    at.model_copy(
                        update={
                            "time_s": truth.decode_s(
                                profile.architecture, profile.limits, at.batch, at.context_tokens
                            )
                        }
                    )
                    for at in profile.decode
                ),
                "prefill": tuple(
                    at.model_copy(
                        update={
                            "time_s": truth.prefill_s(
                                profile.architecture, profile.limits, at.tokens
                            )
                        }
                    )
                    for at in profile.prefill
                ),
            }
        )
        for profile in MEASURED
    ]
    found = fit_rule(made)
    exclude = {"fitted_to", "decode_error", "prefill_error"}
    assert found.model_dump(exclude=exclude) == pytest.approx(
        truth.model_dump(exclude=exclude), rel=0.01, abs=1e-3
    )
    assert found.decode_error < 0.01
    assert max(map(abs, decode_errors(truth, made[0]))) < 1e-9
