"""What `mmrl workload` does not write over."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmrl.cli.app import app
from mmrl.errors import InputError

OWN = "arrival_s,model,prompt_tokens,output_tokens\n1.5,b,10,20\n2.5,a,30,40\n"


def call(*arguments: str | Path) -> None:
    called = CliRunner().invoke(app, ["workload", *map(str, arguments)])
    if called.exception is not None:
        raise called.exception


def test_a_recorded_trace_is_never_written_over(tmp_path: Path) -> None:
    recorded, out = tmp_path / "recorded.csv", tmp_path / "fitted.csv"
    recorded.write_text(OWN)
    with pytest.raises(InputError, match="is read here"):
        call("fit", recorded, "--models", "x,y", "--out", tmp_path / "." / "recorded.csv")
    call("fit", recorded, "--models", "x,y", "--out", out)
    first = out.read_text()
    call("fit", recorded, "--models", "x,z", "--out", out)  # what mmrl wrote is replaced
    assert out.read_text() != first
    with pytest.raises(InputError, match="is read here"):
        call("fit", out, "--models", "x,y", "--out", out)
    assert recorded.read_text() == OWN


@pytest.mark.parametrize("text", [OWN, 'description = "a scenario"', ""])
def test_a_file_that_mmrl_did_not_write_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine"
    path.write_text(text)
    with pytest.raises(InputError, match="no trace that mmrl wrote"):
        call("generate", "--models", "x", "--rate", "1", "--duration", "9", "--out", path)
    assert path.read_text() == text
