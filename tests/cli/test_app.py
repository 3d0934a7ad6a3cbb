"""What a user sees of the command line itself: one line for each failure, and the exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mmrl.cli import app as cli
from mmrl.errors import InputError, MmrlError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A command `fail` that raises whatever `fail.error` is."""
    (tmp_path / "failing.py").write_text("error = None\ndef command() -> None:\n    raise error\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "fail", ("failing", "Fail."))
    monkeypatch.setattr(sys, "argv", ["mmrl", "fail"])
    return monkeypatch


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no field 'rat'", "did you mean 'rate'?"), 2, "error: no field 'rat' (did you"),
        (MmrlError("two\nlines"), 1, "error: two lines"),
        (OSError(28, "No space left on device"), 1, "error: disk full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 1, "error: ZeroDivisionError: division by zero"),
    ],
)
def test_a_failure_is_one_line_and_a_code(
    failing: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    import failing as module  # type: ignore[import-not-found]

    module.error = error
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    assert stop.value.code == code
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert out == ""


def test_debugging_keeps_the_traceback(failing: pytest.MonkeyPatch) -> None:
    import failing as module

    module.error = InputError("wrong")
    failing.setenv("MMRL_DEBUG", "1")
    with pytest.raises(InputError):
        cli.main()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_of_the_table_loads(name: str) -> None:
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"mmrl {name}" in result.output or f" {name} " in result.output


def test_an_unknown_command_suggests_the_nearest() -> None:
    result = CliRunner().invoke(cli.app, ["evalute"])
    assert result.exit_code == 2
    assert "evaluate" in result.output


def test_help_does_not_load_what_commands_need() -> None:
    code = (
        "import sys\nfrom mmrl.cli.app import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'pandas', 'plotly', 'numba', 'scipy', 'stable_baselines3'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    code = "import sys; sys.argv = ['mmrl', '--version']; from mmrl.cli.app import main; main()"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    assert result.stderr == "error: disk full (free some space and retry)\n"


def test_group_modules_become_groups() -> None:
    """Even with a single command, `mmrl profile list` keeps its `list`."""
    module = typer.Typer()
    module.command("only")(lambda: typer.echo("ran"))
    sys.modules["grouping"] = type(sys)("grouping")
    sys.modules["grouping"].app = module  # type: ignore[attr-defined]
    top = cli.LazyGroup(name="mmrl")
    top.add_command(cli.LazyCommand("group", "grouping", "A group."))
    try:
        with pytest.raises(SystemExit) as stop:
            top(["group", "only"])
        assert stop.value.code == 0
    finally:
        del sys.modules["grouping"]
