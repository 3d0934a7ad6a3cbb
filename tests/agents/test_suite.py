"""A benchmark is frozen, resumed, verified bit for bit, and judged by figures made by hand."""

import io
import json
import shutil

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mmrl.agents import suite_run
from mmrl.agents.pool import side_by_side
from mmrl.agents.suite import EPISODES, RESULT, evaluate_suite, read
from mmrl.agents.suite_freeze import freeze
from mmrl.agents.suite_policies import entries
from mmrl.agents.suite_results import rows_of
from mmrl.agents.suite_verify import ALL, verify
from mmrl.cli.app import app
from mmrl.cli.suite import print_result
from mmrl.errors import InputError
from mmrl.files import write_json
from mmrl.scenarios.suite import get_suite
from mmrl.stats import holm
from tests.agents.made_up import make_policy

TINY = """
description = "Two cells for tests."
episodes = 6
loads = [1.0]

[platforms.fast]
platform = "h200"
budget_gb = 24
models = ["qwen2.5-7b", "llama3.2-3b", "qwen2.5-7b"]
targets = "relative"
duration_s = 12
drain_s = 4

[families.chat.workload]
arrivals = { kind = "poisson" }

[variations.fixed]
platforms = ["fast"]
family = "chat"
change = { workload = { arrivals = { kind = "gamma", cv = 4 } } }
traces = true

[tuning]
training = ["demo", "h200-24"]
once_episodes = 9
cell_episodes = 9
calibration_episodes = 16

[opponents.slack]
rule = "slack"
configs = 1

[opponents.lru]
rule = "lru"
configs = 1

[lookahead]
clairvoyant = ["fast-chat-*"]
episodes = 2
"""
CELLS = ["fast-chat-1.0", "fast-fixed-1.0"]
TRACE = "arrival_s,model,prompt_tokens,output_tokens\n" + "".join(
    f"{k * 0.4:.1f},{'abc'[k % 3]},200,40\n" for k in range(120)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tiny.toml").write_text(TINY)
    freeze(str(folder / "tiny.toml"), 1, lambda what, number, total: None)
    make_policy(folder / "policies" / "s0", 0.0)
    make_policy(folder / "policies" / "s1", 1.5)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    policies = [f"mine={folder / 'policies'}"]
    return evaluate_suite(folder / "tiny.toml", policies, folder / "out" / "first")


def pick(result, table, **wanted):
    rows = [r for r in rows_of(result[table]) if all(r[k] == v for k, v in wanted.items())]
    assert len(rows) == 1, rows
    return rows[0]


def test_freezing_again_repeats_nothing(folder, result):
    before = (folder / "tiny.tuned.toml").read_bytes()
    told = []
    freeze(str(folder / "tiny.toml"), 1, lambda *about: told.append(about))
    assert told == []
    assert (folder / "tiny.tuned.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new"), [("cv = 4", "cv = 5"), ("budget_gb = 24", "budget_gb = 25")]
)
def test_a_cell_that_changed_is_refused(folder, result, tmp_path, old, new):
    for name in ("tiny.frozen.json", "tiny.tuned.toml"):
        shutil.copy(folder / name, tmp_path / name)
    (tmp_path / "tiny.toml").write_text(TINY.replace(old, new))
    with pytest.raises(InputError, match="is not what was frozen"):
        evaluate_suite(tmp_path / "tiny.toml", [], tmp_path / "out")
    assert get_suite(tmp_path / "tiny.toml").hash != get_suite(folder / "tiny.toml").hash


def test_cells_of_any_loads_have_names_of_their_own(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace("loads = [1.0]", "loads = [0.75, 0.8, 1, 1.25]"))
    names = [cell.name for cell in get_suite(path).cells]
    assert names[:4] == [f"fast-chat-{load}" for load in ("0.75", "0.8", "1.0", "1.25")]
    path.write_text(TINY.replace("loads = [1.0]", "loads = [0.75, 1.0, 0.75]"))
    with pytest.raises(InputError, match=r"cell 'fast-chat-0\.75' is there twice"):
        get_suite(path)


def test_a_damaged_file_of_what_was_frozen_is_named(folder, result, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "tiny.frozen.json").write_text("{")
    with pytest.raises(InputError, match=r"tiny\.frozen\.json: .*freeze the suite again"):
        get_suite(tmp_path / "tiny.toml")


