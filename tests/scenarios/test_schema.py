from pathlib import Path
from typing import Any

import pytest

from mmrl.errors import InputError
from mmrl.scenarios.registry import DATA, get_scenario, scenario_names
from mmrl.scenarios.targets import Targets, targets_ns

MINIMAL = """
platform = "h200"
budget_gb = 24
models = ["qwen2.5-7b", "llama3.2-3b"]
targets = "chat"
utilisation_at_load_1 = 0.5
[workload.arrivals]
kind = "poisson"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", scenario_names())
def test_shipped_scenarios_are_valid_and_described(name: str) -> None:
    scenario = get_scenario(name)
    assert scenario.name == name
    assert scenario.description.endswith(".")
    # the command that finds the committed number stands beside it
    assert f"mmrl scenarios calibrate {name}" in (DATA / f"{name}.toml").read_text()


def test_a_users_file_takes_its_name_from_the_file(tmp_path: Path) -> None:
    scenario = get_scenario(write(tmp_path, MINIMAL))
    assert scenario.name == "mine"
    assert scenario.platform == ("h200",)
    assert scenario.load == (1.0, 1.0)
    assert scenario.largest_fleet == 2


def test_paths_count_from_the_file(tmp_path: Path) -> None:
    text = MINIMAL.split("[workload")[0] + '[trace]\npaths = ["day.csv"]\n'
    scenario = get_scenario(str(write(tmp_path, text)))
    assert scenario.trace is not None
    assert scenario.trace.paths == (tmp_path / "day.csv",)


def test_an_override_replaces_its_alternative() -> None:
    assert get_scenario("demo").budget_gb == 24
    changed = get_scenario("demo", budget_fraction=0.5, load=[0.5, 1.5], dispatch="edf")
    assert changed.budget_gb is None
    assert changed.budget_fraction == (0.5, 0.5)
    assert changed.load == (0.5, 1.5)
    assert changed.dispatch == "edf"
    assert changed.models == get_scenario("demo").models


VARIED = (
    MINIMAL
    + """
