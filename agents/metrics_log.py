"""`MetricsLog`: what a training logs goes to the run's ``metrics.csv``."""

import csv
import io
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter

from mmrl.agents.runs import METRICS
from mmrl.files import atomic_write


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