def test_all_play_every_cell_on_seeds_of_its_own(folder, result):
    table = pd.read_parquet(folder / "out" / "first" / EPISODES)
    assert sorted(table.cell.unique()) == CELLS
    rules = [f"{rule} ({how})" for rule in ("slack", "lru") for how in ("once", "cell")]
    assert set(table.policy) == {*rules, "mine seed 0", "mine seed 1", "clairvoyant"}
    for cell, first in zip(CELLS, (0, 1000), strict=True):
        for policy, mine in table[table.cell == cell].groupby("policy", observed=True):
            count = 2 if policy == "clairvoyant" else 6
            assert mine.episode.tolist() == list(range(first, first + count))
    arrivals = table.groupby(["cell", "episode"], observed=True).requests.nunique()
    assert (arrivals == 1).all()
    assert "clairvoyant" not in set(table[table.cell == CELLS[1]].policy)
    assert result["complete"] and not result["unsuited"]


def test_figures_are_those_of_the_episodes(folder, result):
    table = pd.read_parquet(folder / "out" / "first" / EPISODES).set_index(["cell", "policy"])
    chat = {name: table.loc[(CELLS[0], name)] for name in table.loc[CELLS[0]].index.unique()}
    figure = pick(result, "figures", cell=CELLS[0], policy="lru (once)")
    assert figure["goodput"] == pytest.approx(chat["lru (once)"].goodput.mean())
    assert figure["longest_wait_max_s"] == chat["lru (once)"].longest_wait_s.max()
    best = max(("slack (once)", "lru (once)"), key=lambda name: chat[name].goodput.mean())
    both = (chat["mine seed 0"].goodput.to_numpy() + chat["mine seed 1"].goodput.to_numpy()) / 2
    group = pick(result, "compared", cell=CELLS[0], policy="mine", reference="once")
    assert group["rule"] == best and group["seeds"] == 2
    assert group["goodput"] == pytest.approx((both - chat[best].goodput.to_numpy()).mean())
    # Two seeds that differ: the interval over seeds holds what each has alone.
    alone = [
        pick(result, "compared", cell=CELLS[0], policy=f"mine seed {k}", reference="once")
        for k in (0, 1)
    ]
    for row in alone:
        assert group["goodput_low"] - 1e-6 <= row["goodput"] <= group["goodput_high"] + 1e-6


def test_a_pool_holds_its_cells_and_core_only(result):
    pool = pick(result, "pools", pool="fast 1", policy="mine", reference="cell")
    cell = pick(result, "compared", cell=CELLS[0], policy="mine", reference="cell")
    assert (pool["cells"], pool["goodput"]) == (1, cell["goodput"])
    other = pick(result, "compared", cell=CELLS[1], policy="mine", reference="cell")
    variations = pick(result, "pools", pool="fast variations", policy="mine", reference="cell")
    assert variations["goodput"] == other["goodput"]
    p = [cell["p"], other["p"]]
    assert [cell["p_holm"], other["p_holm"]] == holm(p).tolist()


def test_a_second_run_plays_only_what_is_new(folder, result, monkeypatch):
    played = []

    def watched(play, work, workers):
        played.extend((piece.board, piece.contender.name) for piece in work)
        return side_by_side(play, work, workers)

    monkeypatch.setattr(suite_run, "side_by_side", watched)
    make_policy(folder / "other", 0.5)
    make_policy(folder / "trained there", 2.5)
    there = "there@*-fixed-*"
    again = evaluate_suite(
        folder / "tiny.toml",
        ["lru", f"new={folder / 'other'}", f"{there}={folder / 'trained there'}"],
        folder / "out" / "second",
    )
    assert sorted(played) == [*((cell, "new") for cell in CELLS), (CELLS[1], there)]
    lost = pick(again, "zero_shot", policy="new", against=there)
    means = [pick(again, "figures", cell=CELLS[1], policy=name) for name in ("new", there)]
    assert lost["goodput"] == pytest.approx(means[0]["goodput"] - means[1]["goodput"])
    assert {row["policy"] for row in rows_of(again["verdicts"])} == {"new"}
    for cell in CELLS:
        one = pick(result, "figures", cell=cell, policy="lru (cell)")
        assert pick(again, "figures", cell=cell, policy="lru (cell)") == one


