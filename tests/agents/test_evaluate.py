"""An evaluation is paired, the same on any number of processes, and whole on disk or not there."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mmrl.agents import windows as windows_module
from mmrl.agents.contenders import everyone, resolve
from mmrl.agents.evaluate import evaluate
from mmrl.agents.report_data import gather
from mmrl.agents.results import Results
from mmrl.agents.windows import cut, fit
from mmrl.cli.app import app
from mmrl.cli.evaluate import print_results
from mmrl.errors import InputError, MmrlError
from mmrl.rules import get_rule, rule_names
from mmrl.rules.registry import tuned_params
from mmrl.scenarios.calibrate import rule_goodput
from mmrl.scenarios.registry import get_scenario
from mmrl.stats import bootstrap
from mmrl.tuning import write_tuned
from mmrl.workloads.trace import Trace
from tests.agents.made_up import make_policy, make_run, make_scenario


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_scenario(tmp_path_factory.mktemp("scenario"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def results(tiny, run):
    return evaluate(["slack", "lru", str(run)], [tiny], episodes=6, loads=(0.5, 1.0))


def row(results, policy, load=1.0):
    rows = results.summary["boards"][0]["rows"]
    return next(r for r in rows if r["policy"] == policy and r["load"] == load)


def test_a_run_brings_its_step_0_policy(results):
    kinds = {p["name"]: p["kind"] for p in results.summary["policies"]}
    assert kinds == {"slack": "rule", "lru": "rule", "mine": "learned", "mine step 0": "step0"}


def test_all_policies_meet_the_same_arrivals(results):
    for (load, episode), group in results.episodes.groupby(["load", "episode"]):
        assert group.requests.nunique() == 1, (load, episode)
        assert group.policy.nunique() == len(group) == 4
    assert not (results.episodes.illegal_actions > 0).any()


def test_the_policy_before_training_does_as_its_rule(results):
    columns = ["load", "episode", "goodput", "norm_latency", "loads_per_s"]
    tables = [
        results.episodes[results.episodes.policy == name][columns].reset_index(drop=True)
        for name in ("slack", "mine step 0")
    ]
    pd.testing.assert_frame_equal(*tables)


def test_figures_are_those_of_the_episodes(results):
    at_one = results.episodes[results.episodes.load == 1.0].set_index(["policy", "episode"])
    assert row(results, "lru")["goodput"] == pytest.approx(at_one.goodput["lru"].mean())
    best = max(("slack", "lru"), key=lambda name: at_one.goodput[name].mean())
    assert row(results, best)["is_best_rule"]
    difference = (at_one.goodput["mine"] - at_one.goodput[best]).to_numpy()
    assert row(results, "mine")["vs_best_rule"]["goodput"] == pytest.approx(
        list(bootstrap([difference]))
    )
    assert row(results, "mine")["vs_step0"]["policy"] == "mine step 0"
    median = results.latencies.query(
        "policy == 'lru' and load == 1 and metric == 'ttft_s' and quantile == 0.5"
    )
    assert row(results, "lru")["ttft_p50_s"] == pytest.approx(median.value.item())


def test_models_add_up_to_the_whole(results):
    models = [m for m in results.summary["boards"][0]["models"] if m["policy"] == "slack"]
    assert [m["model"] for m in models] == ["qwen2.5-7b", "llama3.2-3b", "qwen2.5-7b#2"]
    assert sum(m["requests"] for m in models) == row(results, "slack")["requests"]


def test_the_same_on_one_process_and_on_two(results, tiny, run):
    again = evaluate(["slack", "lru", str(run)], [tiny], episodes=6, loads=(0.5, 1.0), workers=2)
    pd.testing.assert_frame_equal(results.episodes, again.episodes)
    pd.testing.assert_frame_equal(results.models, again.models)
    pd.testing.assert_frame_equal(results.latencies, again.latencies)
    assert results.timelines == again.timelines


def test_what_is_written_is_read_back(results, tmp_path):
    results.write(tmp_path / "out")
    results.write(tmp_path / "out")  # replaces results
    again = Results.read(tmp_path / "out")
    assert again.summary == json.loads(json.dumps(results.summary))
    pd.testing.assert_frame_equal(again.episodes, results.episodes)
    assert os.listdir(tmp_path) == ["out"]
    about = again.summary["provenance"]
    assert about["split"] == "test" and about["versions"]["mmrl"] and about["scenarios"]["tiny"]


def test_a_full_disk_leaves_the_old_results_and_no_others(results, tmp_path, monkeypatch):
    results.write(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    calls = iter(range(100))

    def fsync(descriptor):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(MmrlError, match="disk full"):
        results.write(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_while_writing_leaves_nothing(results, tmp_path, monkeypatch):
    def interrupt(path, obj):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmrl.agents.results.write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        results.write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_results_do_not_replace_anything_else(results, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no results"):
        results.write(tmp_path)
    (tmp_path / "summary.json").write_text('{"loss": 0.1}')  # of another tool
    with pytest.raises(InputError, match="holds no results"):
        results.write(tmp_path)
    (tmp_path / "thesis.tex").rename(tmp_path.with_suffix(".tex"))
    (tmp_path / "summary.json").unlink()
    results.write(tmp_path)
    tmp_path.with_suffix(".tex").rename(tmp_path / "thesis.tex")
    with pytest.raises(InputError, match=r"thesis\.tex beside results"):
        results.write(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_results_measured_live_are_never_replaced(results, tmp_path):
    results.write(tmp_path / "live")
    summary = json.loads((tmp_path / "live" / "summary.json").read_text())
    summary["provenance"]["live"] = "test 0"
    (tmp_path / "live" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match="measured live"):
        results.write(tmp_path / "live")


def test_an_evaluation_leaves_those_of_other_commands_as_they_are(tiny, tmp_path, monkeypatch):
    run = make_run(tmp_path / "mine")

    def evaluated(*options):
        monkeypatch.setattr("sys.argv", ["mmrl", "evaluate", *options])
        command = ["evaluate", "--policies", f"{run},lru", "--scenarios", tiny, "--workers", "1"]
        called = CliRunner().invoke(app, [*command, "--record", "0", *options])
        if called.exception is not None:
            raise called.exception

    def summaries():
        return {path.parent.name: path.read_text() for path in tmp_path.glob("*/*/summary.json")}

    evaluated("--episodes", "2")
    first = summaries()["evaluation"]
    evaluated("--episodes", "1")
    assert summaries().keys() == {"evaluation", "evaluation-2"}
    evaluated("--episodes", "1")  # a command replaces its own results
    assert summaries().keys() == {"evaluation", "evaluation-2"}
    assert summaries()["evaluation"] == first
    assert len(gather([run]).results) == 2
    with pytest.raises(InputError, match="results of another command"):
        evaluated("--episodes", "1", "--out", str(run / "evaluation"))
    assert summaries()["evaluation"] == first


def test_a_trace_is_cut_into_windows_that_all_policies_meet(tiny, tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    rows = [f"{k * 0.9:.1f},{'ab'[k % 2]}{k % 3},{50 + k},{20 + k}" for k in range(300)]
    trace.write_text("arrival_s,model,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    found = evaluate(["slack", "lru"], [tiny], traces=[trace], episodes=2)
    board = found.summary["boards"][0]
    assert board["name"] == "tiny, trace.csv"
    assert "cut into 2 episodes of 12 s" in board["notes"][-1]
    assert any("time dilation" in note for note in board["notes"])
    counts = found.episodes.groupby("episode").requests.agg(["nunique", "count", "min"])
    assert (counts["nunique"] == 1).all() and (counts["count"] == 2).all()
    assert (counts["min"] > 0).all()
    versus = row(found, "lru").get("vs_best_rule") or row(found, "slack")["vs_best_rule"]
    assert versus["episodes"] == 2 and versus["goodput"][1:] == [None, None]
    print_results(found, Console(width=120, highlight=False), asked=10)
    printed = capsys.readouterr().out
    assert (
        "too few episodes to tell (2 of at least 6)" in printed and "95 % interval +" not in printed
    )
    assert "2 episodes at load 1 (10 asked for, the trace has 2)" in printed


@pytest.mark.parametrize("prompt_tokens", [60, 4000])
def test_load_1_of_a_trace_is_where_the_slack_rule_has_a_goodput_of_90(tiny, prompt_tokens):
    """Whatever its requests: as many seconds of service alone are not as much work."""
    n = 4000
    prompts = np.full(n, prompt_tokens, np.int32)
    arrivals = np.arange(n, dtype=np.int64) * 10**8
    models = (np.arange(n, dtype=np.int32) * 7) % 3
    batch = np.zeros(n, np.bool_)
    raw = Trace(arrivals, models, prompts, np.full(n, 30, np.int32), batch, ("a", "b", "c"), 400.0)
    sampler = get_scenario(tiny).sampler()
    fitted = fit(raw, sampler)
    windows = cut(fitted, sampler, 1.0, 60)
    assert "that is load 1: the slack rule has a goodput of 0." in windows.notes[-2]
    sampler.capacity = max(map(len, windows.traces))
    goodput = rule_goodput(sampler, [{"trace": trace} for trace in windows.traces])
    assert goodput == pytest.approx(0.9, abs=0.06)
    requests, of_twice = (
        np.mean([len(trace) for trace in cut(fitted, sampler, load, 60).traces]) for load in (1, 2)
    )
    assert of_twice == pytest.approx(2 * requests, rel=0.05)


def test_a_trace_that_can_never_be_served_well_has_the_load_of_its_scenario(tiny, monkeypatch):
    monkeypatch.setattr(windows_module, "rule_goodput", lambda sampler, episodes: 0.5)
    raw = Trace(
        np.arange(50, dtype=np.int64) * 10**9,
        np.zeros(50, np.int32),
        *(np.full(50, 40, np.int32), np.full(50, 30, np.int32), np.zeros(50, np.bool_)),
        ("a",),
        50.0,
    )
    fitted = fit(raw, get_scenario(tiny).sampler())
    assert "stays below 0.9 at any load: load 1 is that of the scenario" in fitted.notes[-1]
    assert 0 < fitted.rate_per_s < np.inf


def test_what_a_model_can_never_hold_is_left_out_of_a_trace(tiny, tmp_path):
    trace = tmp_path / "trace.csv"
    rows = [f"{k * 0.9:.1f},a,{2**22 if k == 3 else 50},20" for k in range(60)]
    trace.write_text("arrival_s,model,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    found = evaluate(["slack"], [tiny], traces=[trace], episodes=1)
    (board,) = found.summary["boards"]
    assert any("left out 1 of 60 requests" in note for note in board["notes"])


def test_tables_name_policies_and_the_winner(results, capsys):
    print_results(results, Console(width=80, highlight=False))
    printed = capsys.readouterr().out
    for part in ("mine step 0", "vs best", "TTFT p50", "Goodput at each load", "Goodput of each"):
        assert part in printed
    best = next(name for name in ("slack", "lru") if row(results, name)["is_best_rule"])
    assert f"hand-written policy, {best}," in " ".join(printed.split())


def test_a_rule_tuned_for_the_scenario_comes_with_the_champion(monkeypatch):
    slack = get_rule("slack")
    name = slack.tunables()[0]
    changed = {name: getattr(slack, name) * 0.9}
    table = {"demo": {"slack": changed, "lru": {}}, "fast": {"slack": slack.model_dump()}}
    for module in ("mmrl.rules.registry", "mmrl.agents.contenders"):
        monkeypatch.setattr(f"{module}.tuned_params", lambda path=None: table)
    assert [c.name for c in resolve(["lru", "slack"], ["demo"])] == ["lru", "slack", "slack@tuned"]
    assert [c.name for c in resolve(["slack"], ["fast"])] == ["slack"]
    assert [c.name for c in resolve(["slack@tuned"], ["fast"])] == ["slack@tuned"]
    assert [c.name for c in resolve(["lru@tuned"], ["demo", "fast"])] == ["lru@tuned"]
    with pytest.raises(InputError, match=r"no 'gdsf' tuned for demo.*gdsf@runs/tuned.toml"):
        resolve(["gdsf@tuned"], ["demo"])
    table["universal"] = {"gdsf": {}}
    assert resolve(["gdsf@tuned"], ["demo"])[0].plays("demo")  # tuned for fleets of any kind


def test_a_rule_plays_with_the_parameters_of_a_file(tmp_path):
    entry = {"params": {"keep_alive_s": 7.0}}
    write_tuned(tmp_path / "mine.toml", "demo", "lru", entry)
    shipped, mine = resolve(["lru", f"lru@{tmp_path / 'mine.toml'}"], ["demo"])
    assert (shipped.name, mine.name) == ("lru", "lru@mine.toml")
    assert mine.rule_for("demo") == get_rule("lru", keep_alive_s=7.0) != shipped.rule_for("demo")
    assert mine.plays("demo") and not mine.plays("fast")
    with pytest.raises(InputError, match=r"mine.toml has no 'lru' tuned for fast"):
        resolve([f"lru@{tmp_path / 'mine.toml'}"], ["fast"])
    with pytest.raises(InputError, match=r"cannot read none\.toml"):
        resolve(["lru@none.toml"], ["demo"])


def test_who_knows_the_future_takes_part_but_is_no_rule(tiny):
    results = evaluate(["lru", "clairvoyant"], [tiny], episodes=2)
    assert row(results, "clairvoyant")["kind"] == "bound"
    assert row(results, "lru")["is_best_rule"] and not row(results, "clairvoyant")["is_best_rule"]
    assert not (results.episodes.illegal_actions > 0).any()
    mpc = resolve(["mpc"], ["fast"])[0]
    assert mpc.kind == "rule"
    assert mpc.planner_for("fast").base == get_rule("slack", **tuned_params()["fast"]["slack"])


def test_the_shipped_policy_and_all_rules_take_part_where_nobody_is_named(tiny, tmp_path):
    options = ["--episodes", "2", "--record", "0", "--workers", "1"]
    out = tmp_path / "out"
    called = CliRunner().invoke(
        app, ["evaluate", "--scenarios", tiny, *options, "--out", str(out)], catch_exceptions=False
    )
    assert called.exit_code == 0, called.output
    kinds = {p["name"]: p["kind"] for p in Results.read(out).summary["policies"]}
    rules = *rule_names(), "slack@tuned", "partial@tuned"
    assert kinds == {"default": "learned", **dict.fromkeys(rules, "rule")}


def test_the_shipped_policy_stays_away_from_verbs_that_it_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setattr("mmrl.agents.export.DEFAULT_FOLDER", make_policy(tmp_path / "core", 0.1))
    rules = [*rule_names(), "slack@tuned", "partial@tuned"]
    assert everyone(["demo"]) == ["default", *rules]
    assert everyone(["demo", "oversized"]) == rules


def test_names_of_learned_policies(run, tmp_path):
    export = make_policy(tmp_path / "export", 0.1)
    names = [c.name for c in resolve([f"ours={run}", str(export)], ["demo"])]
    assert names == ["ours", "ours step 0", "export"]
    assert [c.kind for c in resolve([f"{run}@step0"], ["demo"])] == ["step0"]
    with pytest.raises(InputError, match="two policies are named 'mine'"):
        resolve([str(run), f"mine={export}"], ["demo"])
    with pytest.raises(InputError, match="not a run"):
        resolve([f"{export}@step0"], ["demo"])


@pytest.mark.parametrize(
    ("policy", "said"),
    [("slak", "did you mean 'slack'"), ("runs/nowhere", "unknown policy"), ("", "unknown policy")],
)
def test_an_unknown_policy_is_an_error_with_a_remedy(policy, said):
    with pytest.raises(InputError, match=said):
        resolve([policy], ["demo"])


def test_only_folders_that_hold_a_policy_are_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ours3").mkdir(parents=True)
    (tmp_path / "runs" / "ours3" / "summary.json").write_text("{}")
    with pytest.raises(InputError) as found:
        resolve(["runs/ours4"], ["demo"])
    assert "did you mean" not in str(found.value)
    make_run(tmp_path / "runs" / "ours")
    with pytest.raises(InputError, match="did you mean 'runs/ours'"):
        resolve(["runs/ours4"], ["demo"])


def test_wrong_arguments_are_told_before_work_is_announced(tiny, tmp_path):
    options = ["--policies", "slak", "--scenarios", tiny, "--out", str(tmp_path / "out")]
    called = CliRunner().invoke(app, ["evaluate", *options])
    assert isinstance(called.exception, InputError) and called.output == ""


def test_a_run_of_another_version_is_refused(tmp_path):
    run = make_run(tmp_path / "old")
    card = run / "policy_best" / "policy.json"
    card.write_text(card.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(InputError, match=r"format is 99.*\(train again"):
        resolve([str(run)], ["demo"])


def test_wrong_input_of_an_evaluation(tiny, run):
    with pytest.raises(InputError, match="did you mean 'demo'"):
        evaluate(["slack"], ["demmo"])
    with pytest.raises(InputError, match="named twice"):
        evaluate(["slack"], [tiny, tiny])
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate([], [tiny])
    with pytest.raises(InputError, match="the scenario has 'full'"):
        evaluate([str(run)], ["oversized"])
    with pytest.raises(InputError, match="fixed fleet"):
        evaluate(["slack"], ["fast"], traces=[_one_request(run)])
    varied = run.parent / "varied.toml"
    varied.write_text(Path(tiny).read_text() + "[[variants]]\nload = 1\n[[variants]]\nload = 2\n")
    with pytest.raises(InputError, match="'varied' draws its variant: a trace cannot be fitted"):
        evaluate(["slack"], [str(varied)], traces=[_one_request(run)])


def _one_request(folder):
    path = folder / "one.csv"
    path.write_text("arrival_s,model,prompt_tokens,output_tokens\n0,a,10,10\n")
    return path


def test_results_of_another_version_and_empty_ones_are_refused(results, tmp_path):
    results.write(tmp_path / "out")
    summary = tmp_path / "out" / "summary.json"
    text = summary.read_text()
    summary.write_text(text.replace('"version": 1', '"version": 0', 1))
    with pytest.raises(InputError, match="another version"):
        Results.read(tmp_path / "out")
    summary.write_text(json.dumps(results.summary | {"boards": []}))
    with pytest.raises(InputError, match="empty"):
        Results.read(tmp_path / "out")
    summary.write_text(text[:100])
    with pytest.raises(InputError, match="cannot read"):
        Results.read(tmp_path / "out")
    summary.write_text(text)
    (tmp_path / "out" / "models.parquet").unlink()
    with pytest.raises(InputError, match=r"models\.parquet is missing"):
        Results.read(tmp_path / "out")
