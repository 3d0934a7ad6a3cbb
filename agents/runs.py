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
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mmrl.agents import export
from mmrl.agents.provenance import git_commit, versions
from mmrl.errors import InputError
from mmrl.files import write_json

if TYPE_CHECKING:
    import pandas as pd

CONFIG, PROVENANCE, METRICS, STATE = "config.json", "provenance.json", "metrics.csv", "state.pt"
SCENARIOS, TENSORBOARD, CHECKPOINTS = "scenarios", "tensorboard", "checkpoints"
STEP0, BEST, LAST = "policy_step0", export.BEST, "policy_last"


def new_run(out: Path, name: str) -> Path:
    """Return the folder of a new run.

    Raises:
        InputError: The name is no folder's, or there is a run of that name already.
    """
    if name in (".", "..") or "/" in name or "\\" in name:
        raise InputError(
            f"a run cannot be named '{name}'", "name a folder inside --out, without separators"
        )
    folder = out / name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"run {folder} exists already", f"continue it with --resume {folder}, or choose --name"
        )
    return folder


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
