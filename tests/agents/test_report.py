"""A report is a folder that needs no network, and its headline is true whoever wins."""

import errno
import json
import re
import shutil

import pytest

from mmrl.agents.evaluate import evaluate
from mmrl.agents.headline import headlines, overall, points, verdict
from mmrl.agents.report import PAGE, render, write_files, write_report
from mmrl.agents.report_data import POINTS, Report, curves, gather
from mmrl.agents.results import Results
from mmrl.errors import InputError, MmrlError
from mmrl.pages import PLOTLY
from tests.agents.made_up import make_run, make_scenario


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder / "mine")
    results = evaluate(
        ["slack", "lru", str(run)], [make_scenario(folder)], episodes=3, loads=(0.5, 1.0)
    )
    results.write(run / "evaluation")
    return run


@pytest.fixture(scope="module")
def files(run):
    return render(gather([run]))


@pytest.fixture(scope="module")
def index(files):
    return json.loads(re.search(r'id="index">(.*?)</script>', files[PAGE]).group(1))


def content(text):
    """Return name and data of a data file."""
    name, data = re.fullmatch(r'mmrlData\("([^"]+)", (.*)\);\n', text, re.DOTALL).groups()
    return name, json.loads(data)


def test_nothing_is_loaded_from_elsewhere(files):
    assert re.findall(r'src="([^"]*)"', files[PAGE]) == [PLOTLY.name]
    ours = "".join(text for name, text in files.items() if name != PLOTLY.name)
    assert not re.search(r"//cdn|@import", ours)
    assert set(re.findall(r"https?://[^\s\"'`]*", ours)) == {"http://www.w3.org/2000/svg"}
    assert list(files)[-1] == PAGE  # written last


def test_every_data_file_is_named_by_the_index(files, index):
    named = [e["file"] for e in (*index["places"], *index["runs"], *index["episodes"])]
    assert sorted(named) == sorted(name for name in files if name.startswith("data/"))
    assert len(index["places"]) == len(index["runs"]) == 1
    for name in named:
        assert content(files[name])[0] == name


def test_a_cell_for_each_policy_and_load_with_the_figures_of_the_results(run, index):
    cells, names = index["cells"], [policy["name"] for policy in index["policies"]]
    assert names == ["mine", "mine step 0", "slack", "lru"]
    assert sorted(zip(cells["load"], cells["policy"], strict=True)) == [
        (load, k) for load in (0.5, 1.0) for k in range(4)
    ]
    rows = Results.read(run / "evaluation").summary["boards"][0]["rows"]
    for row in rows:
        k = list(zip(cells["load"], cells["policy"], strict=True)).index(
            (row["load"], names.index(row["policy"]))
        )
        assert cells["goodput"][k] == pytest.approx(row["goodput"], rel=1e-3)
        assert cells["best"][k] == row["is_best_rule"]
        assert (cells["versus"][k] is None) == row["is_best_rule"]


def test_a_colour_belongs_to_one_policy(index):
    looks = [(policy["colour"], policy["dash"]) for policy in index["policies"]]
    assert len(set(looks)) == 4
    assert index["runs"][0]["colour"] == index["policies"][0]["colour"]  # of what it trained


def test_recorded_decisions_are_those_of_the_policy(files, index):
    by_policy = {
        entry["policy"]: entry for entry in index["episodes"] if entry["episode"] == "test 0"
    }
    learned = content(files[by_policy[0]["file"]])[1]
    decisions = learned["decisions"]
    assert len(decisions["time_s"]) > 10
    for action, likeliest in zip(decisions["action"], decisions["likeliest"], strict=True):
        chances = [chance for _, chance in likeliest]
        assert likeliest[0][0] == action  # it takes the likeliest
        assert chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1.005
    assert len(decisions["champion"]) == len(decisions["action"])
    assert any(a != b for a, b in zip(decisions["champion"], decisions["action"], strict=True))
    rule = next(content(files[e["file"]])[1] for k, e in by_policy.items() if k >= 2)
    assert "likeliest" not in rule["decisions"] and rule["decisions"]["action"]
    assert [sum(counts) > 0 for _, counts in learned["queues"]].count(True) >= 1


def test_the_suggested_action_is_what_the_policy_of_step_0_does(run):
    """Its weights are zero: it does what the rule that it builds on would do."""
    from mmrl.agents.contenders import resolve
    from mmrl.agents.play import make_boards
    from mmrl.agents.recording import record

    scenario = str(run.parent / "tiny.toml")
    (step0,) = resolve([f"{run}@step0"], ["tiny"])
    (board,) = make_boards([scenario], [1.0], 1)
    decisions = record(board, 1.0, step0, "test")["decisions"]
    assert decisions["champion"] == decisions["action"]


