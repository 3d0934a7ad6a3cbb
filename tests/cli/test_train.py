"""What `mmrl train` refuses before anything is trained."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmrl.agents.config import TrainConfig
from mmrl.cli.app import app
from mmrl.errors import InputError


def refused(*arguments: str) -> str:
    called = CliRunner().invoke(app, ["train", *arguments])
    assert isinstance(called.exception, InputError), called.output
    assert called.output == ""  # nothing was prepared
    return str(called.exception)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo"], "scenarios"),
        (["--seed", "0"], "--seed"),  # though it is the default
        (["--set", "kl=1", "--envs", "64"], "--envs, --set"),
        (["--verbs", "full", "--from", "default"], "--from, --verbs"),
        (["--no-prior", "--name", "x", "--steps", "4M", "--time", "1m"], "--name, --no-prior"),
    ],
)
def test_a_resumed_run_takes_no_other_options(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    config = TrainConfig(scenarios=("demo",))
    (tmp_path / "config.json").write_text(config.model_dump_json())
    said = refused("--resume", str(tmp_path), *arguments)
    assert ", ".join(sorted(re.split(", ", said.partition(" with --resume")[0]))) == named


@pytest.mark.parametrize("name", ["../../zz", "a/b", "..", "a\\b"])
def test_a_run_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    said = refused("demo", "--name", name, "--out", str(tmp_path / "out"))
    assert f"cannot be named '{name}'" in said
    assert not list(tmp_path.iterdir())


def test_unknown_scenarios_policies_and_rules_are_told_before_a_bar_begins(tmp_path: Path) -> None:
    assert "unknown scenario 'dmo'" in refused("dmo", "--out", str(tmp_path))
    assert "cannot read" in refused("demo", "--from", "nowhere", "--out", str(tmp_path))
    assert "unknown rule 'slak'" in refused("demo", "--set", "prior=slak", "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())
