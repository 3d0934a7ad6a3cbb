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

import csv
import io
import platform
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from stable_baselines3.common.logger import KVWriter

from mmrl.agents.provenance import git_commit, versions
from mmrl.errors import InputError
from mmrl.files import atomic_write, write_json

CONFIG, PROVENANCE, METRICS, STATE = "config.json", "provenance.json", "metrics.csv", "state.pt"
SCENARIOS, TENSORBOARD, CHECKPOINTS = "scenarios", "tensorboard", "checkpoints"
STEP0, BEST, LAST = "policy_step0", "policy_best", "policy_last"


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


def read_metrics(folder: Path) -> pd.DataFrame:
    """Return the metrics of a run: one row per iteration, ``step`` and a column per scalar.

    Raises:
        InputError: There are none.
    """
    path = folder / METRICS
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no metrics", "name the folder of a run") from error


class MetricsLog(KVWriter):
    """SB3 logger output that keeps ``metrics.csv`` whole at any moment.

    Args:
        folder: Of the run; rows that are there already are kept, those after ``step`` are not.
        step: At which training continues.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._path = folder / METRICS
        self._rows: list[dict[str, Any]] = []
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        """Add a row."""
        scalars = {k: v for k, v in key_values.items() if isinstance(v, int | float)}
        self._rows.append({"step": step, **scalars})
        names = dict.fromkeys(name for row in self._rows for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names))
        writer.writeheader()
        writer.writerows(self._rows)
        with atomic_write(self._path) as file:
            file.write(text.getvalue())

    def close(self) -> None:
        """Do nothing: everything is written."""