def test_episodes_are_chosen_for_gain_and_loss_and_say_so(run):
    results = Results.read(run / "evaluation")
    table = results.episodes[results.episodes.load == 1.0]
    goodput = table.pivot(index="episode", columns="policy", values="goodput")
    best = next(
        row["policy"]
        for row in results.summary["boards"][0]["rows"]
        if row["is_best_rule"] and row["load"] == 1.0
    )
    gains = goodput["mine"] - goodput[best]
    for entry in results.timelines:
        episode = int(entry["episode"].split()[1])
        if entry["why"].startswith("largest loss"):
            assert gains[episode] == gains.min() < 0
        if entry["why"].startswith("largest gain"):
            assert gains[episode] == gains.max() > 0
    assert {entry["episode"] for entry in results.timelines} == {"test 0", "test 1", "test 2"}


def test_text_of_sources_is_escaped(run):
    material = gather([run])
    for results in material.results.values():
        results.summary["boards"][0]["notes"] = ["<script>alert(1)</script>"]
        results.summary["provenance"]["command"] = "</script><script>alert(1)</script>"
    assert "<script>alert(1)" not in render(material)[PAGE]


def test_results_lead_to_the_run_and_a_run_to_its_results(run, tmp_path):
    by_run, by_results = gather([run]), gather([run / "evaluation"])
    assert list(by_run.results) == list(by_results.results) == [run / "evaluation"]
    assert by_run.runs == by_results.runs == [run]
    assert gather([run.parent]).runs == [run]  # a folder of runs


def test_evaluations_of_the_same_arrivals_are_one_place(run, tmp_path):
    shutil.copytree(run / "evaluation", tmp_path / "again")
    report = Report(gather([run, tmp_path / "again"]))
    assert [place.name for place in report.places] == ["tiny"]
    assert len(report.index()["cells"]["load"]) == 8
    other = json.loads((tmp_path / "again" / "summary.json").read_text())
    other["provenance"]["scenarios"]["tiny"] = "changed"
    (tmp_path / "again" / "summary.json").write_text(json.dumps(other))
    names = [place.name for place in Report(gather([run, tmp_path / "again"])).places]
    assert names == ["tiny (mine)", "tiny (again)"]


def test_traces_of_one_name_and_a_policy_trained_further_are_told_apart(run, tmp_path):
    text = (run / "evaluation" / "summary.json").read_text()
    for k, day in enumerate(("monday", "tuesday")):
        summary = json.loads(text)
        summary["provenance"]["trace_sha256"] = day
        summary["boards"][0]["trace"] = "trace.csv"
        (tmp_path / f"{k}.json").write_text(json.dumps(summary))
    assert len(Report(gather([tmp_path / "0.json", tmp_path / "1.json"])).places) == 2

    summary = json.loads(text)
    mine = next(one for one in summary["policies"] if one["name"] == "mine")
    assert len(mine["sha256"]) == 64
    mine["sha256"] = "0" * 64
    (tmp_path / "later.json").write_text(json.dumps(summary))
    report = Report(gather([run, tmp_path / "later.json"]))
    assert len(report.places) == 1
    assert [name for name, kind, _ in report.policies if kind == "learned"] == ["mine", "mine #2"]


def test_the_shipped_policy_is_one_wherever_the_report_is_made(run, tmp_path):
    text = (run / "evaluation" / "summary.json").read_text().replace('"mine"', '"default"')
    for k, path in enumerate(("default", None)):  # of an evaluation, and of a benchmark
        summary = json.loads(text)
        mine = next(one for one in summary["policies"] if one["name"] == "default")
        mine |= {"path": path, "run": None}
        (tmp_path / f"{k}.json").write_text(json.dumps(summary))
    report = Report(gather([tmp_path / "0.json", tmp_path / "1.json"]))
    names = [name for name, kind, _ in report.policies if kind == "learned"]
    assert names == ["default"]


def test_models_at_a_load_are_those_that_were_played_there(run, files, index):
    detail = content(files[index["places"][0]["file"]])[1]
    table = Results.read(run / "evaluation").models
    for load, policy, model, requests, goodput in detail["models"]:
        name = index["policies"][policy]["name"]
        mine = table[(table.load == load) & (table.policy == name) & (table.model == model)]
        mine = mine[mine.requests > 0]
        assert requests == mine.requests.sum()
        met = (mine.goodput * mine.requests).sum()
        assert goodput == pytest.approx(met / requests, rel=1e-3)
    assert {row[0] for row in detail["models"]} == {0.5, 1.0}


def test_a_summary_alone_is_a_source(run, tmp_path):
    shutil.copy(run / "evaluation" / "summary.json", tmp_path / "kept.json")
    found = render(gather([tmp_path / "kept.json"]))
    assert sum(name.startswith("data/place-") for name in found) == 1
    assert not any(name.startswith("data/episode-") for name in found)


def test_a_long_curve_is_thinned_and_keeps_its_ends(tmp_path):
    run = make_run(tmp_path / "long")
    lines = [f"{step},{step / 1e4}" for step in range(1000)]
    (run / "metrics.csv").write_text("\n".join(["step,serving/goodput", *lines]))
    steps, values = curves(run)["Goodput, training episodes"]
    assert len(steps) == POINTS and (steps[0], steps[-1]) == (0, 999)
    assert values[-1] == pytest.approx(9.99)


