"""The folder of a training run: what stands where, and how it is written and read.

- ``config.json``: the configuration, complete: ``mmrl train --resume`` needs nothing else;
- ``scenarios/``: the scenarios as they were, resolved;
- ``provenance.json``: versions, git commit, command;
- ``metrics.csv``: one row per iteration; ``tensorboard/`` has the same;
- ``policy_step0/``: the policy before training (with a prior, about the rule itself),
  ``policy_best/``: the best on development seeds, ``policy_last/``;
- ``checkpoints/``: the policy at each evaluation;
- ``state.pt``: what is needed to continue exactly.
"""

import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mmrl.agents import export
from mmrl.agents.provenance import git_commit, versions
from mmrl.errors import InputError
from mmrl.files import write_json

if sys.platform != "win32":
    import fcntl
if TYPE_CHECKING:
    import pandas as pd

CONFIG, PROVENANCE, METRICS, STATE = "config.json", "provenance.json", "metrics.csv", "state.pt"
SCENARIOS, TENSORBOARD, CHECKPOINTS = "scenarios", "tensorboard", "checkpoints"
STEP0, BEST, LAST = "policy_step0", export.BEST, "policy_last"
BEFORE_STATE = {  # what may be there when the first state is written
    CONFIG,
    PROVENANCE,
    METRICS,
    SCENARIOS,
    TENSORBOARD,
    CHECKPOINTS,
    STEP0,
    BEST,
    LAST,
}


def new_run(out: Path, name: str) -> Path:
    """Return the folder of a new run.

    Raises:
        InputError: The name is no folder's, or there is a run of that name already that has begun,
            or something else.
    """
    if name in (".", "..") or "/" in name or "\\" in name:
        raise InputError(
            f"a run cannot be named '{name}'", "name a folder inside --out, without separators"
        )
    folder = out / name
    if (folder / STATE).exists():
        raise InputError(
            f"run {folder} exists already", f"continue it with --resume {folder}, or choose --name"
        )
    if folder.exists() and not (
        folder.is_dir() and (not any(folder.iterdir()) or never_began(folder))
    ):
        raise InputError(f"{folder} exists already, and is no run to continue", "choose --name")
    return folder


def never_began(folder: Path) -> bool:
    """Whether a folder holds what a run left that ended before its first state, and nothing else.

    A run that is being prepared is held by its process, and is none of these; where that cannot be
    told, no run is.
    """
    if not is_run(folder):
        return False
    names = {path.name for path in folder.iterdir()}
    return SCENARIOS in names and names <= BEFORE_STATE and not _is_held(folder)


def clear(folder: Path) -> None:
    """Remove what a run that never began has left, if there is any."""
    if not never_began(folder):
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, see `never_began`; the end of the process frees it in any case."""
    with (folder / CONFIG).open("rb") as file:
        if sys.platform != "win32":
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _is_held(folder: Path) -> bool:
    if sys.platform == "win32":
        return True
    with (folder / CONFIG).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def write_provenance(folder: Path) -> None:
    """Write with what, and with which command, a run is made."""
    write_json(
        folder / PROVENANCE,
        {
            "versions": versions(),
            "git_commit": git_commit(),
            "command": sys.argv,
            "machine": platform.machine(),
            "processor": platform.processor(),
        },
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a run, and not the policy that it exported."""
    return (folder / CONFIG).is_file() and not (folder / export.DESCRIPTION).exists()


def read_metrics(folder: Path) -> "pd.DataFrame":
    """Return the metrics of a run: one row per iteration, ``step`` and a column per scalar.

    Raises:
        InputError: There are none.
    """
    import pandas as pd

    path = folder / METRICS
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no metrics", "name the folder of a run") from error
