"""`mmrl plan`: what is asked, where goodput falls, and a page that needs nothing else."""

import json
import math
from dataclasses import asdict, replace
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
from mmrl.plan.capacity import Answer, Capacity, Curve, Fit, crossing, play_rates, rule_player
from mmrl.plan.page import as_json, carried, headline
from mmrl.plan.question import LEAST, MOST, scenario_at
from mmrl.profiles.registry import get_platform, get_profile
from mmrl.rollout import EpisodeResult
from mmrl.scenarios import sampler as sampler_module

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
    trace.write_text(trace.read_text().replace("small", SMALL))
    with pytest.raises(InputError, match=r"asks for model 'large'.*mmrl workload fit --mapping"):
        ask([SMALL, "llama3.2-3b"], trace=[trace])


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
    for budgets in ([10000], [40, 10000]):
        with pytest.raises(InputError, match=r"--budget: 10000 GB .* of h200 \(lower it"):
            sites(["h200"], budgets, [])


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
    # what is rarely asked for is loaded anew each time: the last crossing counts
    for first in (1, 0.5):
        found = crossing(rates, np.array([first, 0.95, 0.85, 0.2]))
        assert found is not None and not found.at_least
        assert found.per_s == pytest.approx(2 * math.sqrt(2))
    assert crossing(rates, np.array([1.0, 1.0, 1.0, 0.9])) == Capacity(8, at_least=True)
    assert crossing(rates, np.array([0.8, 0.8, 0.5, 0.1])) is None
    assert crossing(rates, np.array([np.nan, np.nan, 0.5, 0.1])) is None
    curve = Curve("p", rates, np.array([1, 0.9, 0.8, 0.7]), np.array([[1.0, np.nan]] * 4))
    at = curve.at(math.sqrt(8))
    assert at is not None and at[0] == pytest.approx(0.85)
    assert curve.at(9) is None
    assert curve.model_capacity((0.25, 0.75)) == [Capacity(2, at_least=True), None]


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
    first, second = curve.model_capacity((0.5, 0.5))
    assert first is not None and second is not None
    assert first.per_s == pytest.approx(1.1, rel=0.2)  # half of twice the load
    assert second.per_s == pytest.approx(5.0, rel=0.2)
    assert curve.goodput[0] == 1 and curve.goodput[-1] == 0
    grid = capacity.GRID + 1
    assert grid < len(curve.rates_per_s) <= grid + 3 * capacity.REFINED


def test_short_requests_are_played_up_to_what_a_table_holds(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trace = tmp_path / "labels.csv"  # a prompt and one token, as for classification
    rows = [f"{at / 10},a,{20 + at % 180},{1 + at % 3}" for at in range(2000)]
    trace.write_text("arrival_s,model,prompt_tokens,output_tokens\n" + "\n".join(rows))
    monkeypatch.setattr(capacity, "rule_names", lambda: ["slack"])
    monkeypatch.setattr(sampler_module, "PROBE_ROWS", 2**13)
    player = step_player((100.0, 100.0))
    answer = plan_site(ask([SMALL], trace=[trace]), Site("h200", 40), "steps", player)
    assert not answer.fit.reason
    rate = answer.curves[0].rates_per_s[-1]
    assert answer.curves[0].capacity == Capacity(rate, at_least=True)
    assert 0.2 * 2**13 < rate * 120 < 2**13


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "EPISODES", 2)
    monkeypatch.setattr(capacity, "GRID", 3)
    monkeypatch.setattr(capacity, "REFINED", 1)


def test_the_best_rule_carries_most(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"early": (0.2, 0.2), "half": (0.5, 15.0), "late": (1.5, 1.5)}
    monkeypatch.setattr(capacity, "rule_names", lambda: list(limits))
    monkeypatch.setattr(capacity, "rule_player", lambda name: step_player(limits[name]))
    question = ask([SMALL, "qwen2.5-1.5b"])
    # at the policy's capacity `half` serves half of the requests and `late` none: that is no merit
    answer = plan_site(question, Site("h200", 40), "policy", step_player((2.0, 2.0)))
    assert [curve.policy for curve in answer.curves] == ["policy", "late"]
    assert answer.rules["late"] == answer.curves[1].capacity
    answer = plan_site(question, Site("h200", 40), "late", step_player(limits["late"]))
    assert [curve.policy for curve in answer.curves] == ["late"]


