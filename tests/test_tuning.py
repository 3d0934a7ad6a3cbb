"""Tuning keeps to bounds, is reproducible, never loses to the defaults, writes what it found."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mmrl.cli.app import app
from mmrl.errors import InputError
from mmrl.rules import Gdsf, Slack, get_rule, rule_class, rule_names
from mmrl.rules.registry import tuned_params
from mmrl.scenarios.registry import get_scenario
from mmrl.tuning import (
    PairedEpisodes,
    draw_candidates,
    draw_rule,
    objective_value,
    planned_episodes,
    tune,
    write_tuned,
)


@pytest.fixture(scope="module")
def scenario() -> Any:
    return get_scenario("demo", load=1.0, utilisation_at_load_1=1.8, duration_s=20, drain_s=10)


@pytest.mark.parametrize("name", rule_names())
def test_candidates_are_valid_and_differ(name: str) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_rule(rule_class(name), rng) for _ in range(50)]
    assert {rule.dispatch for rule in drawn} == {"rr", "edf", "las"}
    for parameter in rule_class(name).tunables():
        assert len({getattr(rule, parameter) for rule in drawn}) > 10


def test_candidates_vary_the_defaults() -> None:
    default, *drawn = draw_candidates(Slack, 40, np.random.default_rng(0))
    kept = [sum(getattr(default, p) == getattr(c, p) for p in Slack.tunables()) for c in drawn]
    assert default == Slack() and 2 < np.mean(kept) < 5
    dispatches = [rule.dispatch for rule in draw_candidates(Gdsf, 40, np.random.default_rng(0))]
    assert dispatches == [None, "rr", "edf", "las"]


def test_the_result_depends_on_the_seed_alone(scenario: Any) -> None:
    told: list[int] = []
    arguments: dict[str, Any] = {"configs": 5, "episodes": 4, "split": "dev"}
    one = tune(Slack, scenario, **arguments, report=lambda played, best: told.append(played))
    assert one == tune(Slack, scenario, **arguments, workers=3)
    assert one.score >= one.default_score
    assert one.played == told[-1] <= planned_episodes(Slack, 5, 4)


def test_every_scenario_is_played(scenario: Any) -> None:
    with pytest.raises(InputError, match="1 episodes of 2 scenarios"):
        PairedEpisodes([scenario, scenario], "dev", 1)


def test_latency_costs_half_a_point_of_goodput_each() -> None:
    outcome = np.array([[0.9, 4.0], [0.7, 6.0], [np.nan, np.nan]])
    assert objective_value(outcome, "goodput") == pytest.approx(0.8)
    assert objective_value(outcome, "goodput-latency") == pytest.approx(0.8 - 0.005 * 5)


def test_test_seeds_are_not_tuned_on(scenario: Any) -> None:
    with pytest.raises(InputError, match="reports"):
        tune(Slack, scenario, split="test", configs=1, episodes=1)


def test_an_entry_is_added_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "tuned.toml"
    params = get_rule("slack").model_dump()
    write_tuned(path, "fast", "slack", {"command": 'say "hi"', "params": params})
    write_tuned(path, "h200-24", "full-swap", {"command": "x", "params": {"dispatch": "rr"}})
    write_tuned(path, "fast", "lru", {"goodput": 0.5, "params": {"keep_alive_s": 1.5}})
    tables = tomllib.loads(path.read_text())
    assert tables["fast"]["slack"] == {"command": 'say "hi"', "params": params}
    assert tables["h200-24"]["full-swap"]["params"] == {"dispatch": "rr"}
    assert tables["fast"]["lru"]["params"] == {"keep_alive_s": 1.5}


def test_a_broken_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tuned.toml"
    path.write_text("[broken")
    with pytest.raises(InputError, match="not valid TOML"):
        write_tuned(path, "fast", "slack", {"params": {}})
    assert path.read_text() == "[broken"


@pytest.mark.parametrize(
    "text", ['description = "a scenario"', "[demo.lru]\nkeep_alive_s = 1", "[demo]\nlru = 1"]
)
def test_a_file_of_something_else_is_told_before_it_is_tuned_and_left_alone(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "other.toml"
    path.write_text(text)
    with pytest.raises(InputError, match="something else than tuned parameters"):
        tuned_params(path)
    with pytest.raises(InputError, match="something else than tuned parameters"):
        write_tuned(path, "fast", "slack", {"params": {}})
    called = CliRunner().invoke(app, ["tune", "lru", "demo", "--out", str(path)])
    assert isinstance(called.exception, InputError) and called.output == ""
    assert path.read_text() == text