def test_a_run_without_evaluation_says_how_to_get_one(tmp_path):
    run = make_run(tmp_path / "young")
    (run / "config.json").write_text('{"scenarios": ["h200-24", "demo"]}')
    page = render(gather([run]))[PAGE]
    assert "Training of young" in page
    assert f"mmrl evaluate --policies {run},slack --scenarios h200-24,demo" in page
    (run / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not the configuration of a run"):
        render(gather([run]))


def test_a_folder_is_replaced_whole_and_another_is_left_alone(run, files, tmp_path):
    page = write_report([run], tmp_path / "report")
    stale = page.parent / "data" / "place-0123456789ab.js"
    stale.write_text("old")
    write_files(files, page.parent)
    assert not stale.exists() and page.is_file()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no report"):
        write_report([run], tmp_path / "notes")
    with pytest.raises(InputError, match="a report is a folder"):
        write_report([run], tmp_path / "report.html")


def test_a_page_that_cannot_be_written_is_not_there(run, tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(MmrlError, match="disk full"):
        write_report([run], tmp_path / "report")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_sources_that_are_nothing(tmp_path):
    with pytest.raises(InputError, match="there is no"):
        gather([tmp_path / "nothing"])
    with pytest.raises(InputError, match="neither a run nor results"):
        gather([tmp_path])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="not the summary of results"):
        gather([tmp_path / "x.json"])


# ---------------------------------------------------------------------- the headline


def board(interval, *, goodput=0.90, rules=3, episodes=9):
    rule_rows = [
        {
            "policy": f"rule{k}",
            "kind": "rule",
            "load": 1.0,
            "goodput": 0.88 - 0.1 * k,
            "episodes": 9,
        }
        | {"is_best_rule": k == 0}
        | ({"vs_best_rule": {"goodput": [-0.1, -0.2, -0.05], "episodes": episodes}} if k else {})
        for k in range(rules)
    ]
    ours = {"policy": "ppo", "kind": "learned", "load": 1.0, "goodput": goodput, "episodes": 9}
    ours |= {"is_best_rule": False, "vs_best_rule": {"goodput": interval, "episodes": episodes}}
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


def test_of_too_few_episodes_nobody_is_said_to_win():
    few = board([0.02, None, None], episodes=2)
    title, detail = headlines(few)[0]
    assert title == (
        "ppo and the best hand-written policy, rule0, on demo at load 1: "
        "too few episodes to tell (2 of at least 6)"
    )
    assert "difference +2.0 points, 2 paired episodes" in detail and "interval" not in detail
    assert overall([few]) == headlines(few)
    (found,) = overall([few, board([0.02, 0.01, 0.03])])
    assert "ppo beats the best hand-written policy in 1 of 1 comparisons" in found.title
    assert "1 more have too few episodes" in found.detail
    few["rows"] = few["rows"][:3]
    title, detail = headlines(few)[0]
    assert title.startswith("3 hand-written policies on demo at load 1: too few episodes to tell")


def test_equals_are_not_ranked():
    rules = board([0, 0, 0])
    rules["rows"] = rules["rows"][:3]
    rules["rows"][1]["vs_best_rule"]["goodput"] = [0.0, 0.0, 0.0]
    title, _ = headlines(rules)[0]
    assert title.startswith("rule0 and rule1 cannot be told apart, the best of 3 hand-written")
    learned = board([0, 0, 0])
    learned["rows"] = [
        {name: value for name, value in learned["rows"][-1].items() if name != "vs_best_rule"}
        | {"policy": name, "goodput": goodput}
        for name, goodput in (("a", 0.9593), ("b", 0.9591))
    ]
    title, detail = headlines(learned)[0]
    assert title.startswith("a and b cannot be told apart") and "95.9 %" in detail
    learned["rows"][0]["goodput"] = 0.97
    assert headlines(learned)[0].title.startswith("a has the highest goodput of 2 policies")


def test_one_episode_is_one_episode():
    alone = board([0, 0, 0])
    alone["rows"] = [alone["rows"][0] | {"episodes": 1}]
    assert headlines(alone)[0].detail.endswith("mean of 1 episode.")


def test_points_have_a_true_sign():
    assert [points(x) for x in (0.0123, -0.0123, 0.0001, -0.0001)] == ["+1.2", "−1.2", "0.0", "0.0"]


def test_several_boards_are_counted():
    many = [board([0.02, 0.01, 0.03]), board([-0.05, -0.08, -0.02]), board([0.01, -0.01, 0.04])]
    (found,) = overall(many)
    assert found.title == (
        "ppo beats the best hand-written policy in 1 of 3 comparisons and loses in 1"
    )
    assert "in 1 the 95 % interval holds zero" in found.detail
    assert "−5.0 to +2.0 points, median +1.0" in found.detail
    assert overall([many[1], many[2]])[0].title == (
        "ppo loses to the best hand-written policy in 1 of 2 comparisons and beats it in none"
    )
    assert "cannot be told apart in any of 2" in overall([many[2], many[2]])[0].title
    assert overall(many[:1]) == headlines(many[0])


def test_a_live_run_is_said_to_be_measured():
    live = board([0.02, 0.01, 0.03])
    live["rows"][-1]["kind"] = "live"
    assert "ppo was measured on a server, the rules were simulated" in headlines(live)[0].detail
