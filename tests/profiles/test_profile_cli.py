"""`mmrl profile`: what it prints is in the files, and bad files end in one line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmrl.cli.profile import app
from mmrl.errors import InputError
from mmrl.profiles import registry
from mmrl.profiles.costs import CostModel
from mmrl.profiles.figure import BATCHES, residency_figure
from mmrl.profiles.link import step_s

SEVEN = registry.DATA / "h200" / "qwen2.5-7b.json"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_list_names_every_pair_and_its_kind() -> None:
    lines = [
        line for line in run("list").splitlines() if " measured " in line or " derived " in line
    ]
    assert len(lines) == sum(len(registry.models(p)) for p in registry.platforms())
    kinds = {p: registry.get_platform(p).kind for p in registry.platforms()}
    measured = sum(len(registry.models(p)) for p in kinds if kinds[p] == "measured")
    assert sum(" measured " in line for line in lines) == measured > 0
    assert "…" not in "".join(lines)


def test_show_prints_numbers_kind_and_errors() -> None:
    text = run("show", "h200", "qwen2.5-7b")
    first = registry.get_profile("h200", "qwen2.5-7b").decode[0]
    for part in (
        "measured",
        f"{first.time_s * 1e3:.2f} ms",
        f"batch {first.batch}, {first.context_tokens} tokens",
        "57,344",
        "NVIDIA H200",
        "leave one",
    ):
        assert part in text
    derived = run("show", "study-a6000", "qwen2.5-7b")
    assert "derived" in derived
    assert "leave one" not in derived


def test_a_step_and_its_overhead_make_the_price_of_a_step() -> None:
    name = next(
        model
        for model in registry.models("h200")
        if (found := registry.get_profile("h200", model).overhead) is not None
        and found.prefill_s > 1e-5
    )
    profile = registry.get_profile("h200", name)
    assert profile.overhead is not None
    text = run("show", "h200", name)
    point, more_s = profile.prefill[0], profile.overhead.prefill_s
    assert f"{point.time_s * 1e3:.2f} ms" in text
    assert f"{more_s * 1e3:.2f} ms  a prefill chunk" in text
    assert CostModel(profile).prefill_s(point.tokens) == pytest.approx(point.time_s + more_s)
    assert "not measured" in run("show", "study-a6000", "qwen2.5-7b")


def test_show_writes_a_plot_that_opens_offline(tmp_path: Path) -> None:
    plot = tmp_path / "h200.html"
    assert str(plot) in run("show", "h200", "--plot", str(plot)).replace("\n", "")
    page = plot.read_text()
    assert "<script src=" not in page
    assert "qwen2.5-14b" in page
    with pytest.raises(InputError, match="--plot"):
        run("show", "h200", "--plot", str(tmp_path / "h200.png"))


def test_check_reports_each_table(tmp_path: Path) -> None:
    text = run("check", str(SEVEN), str(SEVEN.with_name("platform.json")))
    assert text.count("valid, measured") == 2
    assert "decode" in text
    assert "prefill" in text


def test_check_refuses_bad_data_in_one_line(tmp_path: Path) -> None:
    document = json.loads(SEVEN.read_text())
    document["prefill"][0]["time_s"] = -1
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"bad\.json: prefill\.0\.time_s"):
        run("check", str(bad))


def test_figure_draws_the_longer_of_computing_and_streaming() -> None:
    measured = registry.get_profile("h200", "qwen2.5-7b")
    long = tuple(p.model_copy(update={"time_s": p.time_s * p.batch}) for p in measured.decode)
    profile = measured.model_copy(update={"decode": long})
    costs = CostModel(profile)
    whole = profile.stream.fixed_s + 28 * costs.stream_layer_s(1)
    assert step_s(costs, 0, 1, 1024) == pytest.approx(whole)
    assert step_s(costs, 28, 1, 1024) == costs.decode_s(1, 1024)
    assert step_s(costs, 27, 32, 1024) == costs.decode_s(32, 1024)  # hidden by computing
    figure = residency_figure([profile])
    assert len(figure.data) == len(BATCHES)
    (alone,) = (line for line in figure.data if line.name == "batch 1")
    assert alone.y[0] == pytest.approx(1e3 * whole)
    assert "(measured)" in figure.layout.title.text
