"""`mmrl plan`: what is asked, where goodput falls, and a page that needs nothing else."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mmrl.cli.plan import command
from mmrl.errors import InputError
from mmrl.metrics import EpisodeMetrics
from mmrl.plan import Site, ask, capacity, plan_site, sites, write_plan
from mmrl.plan.capacity import Curve, crossing, play_rates, rule_player
from mmrl.plan.question import LEAST, MOST, scenario_at
from mmrl.profiles.registry import get_platform, get_profile
from mmrl.rollout import EpisodeResult

SMALL = "qwen2.5-0.5b"


# ---------------------------------------------------------------------------- the question


def test_fleet_and_rates() -> None:
    question = ask([f"{SMALL}=3", f"{SMALL}=1"])
    assert question.names == (SMALL, f"{SMALL}#2")
    assert question.shares == (0.75, 0.25)
    assert question.total_per_s == 4
    assert ask([SMALL, SMALL]).shares == (0.5, 0.5)
    assert ask([SMALL]).total_per_s is None


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        (["a=0"], "'0' is not a rate"),
        (["a=fast"], "'fast' is not a rate"),
        (["a=1", "b"], "'b' has no rate"),
        ([], "no model"),
    ],
)
def test_bad_fleets(fleet: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask(fleet)


def test_a_trace_says_the_rates(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{k},{'small' if k % 4 else 'large'},100,20" for k in range(41)]
    trace.write_text("arrival_s,model,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    question = ask([SMALL, "llama3.2-3b"], trace=[trace])
    assert question.rates_per_s == pytest.approx((0.75, 0.25), rel=0.1)
    assert "41 recorded requests" in question.about
    with pytest.raises(InputError, match="rates and a trace"):
        ask([f"{SMALL}=1"], trace=[trace])


def test_alternatives_differ_from_the_site_in_one_thing() -> None:
    found = sites(["h200", "consumer-pcie4"], [40, 80], [128])
    assert found == [
        Site("h200", 40),
        Site("h200", 80),
        Site("consumer-pcie4", 24.7),  # no more is usable there
        Site("h200", 40, 128),
    ]
    usable_gb = math.floor(get_platform("h200").usable_bytes / 1e8) / 10
    assert sites(["h200"], [], []) == [Site("h200", usable_gb)]
    with pytest.raises(InputError, match="--budget"):
        sites(["h200"], [-1], [])


def test_another_link_is_a_platform_of_its_own() -> None:
    question = ask([SMALL])
    doubled = 2 * get_platform("h200").link_bytes_per_s / 1e9
    with scenario_at(question, Site("h200", 10, doubled)) as scenario:
        moved = scenario.sampler().bank
    with scenario_at(question, Site("h200", 10)) as scenario:
        plain = scenario.sampler().bank
    profile = get_profile("h200", SMALL)
    saved_s = 1e-9 * (plain.constants["load_layer_ns"] - moved.constants["load_layer_ns"])
    assert saved_s == pytest.approx(profile.layer_bytes / profile.load.bytes_per_s / 2, rel=0.001)
    assert (plain.constants["load_fixed_ns"] == moved.constants["load_fixed_ns"]).all()
    assert (plain.decode_tables == moved.decode_tables).all()


# ---------------------------------------------------------------------------- capacity


def test_where_goodput_falls() -> None:
    rates = np.array([1.0, 2.0, 4.0, 8.0])
    assert crossing(rates, np.array([1, 0.95, 0.85, 0.2])) == pytest.approx(2 * math.sqrt(2))
    # what is rarely asked for is loaded anew each time: the last crossing counts
    assert crossing(rates, np.array([0.5, 0.95, 0.85, 0.2])) == pytest.approx(2 * math.sqrt(2))
    assert crossing(rates, np.array([1.0, 1.0, 1.0, 0.9])) == 8
    assert crossing(rates, np.array([0.8, 0.8, 0.5, 0.1])) is None
    assert crossing(rates, np.array([np.nan, np.nan, 0.5, 0.1])) is None
    curve = Curve("p", rates, np.array([1, 0.9, 0.8, 0.7]), np.array([[1.0, np.nan]] * 4))
    found = curve.at(math.sqrt(8))
    assert found is not None and found[0] == pytest.approx(0.85)
    assert curve.at(9) is None
    assert curve.model_capacity_per_s((0.25, 0.75)) == [2, None]


def step_player(limits: tuple[float, float]) -> Any:
    """Each model is served well up to its own load, and not at all above."""

    def play(sampler: Any, episodes: Any, options: Any) -> list[EpisodeResult]:
        good = np.array([float(options["load"] <= limit) for limit in limits])
        models = {"requests": np.full(2, 10.0), "goodput": good}
        metrics = EpisodeMetrics({}, models)
        return [EpisodeResult(split, k, None, metrics) for split, k in episodes]

    return play


def test_rates_are_refined_where_a_model_falls() -> None:
    sampler: Any = SimpleNamespace(rates_at_load_1=(2.0, 2.0, 2.0))
    curve = play_rates(sampler, "steps", step_player((1.1, 5.0)), wanted_per_s=3.0)
    assert curve.rates_per_s[0] == 2 * LEAST and curve.rates_per_s[-1] == pytest.approx(2 * MOST)
    assert 3.0 in curve.rates_per_s
    first, second = curve.model_capacity_per_s((0.5, 0.5))
    assert first == pytest.approx(1.1, rel=0.2)  # half of twice the load
    assert second == pytest.approx(5.0, rel=0.2)
    assert curve.goodput[0] == 1 and curve.goodput[-1] == 0
    grid = capacity.GRID + 1
    assert grid < len(curve.rates_per_s) <= grid + 3 * capacity.REFINED


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "EPISODES", 2)
    monkeypatch.setattr(capacity, "GRID", 3)
    monkeypatch.setattr(capacity, "REFINED", 1)


def test_a_plan_from_question_to_page(quick: None, tmp_path: Path) -> None:
    question = ask([f"{SMALL}=0.5", "qwen2.5-1.5b=0.5"])
    told: list[str] = []
    answers = [
        plan_site(question, site, "slack", rule_player("slack"), told.append)
        for site in (Site("consumer-pcie4", 16), Site("consumer-pcie4", 3))
    ]
    assert answers[0].fit.verdict == "all at once"
    assert answers[1].fit.verdict == "does not fit"
    assert "qwen2.5-1.5b can never fit" in answers[1].fit.reason
    assert "raise the budget to" in answers[1].fit.reason
    assert not answers[1].curves
    (slack, *_) = answers[0].curves
    assert slack.goodput[0] == 1
    assert set(answers[0].rules) > {"slack", "lru", "full-swap"}
    assert any("full-swap" in doing for doing in told)

    page = write_plan(question, answers, tmp_path / "out").read_text(encoding="utf-8")
    own = page.replace(page[page.index("<script>") : page.index("</script>")], "")  # not plotly's
    assert "http://" not in own and "https://" not in own
    assert " src=" not in own and "<link" not in own
    assert "does not fit" in own
    saved = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert saved["answers"][0]["policies"][0]["capacity_per_s"] == slack.capacity_per_s
    assert saved["answers"][1]["policies"] == []


def test_the_command_line(quick: None, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)

    def run(*arguments: str) -> str:
        return CliRunner().invoke(app, [*arguments], catch_exceptions=False).output

    out = tmp_path / "out"
    text = run(SMALL, "--platform", "consumer-pcie4", "--policy", "lru", "--out", str(out))
    assert "lru carries" in text.replace("\n", " ")
    assert (out / "index.html").exists()
    text = run(SMALL, "--platform", "consumer-pcie4", "--out", str(out))
    assert "the shipped policy carries" in text.replace("\n", " ")
    with pytest.raises(InputError, match="unknown model"):
        run("gpt", "--out", str(out))
    with pytest.raises(InputError, match="unknown rule"):
        run(SMALL, "--policy", "nonsense", "--out", str(out))
    with pytest.raises(InputError, match="unknown platform"):
        run(SMALL, "--platform", "mars", "--out", str(out))