def test_an_interrupted_run_goes_on(folder, result, monkeypatch):
    out = folder / "other" / "result"
    policies = [f"mine={folder / 'policies'}"]

    def broken(play, work, workers):
        for number, part in enumerate(side_by_side(play, work, workers)):
            if number == 4:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(suite_run, "side_by_side", broken)
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(folder / "tiny.toml", policies, out)
    assert not out.exists()
    kept = len(list((folder / "other" / "suite-cache").iterdir()))
    assert 0 < kept <= 4
    told = []
    monkeypatch.setattr(suite_run, "side_by_side", side_by_side)
    again = evaluate_suite(
        folder / "tiny.toml", policies, out, watch=lambda cell, done, total: told.append(done)
    )
    assert told[0] > 0  # what had been played counts as done
    for table in ("figures", "compared", "pools", "headroom", "verdicts"):
        assert again[table] == result[table]


def test_what_is_printed_names_all(folder, result):
    text = io.StringIO()
    print_result(result, Console(file=text, width=200))
    for name in (*CELLS, "clairvoyant", "mine seed 1", "fast variations", "targets met"):
        assert name in text.getvalue()


def test_an_unchanged_result_is_verified(folder, result):
    found = verify(folder / "out" / "first" / RESULT, sample=6, seed=1)
    assert found.passed and len(found.replayed) == 6
    assert {row["policy"] for row in found.replayed} & {"mine seed 0", "mine seed 1"}


def test_without_its_episodes_whole_cells_are_played_again(folder, result, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(folder / "out" / "first", place)
    (place / EPISODES).unlink()
    found = verify(place, sample=6, seed=1)
    assert found.passed and len(found.replayed) == 6
    assert {row["episode"] for row in found.replayed} == {ALL}
    assert any("whole cells are played" in note for note in found.notes)

    told = read(place)
    told["figures"]["goodput"] = [value * 0.999 for value in told["figures"]["goodput"]]
    write_json(place / RESULT, told)
    found = verify(place, sample=4, seed=1)
    assert not found.passed and {row["differs"] for row in found.replayed} == {"goodput"}


@pytest.mark.parametrize("episodes", ["there", "left out"])
@pytest.mark.parametrize(
    ("table", "column", "told"),
    [
        ("compared", "goodput", 0.2),
        ("pools", "goodput", 0.2),
        ("verdicts", "met", "turned"),
        ("pools", "goodput_low", 0.2),
        ("pools", "p", 0.1),
    ],
)
def test_tables_that_do_not_follow_are_found(
    folder, result, tmp_path, table, column, told, episodes
):
    place = tmp_path / "copy"
    shutil.copytree(folder / "out" / "first", place)
    forged = read(place)
    values = forged[table][column]
    k = next(k for k, value in enumerate(values) if value is not None)
    values[k] = not values[k] if told == "turned" else values[k] + told
    write_json(place / RESULT, forged)
    if episodes == "left out":
        (place / EPISODES).unlink()
    found = verify(place, sample=0)
    if episodes == "left out" and column in ("goodput_low", "p"):
        assert any("are not computed again" in note for note in found.notes)
    else:
        assert any(f"{table}, " in problem for problem in found.problems)


def test_what_was_changed_is_found(folder, result, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(folder / "out" / "first", place)
    told = read(place)
    table = pd.read_parquet(place / EPISODES)
    table["gpu_share"] += 1e-6
    table.to_parquet(place / EPISODES)
    found = verify(place, sample=4, seed=1)
    assert not found.passed and not any(row["same"] for row in found.replayed)
    assert {row["differs"] for row in found.replayed} == {"gpu_share"}
    assert any("not the file" in problem for problem in found.problems)
    assert any("gpu_share is" in problem for problem in found.problems)

    told["params"]["lru (cell)"]["*"] = {"keep_alive_s": 1.0}
    told["cells"]["hash"][0] = "0" * 16
    write_json(place / RESULT, told)
    weights = next(place.glob("policies/mine-seed-1-*/policy.json"))
    weights.write_text(json.dumps(json.loads(weights.read_text()), indent=1))
    problems = " ".join(verify(place, sample=1, seed=1).problems)
    assert "lru (cell): its parameters" in problems
    assert f"cell {CELLS[0]} is another one" in problems
    assert "mine seed 1: its files" in problems


def test_a_part_of_the_cells_or_a_few_episodes_decide_nothing(folder, result):
    assert any(row["met"] is not None for row in rows_of(result["verdicts"]))
    policies = [f"mine={folder / 'policies'}"]
    few = evaluate_suite(folder / "tiny.toml", policies, folder / "out" / "few", episodes=2)
    part = evaluate_suite(folder / "tiny.toml", policies, folder / "out" / "part", cells=["fixed"])
    for told in (few, part):
        assert {row["met"] for row in rows_of(told["verdicts"])} == {None}


def test_a_trace_is_played_on_the_fixed_fleet(folder, result, tmp_path):
    trace = tmp_path / "mine.csv"
    trace.write_text(TRACE)
    out = folder / "out" / "traced"
    told = evaluate_suite(
        folder / "tiny.toml", ["lru"], out, cells=["fixed"], traces=[trace], episodes=2
    )
    rows = rows_of(told["cells"])
    assert [row["cell"] for row in rows] == [CELLS[1], "fast-trace-mine.csv"]
    assert rows[1]["origin"] == CELLS[1] and not told["complete"]
    found = verify(out, sample=2, seed=0)
    assert found.passed and "give its files with --trace" in found.notes[0]
    assert verify(out, traces=[trace], sample=6, seed=0).notes == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gdsf"], "'gdsf' is not an opponent"),
        (["nobody"], "unknown policy"),
        (["lru", "lru"], "two policies are named"),
    ],
)
def test_wrong_names_are_told(folder, result, names, message):
    suite = get_suite(folder / "tiny.toml")
    with pytest.raises(InputError, match=message):
        entries(suite, suite.cells, names)


