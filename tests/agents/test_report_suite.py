"""A benchmark's result becomes places, cells and a headline; figures are worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmrl.agents.report import PAGE, render
from mmrl.agents.report_data import Report, gather
from mmrl.agents.report_suite import read_suite, suite_headline
from mmrl.agents.suite import RESULT
from mmrl.agents.suite_results import columns


def figure(load: float, policy: str, goodput: float) -> dict[str, Any]:
    return {
        "cell": f"fast-chat-{load}", "policy": policy, "episodes": 300, "requests": 50.0,
        "goodput": goodput, "goodput_low": goodput - 0.01, "goodput_high": goodput + 0.01,
        "goodput_worst_model": 0.5, "norm_latency": 2.0, "longest_wait_s": 9.0, "ttft_p50_s": 0.1,
        "all_ttft_p99_s": 3.0, "loads_per_s": 0.2, "preemptions_per_s": 0.1,
    }  # fmt: skip


def compared(load: float, policy: str, reference: str, rule: str, gain: float) -> dict[str, Any]:
    row = {"cell": f"fast-chat-{load}", "policy": policy, "reference": reference, "rule": rule}
    row |= {"goodput": gain, "goodput_low": gain - 0.01, "goodput_high": gain + 0.01, "seeds": 2}
    return row | {"p": 0.01, "p_holm": 0.02}


@pytest.fixture
def result(tmp_path: Path) -> Path:
    cell = {"platform": "fast", "family": "chat", "variation": "", "group": "core", "origin": ""}
    cell |= {"trace": "", "split": "test"}
    kinds = {"slack once": "rule", "slack cell": "rule", "ppo 0": "learned", "ppo 1": "learned"}
    goodputs = {"slack once": 0.80, "slack cell": 0.82, "ppo 0": 0.84, "ppo 1": 0.88}
    pool = {"pool": "core", "platform": "", "load": None, "policy": "ppo", "seeds": 2, "cells": 2}
    pool |= {"goodput": 0.04, "goodput_low": 0.03, "goodput_high": 0.05, "p": 0.001}
    pool |= {"goodput_reference": 0.82, "stronger": True, "reference": "cell"}
    target = {"policy": "ppo", "target": "wins pooled", "met": True, "detail": "<b>+4.0</b>"}
    target |= {"value": 0.04, "low": 0.03, "high": 0.05, "limit": 0.0}
    found = {
        "format": 1, "suite": "v1", "complete": False, "episodes": 300,
        "bootstrap": {"seed": 0}, "code_hash": "", "suite_hash": "",
        "cells": columns([{"cell": f"fast-chat-{x}", "load": x} | cell for x in (0.8, 1.0)]),
        "policies": columns(
            [
                {"policy": name, "kind": kind, "group": name[:3] if kind == "learned" else ""}
                for name, kind in kinds.items()
            ]
        ),
        "figures": columns([figure(x, p, g) for x in (0.8, 1.0) for p, g in goodputs.items()]),
        "compared": columns(
            [
                compared(x, "ppo", reference, f"slack {reference}", gain)
                for x in (0.8, 1.0)
                for reference, gain in (("once", 0.06), ("cell", 0.04), ("lru", 0.2))
            ]
        ),
        "pools": columns([pool, pool | {"reference": "once", "stronger": False}]),
        "verdicts": columns([target, target | {"target": "half", "met": None}]),
        "provenance": {
            "time": "2026-01-02T03:04:05+00:00", "command": "mmrl", "commit": None,
            "versions": {}, "machine": {}, "scenarios": {},
        },
    }  # fmt: skip
    (tmp_path / RESULT).write_text(json.dumps(found))
    return tmp_path


def test_seeds_together_are_held_against_the_stronger_comparator(result: Path) -> None:
    (board,) = read_suite(result).summary["boards"]
    assert (board["name"], board["loads"], board["main_load"]) == ("fast chat", [0.8, 1.0], 1.0)
    rows = {row["policy"]: row for row in board["rows"] if row["load"] == 1.0}
    assert not [name for name in rows if name.startswith("ppo ")]  # they stand in the pools
    assert rows["ppo"]["goodput"] == pytest.approx(0.86)  # the mean of its seeds
    assert (rows["ppo"]["episodes"], rows["ppo"]["loads_per_s"]) == (300, 0.2)
    assert rows["ppo"]["requests"] == 15_000  # of all episodes, as in other results
    assert rows["ppo"]["vs_best_rule"]["policy"] == "slack cell"
    assert rows["ppo"]["vs_best_rule"]["goodput"] == pytest.approx([0.04, 0.03, 0.05])
    assert [name for name, row in rows.items() if row["is_best_rule"]] == ["slack cell"]


def test_a_policy_trained_for_some_cells_stands_in_these_alone(result: Path) -> None:
    found = json.loads((result / RESULT).read_text())
    there = [f"there@*-1.0 {seed}" for seed in (0, 1)]
    for name in there:  # nobody compares it with the rules: it only shows what training there gains
        for table, row in (
            ("policies", {"policy": name, "kind": "learned", "group": "there@*-1.0"}),
            ("figures", figure(1.0, name, 0.9)),
        ):
            for key, value in row.items():
                found[table][key].append(value)
    (result / RESULT).write_text(json.dumps(found))
    (board,) = read_suite(result).summary["boards"]
    rows = [row for row in board["rows"] if row["policy"].startswith("there")]
    assert [(row["policy"], row["load"], row["kind"]) for row in rows] == [
        ("there@*-1.0", 1.0, "learned")
    ]


def test_a_page_begins_with_the_pooled_verdict(result: Path) -> None:
    material = gather([result / RESULT])
    page = render(material)[PAGE]
    (suite,) = Report(material).suites
    title, detail = suite_headline(suite) or ("", "")
    assert title == "ppo beats the best hand-written policies by +4.0 points on benchmark v1"
    assert "interval +3.0 to +5.0. Of 2 targets 1 are met, 0 missed." in detail
    assert f"<h1>{title}</h1>" in page
    assert "<td>0.04</td><td>0</td>" in page and "0.03 to 0.05" in page
    assert "not complete" in page and "not decided" in page and "<b>+4.0" not in page
