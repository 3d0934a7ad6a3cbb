"""A report is one page that needs no network, and its headline is true whoever wins."""

import errno
import re

import pytest
from plotly.offline import get_plotlyjs

from mmrl.agents.evaluate import evaluate
from mmrl.agents.headline import headlines, points, verdict
from mmrl.agents.report import gather, render, write_report
from mmrl.errors import InputError, MmrlError
from tests.agents.made_up import make_run, make_scenario


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder / "mine")
    results = evaluate(
        ["slack", "lru", str(run)], [make_scenario(folder)], episodes=2, loads=(0.5, 1.0)
    )
    results.write(run / "evaluation")
    return run


@pytest.fixture(scope="module")
def page(run):
    return render(gather([run])).replace(get_plotlyjs(), "PLOTLY")


def test_nothing_is_loaded_from_elsewhere(page):
    assert page.count("PLOTLY") == 1
    assert not re.search(r"https?://|//cdn|@import|src=", page)


def test_every_section_is_there(page):
    for part in (
        "Goodput against load",
        "Performance profile",
        "Time to first token",
        "Time per output token",
        "Normalised latency",
        "One episode, 2 policies",
        "Decisions",
        "Bytes over the link",
        "Goodput of each model",
        "Training",
        "Goodput on development episodes",
        "Provenance",
    ):
        assert part in page, part
    assert page.count('<div class="plot"') == page.count('type="application/json"') >= 10


def test_the_table_has_all_policies_and_the_best_rule_once(page):
    table = page.partition('<table class="policies">')[2].partition("</table>")[0]
    for policy in ("mine", "mine step 0", "slack", "lru"):
        assert f"</i>{policy}</th>" in table
    assert table.count(">best rule<") == 1


def test_a_colour_belongs_to_a_policy_everywhere(page):
    legend = dict(re.findall(r'data-policy="([^"]+)".*?background:(#\w+)', page, re.DOTALL))
    cells = re.findall(r'background:(#\w+)"></i>([^<]+)</th>', page)
    table = {name: colour for colour, name in cells}
    assert legend == table and len(set(legend.values())) == 4


def test_names_are_escaped(run):
    material = gather([run])
    for results in material.results.values():
        results.summary["boards"][0]["notes"] = ["<script>alert(1)</script>"]
        results.summary["provenance"]["command"] = "<script>alert(1)</script>"
    assert "<script>alert(1)" not in render(material)


def test_results_lead_to_the_run_and_a_run_to_its_results(run):
    by_run, by_results = gather([run]), gather([run / "evaluation"])
    assert list(by_run.results) == list(by_results.results) == [run / "evaluation"]
    assert by_run.runs == by_results.runs == [run]


def test_a_run_without_evaluation_says_how_to_get_one(tmp_path):
    page = render(gather([make_run(tmp_path / "young")]))
    assert "Training of young" in page and "have not been evaluated: mmrl evaluate" in page


def test_a_page_that_cannot_be_written_is_not_there(run, tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(MmrlError, match="disk full"):
        write_report([run], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_sources_that_are_nothing(tmp_path):
    with pytest.raises(InputError, match="there is no"):
        gather([tmp_path / "nothing"])
    with pytest.raises(InputError, match="neither a run nor results"):
        gather([tmp_path])


# ---------------------------------------------------------------------- the headline


def board(interval, *, goodput=0.90, rules=3):
    rule_rows = [
        {
            "policy": f"rule{k}",
            "kind": "rule",
            "load": 1.0,
            "goodput": 0.88 - 0.1 * k,
            "episodes": 9,
        }
        | {"is_best_rule": k == 0}
        for k in range(rules)
    ]
    ours = {"policy": "ppo", "kind": "learned", "load": 1.0, "goodput": goodput, "episodes": 9}
    ours |= {"is_best_rule": False, "vs_best_rule": {"goodput": interval}}
    return {"name": "demo", "main_load": 1.0, "rows": [*rule_rows, ours]}


def test_a_win():
    title, detail = headlines(board([0.02, 0.01, 0.03]))[0]
    assert title.startswith("ppo beats the best hand-written policy, rule0, by 2.0 points")
    assert "90.0 % against 88.0 % of rule0, the best of 3 rules" in detail
    assert "95 % interval +1.0 to +3.0" in detail


def test_a_loss():
    title, detail = headlines(board([-0.05, -0.08, -0.02], goodput=0.83))[0]
    assert title.startswith("ppo loses to the best hand-written policy, rule0, by 5.0 points")
    assert "difference −5.0 points" in detail


@pytest.mark.parametrize("interval", [[0.02, -0.001, 0.04], [-0.01, -0.03, 0.0], [0.0, 0.0, 0.0]])
def test_a_tie_is_claimed_by_nobody(interval):
    title, _ = headlines(board(interval))[0]
    assert "cannot be told apart" in title
    assert verdict(interval) == "ties"


def test_nothing_learned_and_nothing_to_compare():
    rules_only = board([0, 0, 0])
    rules_only["rows"] = rules_only["rows"][:3]
    assert headlines(rules_only)[0].title.startswith("rule0 is the best of 3 hand-written policies")
    rules_only["rows"] = rules_only["rows"][:1]
    assert "nothing was compared" in headlines(rules_only)[0].title
    assert "cannot be compared" in headlines(board(None))[0].title


def test_points_have_a_true_sign():
    assert [points(x) for x in (0.0123, -0.0123, 0.0001, -0.0001)] == ["+1.2", "−1.2", "0.0", "0.0"]
