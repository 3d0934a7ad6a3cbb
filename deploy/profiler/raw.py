"""`Raw`: every single measurement of one subject, in a file from which a run can be resumed.

The file says what was measured on what (its identity); a run that would mix other shapes, devices
or versions into it is refused.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mmrl.deploy.kv import HostFull
from mmrl.deploy.memory import OutOfDeviceMemory
from mmrl.deploy.profiler.timing import Patience, repeated
from mmrl.errors import InputError
from mmrl.files import write_json

FORMAT = 1
OUT_OF_MEMORY = (torch.OutOfMemoryError, OutOfDeviceMemory, HostFull)


@dataclass
class Section:
    """What was measured of one kind.

    Attributes:
        points: What each measurement was of, and ``times_s`` with all its repeats.
        skipped: What could not be measured, and why.
        values: Numbers that are no times.
    """

    points: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def measure(
        self, job: Callable[[], float], patience: Patience, warm: int = 1, **point: Any
    ) -> list[float]:
        """Measure something repeatedly and keep it; what does not fit in memory is left out.

        Returns:
            Its times; none where it was left out.
        """
        try:
            times = repeated(job, patience, warm)
        except OUT_OF_MEMORY as error:
            self.skip(point, f"out of memory: {error}")
            return []
        self.add(times, **point)
        return times

    def add(self, times_s: list[float], **point: Any) -> None:
        """Keep a point that was measured otherwise."""
        self.points.append({**point, "times_s": times_s})

    def skip(self, point: dict[str, Any], why: str) -> None:
        """Say that a point is left out."""
        what = ", ".join(f"{key} {value}" for key, value in point.items())
        self.skipped.append(f"{what}: {why}")


class Raw:
    """The measurements of one subject, by section.

    Args:
        path: Of the file; what is there is continued.
        name: Of the subject.
        identity: What all measurements in the file have in common.
        command: What the user called.

    Raises:
        InputError: The file is of something else, or cannot be read.
    """

    def __init__(self, path: Path, name: str, identity: dict[str, Any], command: str) -> None:
        self.path = path
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        self._data: dict[str, Any] = {
            "format": FORMAT,
            "name": name,
            "command": command,
            "begun": begun,
            "identity": identity,
            "sections": {},
        }
        if path.exists():
            found = _read(path)
            _check_same(path, found["identity"], identity)
            self._data = found

    @property
    def date(self) -> str:
        """Return the day on which it was begun."""
        return str(self._data["begun"])[:10]

    @property
    def command(self) -> str:
        """Return what the user called when it was begun."""
        return str(self._data["command"])

    def has(self, section: str) -> bool:
        """Return whether a section was measured without an error."""
        return "error" not in self._data["sections"].get(section, {"error": ""})

    def errors(self) -> dict[str, str]:
        """Return the error of each section that has one."""
        sections = self._data["sections"].items()
        return {name: found["error"] for name, found in sections if "error" in found}

    def points(self, *sections: str) -> list[dict[str, Any]]:
        """Return the points of some sections, in order."""
        return [point for name in sections for point in self._section(name).get("points", [])]

    def value(self, section: str, name: str, otherwise: Any = None) -> Any:
        """Return a number of a section."""
        return self._section(section).get("values", {}).get(name, otherwise)

    def left_out(self) -> list[str]:
        """Return what was left out, in one line for each section and reason."""
        counts = Counter(
            (name, one.partition(": ")[2])
            for name, found in self._data["sections"].items()
            for one in found.get("skipped", [])
        )
        return [f"{name}, {count} of its points: {why}" for (name, why), count in counts.items()]

    def keep(self, name: str, section: Section, took_s: float, error: str | None = None) -> None:
        """Keep a section and write the file."""
        self._data["sections"][name] = {
            "took_s": round(took_s, 3),
            "points": section.points,
            "skipped": section.skipped,
            "values": section.values,
            **({} if error is None else {"error": error}),
        }
        write_json(self.path, self._data)

    def _section(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._data["sections"].get(name, {})
        return found


def _read(path: Path) -> dict[str, Any]:
    remedy = "remove it, or choose another --out"
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if found["format"] != FORMAT or not isinstance(found["sections"], dict):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: holds no measurements", remedy) from error
    return found


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to go on with measurements of something else; say what differs."""
    found, wanted = json.loads(json.dumps([found, wanted]))
    changed = [
        f"{key} was {found.get(key)}, is {wanted.get(key)}"
        for key in {**found, **wanted}
        if found.get(key) != wanted.get(key)
    ]
    if changed:
        raise InputError(
            f"{path}: was measured otherwise ({'; '.join(changed)})",
            "remove it to measure anew, or choose another --out",
        )
