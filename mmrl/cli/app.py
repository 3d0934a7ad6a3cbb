"""The `mmrl` command: a table of subcommands, and the one place where errors reach the user.

A subcommand's module is imported when it is called, so that `mmrl --help` does not wait for
torch or pandas. A group's module offers `app`, a `typer.Typer`; a single command's module offers
a function `command`.
"""

import importlib
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from mmrl import __version__
from mmrl.errors import InputError, MmrlError
from mmrl.files import FULL_DISK

COMMANDS = {
    "demo": ("mmrl.cli.demo", "Train, evaluate and report in a few minutes."),
    "train": ("mmrl.cli.train", "Train a PPO scheduler on scenarios."),
    "evaluate": ("mmrl.cli.evaluate", "Compare policies on the same arrivals."),
    "report": ("mmrl.cli.report", "Write a page about runs and evaluations, or serve it."),
    "serve": ("mmrl.cli.serve", "Serve several models on one device, OpenAI-compatible."),
    "replay": ("mmrl.cli.replay", "Send a workload to a live server and record every token."),
    "tune": ("mmrl.cli.tune", "Tune a hand-written policy."),
    "scenarios": ("mmrl.cli.scenarios", "List and show scenarios; play an episode."),
    "workload": ("mmrl.cli.workload", "Describe workloads and traces."),
    "profile": ("mmrl.cli.profile", "Measure models; list, show and check profiles."),
    "plan": ("mmrl.cli.plan", "Say what a fleet can carry, and what a change would bring."),
    "study": ("mmrl.cli.study", "Show what offloading and preemption cost, from profiles."),
    "validate": ("mmrl.cli.validate", "Compare the live node with the simulator."),
    "testbed": ("mmrl.cli.testbed", "Write random-weight models to try serving with."),
}


class LazyCommand(TyperCommand):
    """A name and a line of help; becomes the real command when its arguments are parsed."""

    def __init__(self, name: str, module: str, help: str) -> None:
        super().__init__(name, help=help)
        self.module = module

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Load the command and hand over to it: the context made here is the one invoked."""
        module = importlib.import_module(self.module)
        command: TyperCommand | TyperGroup
        if hasattr(module, "app"):
            command = typer.main.get_group(module.app)
        else:
            single = typer.Typer(add_completion=False)
            single.command(self.name)(module.command)
            command = typer.main.get_command(single)  # type: ignore[assignment]
        return command.make_context(info_name, args, parent, **extra)


class LazyGroup(TyperGroup):
    """The top level, with the subcommands of `COMMANDS`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (module, help) in COMMANDS.items():
            self.add_command(LazyCommand(name, module, help))


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmrl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Schedule several language models on one GPU node: simulate, train, evaluate."""


def main() -> None:
    """Run the command line; every failure is one line on stderr.

    Exits with 0; 2 for wrong input or usage; 130 after Ctrl-C; 1 for everything else. With
    ``MMRL_DEBUG=1`` in the environment, exceptions keep their traceback.
    """
    if os.environ.get("MMRL_DEBUG") == "1":
        app(prog_name="mmrl")
    try:
        try:
            app(prog_name="mmrl")
        finally:
            sys.stdout.flush()  # what cannot be written is told here, not at interpreter exit
    except SystemExit as stop:
        if stop.code == 130:  # typer's answer to Ctrl-C
            _fail("interrupted", 130)
        raise
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except InputError as error:
        _fail(f"error: {error}", 2)
    except MmrlError as error:
        _fail(f"error: {error}", 1)
    except OSError as error:
        _drop_stdout()
        if isinstance(error, BrokenPipeError):
            sys.exit(1)  # the reader, `head` for example, has gone: nobody is left to be told
        if error.errno in FULL_DISK:
            _fail("error: disk full (free some space and retry)", 1)
        _fail_unforeseen(error)
    except Exception as error:
        _fail_unforeseen(error)


def _fail(line: str, code: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def _fail_unforeseen(error: Exception) -> NoReturn:
    what = f"{type(error).__name__}: {error}"
    _fail(f"error: {what} (unforeseen; run again with MMRL_DEBUG=1 to see where)", 1)


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, so that interpreter exit does not fail on it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
