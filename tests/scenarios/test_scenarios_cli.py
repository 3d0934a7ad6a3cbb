import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmrl.cli.scenarios import app
from mmrl.errors import InputError
from mmrl.scenarios.registry import get_scenario, scenario_names


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def test_list_has_a_whole_line_for_each_scenario() -> None:
    lines = run("list").splitlines()
    firsts = [line.split()[0] for line in lines if line.split()]
    assert [first for first in firsts if first in scenario_names()] == scenario_names()
    assert not any("…" in line for line in lines)
    assert "derived" in next(line for line in lines if line.startswith("slow"))


@pytest.mark.parametrize("name", ["slow", "oversized"])
def test_show_tells_everything_and_the_file(name: str) -> None:
    output = run("show", name)
    assert "rate at load 1" in output
    assert f"mmrl scenarios calibrate {name}" in output
    assert "…" not in output
    assert ("(too large)" in output) == (name == "slow")


def test_show_a_users_trace(tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text(
        "arrival_s,model,prompt_tokens,output_tokens\n0.5,a,100,10\n1.5,b,200,20\n9.5,a,10,5\n"
    )
    (tmp_path / "mine.toml").write_text(
        'platform = "h200"\nbudget_fraction = 0.5\ntargets = "chat"\nutilisation_at_load_1 = 1\n'
        '[fleet]\nsize = 2\nchoose_from = ["llama3.2-3b"]\n[trace]\npaths = "two.csv"\n'
    )
    output = " ".join(run("show", str(tmp_path / "mine.toml")).split())
    assert "read 3 requests from two.csv" in output
    assert "mapped services by popularity" in output


def test_a_scenario_that_is_not_calibrated_yet_is_shown_and_calibrated(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    fields = 'platform = "h200"\nbudget_gb = 24\ntargets = "chat"\nduration_s = 20\n'
    models = 'models = ["qwen2.5-7b", "llama3.2-3b", "qwen2.5-7b"]\n'
    path.write_text(fields + models + '[workload.arrivals]\nkind = "poisson"\n')
    assert f"mmrl scenarios calibrate {path}" in run("show", str(path))
    with pytest.raises(InputError, match=r"mmrl scenarios calibrate .* finds it"):
        get_scenario(path)
    lines = run("calibrate", str(path), "--episodes", "20").splitlines()
    found = next(line for line in lines if line.startswith("utilisation_at_load_1 = "))
    path.write_text(f"{found}\n{path.read_text()}")
    assert get_scenario(path).utilisation_at_load_1 > 0
    assert "not known yet" not in run("show", str(path))


def test_play_an_episode_and_show_it_in_perfetto(tmp_path: Path) -> None:
    trace = tmp_path / "episode.json"
    output = run("play", "demo", "--episode", "3", "--load", "1.2", "--perfetto", str(trace))
    assert "slack on demo, test episode 3" in output and " in time" in output
    assert "ui.perfetto.dev" in output
    about = json.loads(trace.read_text())
    assert about["otherData"]["scenario"] == "demo" and about["otherData"]["load"] == 1.2
    assert any(event["name"] == "generating" for event in about["traceEvents"])
    assert any(event["name"].startswith("level100 ") for event in about["traceEvents"])


def test_an_episode_that_cannot_be_played_is_explained() -> None:
    for arguments, message in (
        (["--policy", "slak"], "unknown policy 'slak'"),
        (["--load", "99"], "option load is 99"),
    ):
        result = CliRunner().invoke(app, ["play", "demo", *arguments])
        assert isinstance(result.exception, InputError)
        assert message in str(result.exception)
