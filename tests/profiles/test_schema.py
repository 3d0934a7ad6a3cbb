"""A profile file is read as it was written, or refused with its name and the wrong field."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmrl.errors import InputError
from mmrl.profiles import registry
from mmrl.profiles.schema import load_platform, load_profile, save

H200 = registry.DATA / "h200"


@pytest.fixture
def good() -> dict[str, Any]:
    document = json.loads((H200 / "qwen2.5-7b.json").read_text())
    decode = ((1, 512, 0.0072), (8, 1024, 0.0113), (32, 1024, 0.0208))
    document["decode"] = [{"batch": b, "context_tokens": c, "time_s": t} for b, c, t in decode]
    for field, points in {
        "prefill": ((128, 0.0193), (1024, 0.0291), (4096, 0.124), (16384, 1.2)),
        "streamed_layer_s": ((1, 0.0085), (8, 0.0086), (32, 0.0087)),
    }.items():
        document[field] = [{"tokens": n, "time_s": t} for n, t in points]
    return document


def put(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    node: Any = document
    for key in parents:
        node = node[key]
    node[last] = value


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_profile(path)
    assert str(path) in caught.value.message
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return caught.value.message


def test_round_trip(tmp_path: Path) -> None:
    for name in registry.models("h200"):
        profile = registry.get_profile("h200", name)
        save(tmp_path / "copy.json", profile)
        assert load_profile(tmp_path / "copy.json") == profile
        assert (tmp_path / "copy.json").read_text() == (H200 / f"{name}.json").read_text()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("layer_bytes", -1, "layer_bytes"),
        ("layer_bytes", 466, "layer_bytes: 466, but"),  # megabytes for bytes
        ("kv_bytes_per_token", 28672, "kv_bytes_per_token"),
        ("parameters", 7, "parameters"),
        ("decode.1.time_s", -0.01, "decode.1.time_s"),
        ("decode.1.time_s", float("nan"), "decode.1.time_s"),
        ("decode.1.time_s", float("inf"), "decode.1.time_s"),
        ("decode.1.time_s", "fast", "decode.1.time_s"),
        ("decode.0.time_s", 0.0072e-3, "decode.0.time_s: 7.2e-06 s is faster than"),
        ("decode.2.time_s", 0.0105, "decode.2.time_s: 0.0105 s, but the smaller batch 8"),
        ("decode.2.batch", 8, "decode.2: batch 8 with context 1024 stands twice"),
        ("decode", [], "decode"),
        ("prefill.2.time_s", 0.02, "prefill.2.time_s: 0.02 s"),
        ("prefill.1.tokens", 128, "prefill.1.tokens: 128 after 128"),
        ("prefill.3.time_s", 0.1245, "prefill.3.time_s: 0.1245 s is faster than"),
        ("streamed_layer_s.2.time_s", 0.001, "streamed_layer_s.2.time_s"),
        ("load.bytes_per_s", 0, "load.bytes_per_s"),
        ("stream.fixed_s", -1, "stream.fixed_s"),
        ("kind", "guessed", "kind"),
        ("schema_version", 2, "schema_version"),
        ("colour", "blue", "colour"),
    ],
)
def test_wrong_field_is_named(
    tmp_path: Path, good: dict[str, Any], field: str, value: Any, says: str
) -> None:
    put(good, field, value)
    assert says in refusal(tmp_path, json.dumps(good))


def test_missing_field_is_named(tmp_path: Path, good: dict[str, Any]) -> None:
    del good["prefill"], good["load"]["fixed_s"]
    message = refusal(tmp_path, json.dumps(good))
    assert "prefill: field required" in message
    assert "1 more" in message


def test_noise_within_the_tolerance_is_accepted(tmp_path: Path, good: dict[str, Any]) -> None:
    put(good, "decode.2.time_s", good["decode"][1]["time_s"] * 0.98)
    (tmp_path / "mine.json").write_text(json.dumps(good))
    kept = load_profile(tmp_path / "mine.json").decode[2].time_s
    assert kept == good["decode"][2]["time_s"]


def test_not_json_names_the_line(tmp_path: Path) -> None:
    assert "line 2: not valid JSON" in refusal(tmp_path, '{"platform": "h200",\n oops')


def test_not_an_object(tmp_path: Path) -> None:
    assert "a valid dictionary" in refusal(tmp_path, "[1, 2]")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_profile(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("budgets_gb", [24, 500], "500 GB is more than usable_bytes"),
        ("usable_bytes", 10**12, "more than memory_bytes"),
        ("derived_from", "h100", "derived_from"),
        ("limits.memory_bytes_per_s", -1, "limits.memory_bytes_per_s"),
    ],
)
def test_wrong_platform_field_is_named(tmp_path: Path, field: str, value: Any, says: str) -> None:
    document = json.loads((H200 / "platform.json").read_text())
    put(document, field, value)
    path = tmp_path / "platform.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"platform\.json") as caught:
        load_platform(path)
    assert says in caught.value.message