def test_the_result_of_other_policies_is_not_replaced(folder, result):
    out = folder / "out" / "first"
    before = (out / "result.json").read_bytes()
    with pytest.raises(InputError, match="holds the result of"):
        evaluate_suite(folder / "tiny.toml", ["lru"], out)
    result_of_another = json.loads(before) | {"suite_hash": "of another"}
    (out / "result.json").write_text(json.dumps(result_of_another))
    with pytest.raises(InputError, match="of another suite"):
        evaluate_suite(folder / "tiny.toml", [f"mine={folder / 'policies'}"], out)
    (out / "result.json").write_bytes(before)


def test_wrong_places_and_cells_are_told(folder, result, tmp_path):
    (tmp_path / "result.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="holds no benchmark result"):
        evaluate_suite(folder / "tiny.toml", [], tmp_path)
    with pytest.raises(InputError, match="unknown cell"):
        evaluate_suite(folder / "tiny.toml", [], tmp_path / "new", cells=["slow-*"])
    with pytest.raises(InputError, match="cannot read"):
        get_suite(tmp_path / "none.toml")


def test_the_shipped_policy_and_all_rules_play_where_nobody_is_named(folder, result):
    out = folder / "out" / "unnamed"  # beside the first, whose rules are not played again
    arguments = ["--suite", str(folder / "tiny.toml"), "--out", str(out), "--workers", "1"]
    called = CliRunner().invoke(app, ["evaluate", *arguments], catch_exceptions=False)
    assert called.exit_code == 0, called.output
    names = {row["policy"] for row in rows_of(read(out / RESULT)["policies"])}
    mine = {"mine seed 0", "mine seed 1"}
    assert names == {row["policy"] for row in rows_of(result["policies"])} - mine | {"default"}
    assert verify(out / RESULT, sample=4).passed


def test_the_shipped_suite_is_whole_and_as_frozen():
    suite = get_suite("v1")
    core = [cell for cell in suite.cells if cell.group == "core"]
    assert len(core) == 24 and len({cell.first for cell in suite.cells}) == len(suite.cells)
    assert {(c.platform, c.load) for c in core} == {
        (platform, load)
        for platform in ("fast", "slow", "consumer")
        for load in (0.5, 0.8, 1.0, 1.3)
    }
    if "cells" in suite.frozen:
        suite.check(suite.cells)
        assert suite.frozen["suite_hash"] == suite.hash
        assert set(suite.tuned) == {"once", *(cell.name for cell in suite.cells)}
    else:
        with pytest.raises(InputError, match="not frozen"):
            suite.check(suite.cells)