[[variants]]
platform = "./mine"
trace = { paths = "day.csv" }
[[variants]]
platform = ["h200", "./mine"]
load = [0.5, 1.5]
budget_fraction = 0.5
workload = { lengths = { family = "empirical", file = "pairs.csv" } }
"""
)


def test_paths_of_variants_count_from_the_file_too(tmp_path: Path) -> None:
    first, second = get_scenario(write(tmp_path, VARIED)).parts()
    assert first.platform == (str(tmp_path / "mine"),)
    assert first.trace is not None and first.trace.paths == (tmp_path / "day.csv",)
    assert second.platform == ("h200", str(tmp_path / "mine"))
    assert second.workload is not None
    assert second.workload.lengths.file == tmp_path / "pairs.csv"


def test_an_override_holds_in_every_variant(tmp_path: Path) -> None:
    path = write(tmp_path, VARIED)
    before, after = get_scenario(path), get_scenario(path, load=2.0, budget_gb=30)
    assert [part.load for part in before.parts()] == [(1.0, 1.0), (0.5, 1.5)]
    assert [part.load for part in after.parts()] == [(2.0, 2.0)] * 2
    assert [part.budget_gb for part in after.parts()] == [30, 30]  # not a variant's fraction
    assert [part.platform for part in after.parts()] == [part.platform for part in before.parts()]
    parts = get_scenario("universal", platform="l40s", utilisation_at_load_1=9).parts()
    assert {(part.platform, part.utilisation_at_load_1) for part in parts} == {(("l40s",), 9.0)}


def test_variants_that_are_no_tables_are_named(tmp_path: Path) -> None:
    for wrong in ("variants = 3", "variants = [1]"):
        with pytest.raises(InputError, match=r"mine.toml: variants"):
            get_scenario(write(tmp_path, f"{wrong}\n{MINIMAL}"), load=1.0)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("budget_gb", "budgetgb", "unknown field 'budgetgb'.*did you mean 'budget_gb'"),
        ("platform =", "platfrm =", r"unknown field 'platfrm'.*did you mean 'platform'"),
        ("kind =", "knd =", r"unknown field 'workload.arrivals.knd'.*did you mean 'kind'"),
        ('"chat"', '"chatt"', "targets.kind: unknown value 'chatt'.*did you mean 'chat'"),
        ('"poisson"', '"poison"', "workload.arrivals.kind: .*poison"),
        ("budget_gb = 24", "budget_gb = -1", "budget_gb: .*greater than 0"),
        ("budget_gb = 24", "budget_gb = nan", "budget_gb"),
        ("budget_gb = 24", "", "budget_gb or budget_fraction: give one"),
        ("budget_gb = 24", "budget_gb = 24\nbudget_fraction = 0.5", "give only one"),
        (
            "budget_gb = 24",
            "budget_gb = 24\nload = [1.3, 0.5]",
            "load: .*the lower end comes first",
        ),
        ("budget_gb = 24", "budget_gb = 24\ninterval_s = 0.01", "interval_s: 0.01 is below gap_s"),
        ("budget_gb = 24", "budget_gb = 24\nverbs = 'ful'", "verbs: .*did you mean 'full'"),
        ("utilisation_at_load_1 = 0.5", "", "utilisation_at_load_1: field required"),
        ('["qwen2.5-7b", "llama3.2-3b"]', "[]", "models"),
        ("platform =", "platform", "not valid TOML.*line 2"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        get_scenario(write(tmp_path, MINIMAL.replace(old, new)))
    assert "mine.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"platform": "h2000"}, "unknown platform 'h2000'.*did you mean 'h200'"),
        ({"models": ["qwen2.5-7"]}, "qwen2.5-7.*did you mean 'qwen2.5-7b'"),
        ({"budget_gb": 500}, r"budget_gb: 500 GB is more than the \d+\.\d GB of h200"),
        ({"workload": {"popularity": {"shares": [1, 2]}}}, "shares: 2 numbers"),
    ],
)
def test_what_only_the_profiles_tell_is_named(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        get_scenario("demo", **change).sampler()


def test_an_unknown_length_family_is_named_with_its_field() -> None:
    with pytest.raises(InputError, match=r"workload.lengths: .*'chatt' \(did you mean 'chat'"):
        get_scenario("demo", workload={"lengths": {"family": "chatt"}})


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown scenario 'fats'.*did you mean 'fast'"):
        get_scenario("fats")
    with pytest.raises(InputError, match=r"cannot read .*none.toml"):
        get_scenario(tmp_path / "none.toml")


def targets_s(targets: Targets, prompt: int, ttft: float, tpot: float) -> tuple[float, float]:
    ttft_ns, tpot_ns = targets_ns(targets.numbers, prompt, ttft * 1e9, tpot * 1e9)
    return ttft_ns / 1e9, tpot_ns / 1e9


@pytest.mark.parametrize(
    ("kind", "prompt", "alone", "expected"),
    [
        ("sliding", 100, (0.02, 0.01), (0.5, 0.25)),
        ("sliding", 1024, (0.02, 0.01), (2.0, 0.25)),
        ("sliding", 8000, (0.02, 0.01), (8.0, 0.25)),
        ("chat", 8000, (3.0, 0.2), (2.0, 0.1)),
        ("market", 8000, (3.0, 0.2), (10.0, 0.1)),
        ("relative", 8000, (0.1, 0.004), (1.0, 0.04)),
        ("relative", 8000, (0.5, 0.02), (2.5, 0.1)),
    ],
)
def test_targets_by_hand(
    kind: str, prompt: int, alone: tuple[float, float], expected: tuple[float, float]
) -> None:
    assert targets_s(Targets.model_validate(kind), prompt, *alone) == pytest.approx(expected)


def test_targets_of_ones_own() -> None:
    targets = Targets.model_validate({"kind": "relative", "ttft_s": 8, "tpot_s": 0.1})
    assert targets.factor == 5
    assert targets_s(targets, 1, 1.0, 0.01) == pytest.approx((8.0, 0.1))
    with pytest.raises(ValueError, match="below ttft_s"):
        Targets.model_validate({"kind": "sliding", "ttft_s": 9})
