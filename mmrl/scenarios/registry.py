"""Scenarios by name (those that mmrl ships) or by path (a user's TOML file)."""

from pathlib import Path
from typing import Any

from mmrl.errors import unknown
from mmrl.files import read_toml
from mmrl.scenarios.schema import ALTERNATIVES, Scenario, build_scenario

DATA = Path(__file__).parent / "data"


def scenario_names() -> list[str]:
    """Return the names of the shipped scenarios."""
    return sorted(path.stem for path in DATA.glob("*.toml"))


def scenario_path(name_or_path: str | Path) -> Path:
    """Return the file of a scenario; of a cell, that of its suite.

    Args:
        name_or_path: A name of `scenario_names`, or the path of a ``.toml`` file.

    Raises:
        InputError: There is no scenario of that name.
    """
    suite, colon, cell = str(name_or_path).rpartition(":")
    if colon and not cell.endswith(".toml"):
        from mmrl.scenarios.suite import get_suite

        return get_suite(suite).path
    if str(name_or_path).endswith(".toml"):
        return Path(name_or_path)
    if name_or_path not in scenario_names():
        raise unknown("scenario", str(name_or_path), scenario_names())
    return DATA / f"{name_or_path}.toml"


def get_scenario(name_or_path: str | Path, **overrides: Any) -> Scenario:
    """Return a scenario.

    Args:
        name_or_path: A name of `scenario_names`, or the path of a ``.toml`` file. Paths in a
            file are relative to the file. Or a cell of a suite, ``v1:fast-chat-1.0``.
        **overrides: Fields to replace, for example ``load=1.0``; a table is replaced whole, and
            of two alternatives (``budget_gb`` and ``budget_fraction``) the other one goes.

    Raises:
        InputError: There is no such scenario or file, or a field is wrong.
    """
    suite, colon, cell = str(name_or_path).rpartition(":")
    if colon and not cell.endswith(".toml"):
        from mmrl.scenarios.suite import get_suite

        data = get_suite(suite).cell(cell).scenario.model_dump(mode="json", exclude_none=True)
    else:
        path = scenario_path(name_or_path)
        data = {"name": path.stem, **_anchored(read_toml(path, "a scenario file"), path.parent)}
    for pair in ALTERNATIVES:
        if any(overrides.get(field) is not None for field in pair):
            data = {field: value for field, value in data.items() if field not in pair}
    return build_scenario(data | overrides, str(name_or_path))


def _anchored(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make relative paths of files count from the scenario's folder, where they stand there."""
    anchored = dict(data)
    if isinstance(platform := data.get("platform"), str | list):
        names = [platform] if isinstance(platform, str) else platform
        anchored["platform"] = [
            str(folder / name) if isinstance(name, str) and "/" in name else name for name in names
        ]
    if isinstance(trace := data.get("trace"), dict) and "paths" in trace:
        paths = [trace["paths"]] if isinstance(trace["paths"], str) else trace["paths"]
        if isinstance(paths, list):
            paths = [folder / path if isinstance(path, str) else path for path in paths]
        anchored["trace"] = {**trace, "paths": paths}
    if isinstance(workload := data.get("workload"), dict):
        lengths = workload.get("lengths")
        if isinstance(lengths, dict) and isinstance(lengths.get("file"), str):
            lengths = {**lengths, "file": folder / lengths["file"]}
            anchored["workload"] = {**workload, "lengths": lengths}
    return anchored