@pytest.mark.parametrize(
    ("budget_gb", "verdict"),
    [(8, "all at once"), (7, "takes turns"), (5, "takes turns"), (4.9, "streams layers")],
)
def test_fit_in_words(budget_gb: float, verdict: str) -> None:
    assert Fit((1.5, 3.0), 1.0, (2.0, 1.0), budget_gb).verdict == verdict


def test_all_verbs_need_no_whole_model(quick: None) -> None:
    site = Site("h200", 10)
    refused = plan_site(ask(["qwen2.5-7b"]), site, "slack", rule_player("slack"))
    assert refused.fit.verdict == "does not fit"
    assert "or --verbs full to stream its layers" in refused.fit.reason
    question = ask(["qwen2.5-7b"], verbs="full")
    answer = plan_site(question, site, "slack", rule_player("slack"))
    assert answer.fit.verdict == "streams layers"
    slots_gb = 2 * get_profile("h200", "qwen2.5-7b").layer_bytes / 1e9
    assert answer.fit.reserve_gb == pytest.approx(refused.fit.reserve_gb + slots_gb)
    assert as_json(question, [answer])["verbs"] == "full"
    with pytest.raises(InputError, match="known: core, full"):
        plan_site(ask([SMALL], verbs="xyz"), site, "slack", rule_player("slack"))


# ---------------------------------------------------------------------------- in words


def answer_with(budget_gb: float, goodput_at_end: float) -> Answer:
    """A site at which 90 % are reached at 1/s, or still at 4/s."""
    goodput = np.array([0.9, goodput_at_end, goodput_at_end])
    curve = Curve("it", np.array([1.0, 2.0, 4.0]), goodput, goodput[:, None])
    return Answer(Site("h200", budget_gb), Fit((1.0,), 1.0, (1.0,), budget_gb), [curve])


def test_the_end_of_the_sweep_is_a_lower_bound() -> None:
    question = ask([f"{SMALL}=0.5"])
    low, *more = (answer_with(gb, goodput) for gb, goodput in ((20, 0.5), (60, 0.95), (140, 0.95)))
    assert "carries 1 requests/s, 2 times what is wanted" in headline(question, [low])[0]
    # a tie names all that carry so much
    assert headline(question, [low, *more])[-1] == (
        "Of the alternatives h200, 60 GB and h200, 140 GB carry most: at least 4 requests/s, "
        "at least 4 times as much."
    )
    lead, *_, change = headline(question, more)
    assert "carries at least 4 requests/s, at least 8 times what is wanted" in lead
    assert change.endswith("carries most: at least 4 requests/s, as much as h200, 60 GB.")
    low_link = replace(low, site=Site("h200", 20, 9))  # it carries less than what is a lower bound
    assert headline(question, [more[0], low_link])[-1].endswith("carries most: 1 requests/s.")
    assert carried(more[0].curves[0].capacity) == "≥ 4"
    found = as_json(question, more)["answers"][0]["policies"][0]
    assert found["capacity"] == {"per_s": 4.0, "at_least": True}


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
    assert slack.goodput[0] == 1 and slack.capacity is not None
    assert set(answers[0].rules) > {"slack", "lru", "full-swap"}
    assert any("full-swap" in doing for doing in told)

    page = write_plan(question, answers, tmp_path / "out").read_text(encoding="utf-8")
    own = page.replace(page[page.index("<script>") : page.index("</script>")], "")  # not plotly's
    assert "http://" not in own and "https://" not in own
    assert " src=" not in own and "<link" not in own
    assert "does not fit" in own
    saved = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert saved["answers"][0]["policies"][0]["capacity"] == asdict(slack.capacity)
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
    link = get_platform("consumer-pcie4").link_bytes_per_s / 1e9
    text = run(SMALL, "--platform", "consumer-pcie4", "--link", str(link), "--out", str(out))
    assert "…" not in text and "..." not in text  # nothing is cut on 80 columns
    assert "the shipped policy carries" in text.replace("\n", " ")
    with pytest.raises(InputError, match="unknown model"):
        run("gpt", "--out", str(out))
    with pytest.raises(InputError, match="unknown rule"):
        run(SMALL, "--policy", "nonsense", "--out", str(out))
    with pytest.raises(InputError, match="unknown platform"):
        run(SMALL, "--platform", "mars", "--out", str(out))
