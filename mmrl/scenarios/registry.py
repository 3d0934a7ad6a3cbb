"""Scenarios by name (those that mmrl ships) or by path (a user's TOML file)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrl.errors import unknown
from mmrl.files import read_toml
from mmrl.scenarios.schema import ALTERNATIVES, Scenario, build_scenario
from mmrl.scenarios.suite import UNCALIBRATED, get_suite

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
        **overrides: Fields to replace, for example ``load=1.0``, in all variants too; a table is
            replaced whole, and of two alternatives (``budget_gb`` and ``budget_fraction``) the
            other one goes.

    Raises:
        InputError: There is no such scenario or file, or a field is wrong.
    """
    data = _fields(name_or_path)
    replaced = set(overrides)
    for pair in ALTERNATIVES:
        if any(overrides.get(field) is not None for field in pair):
            replaced |= set(pair)
    return build_scenario(_without(data, replaced) | overrides, str(name_or_path))


def get_draft(name_or_path: str | Path) -> tuple[Scenario, bool]:
    """Return a scenario that need not say yet where its load is 1, and whether it does.

    Where it does not, `UNCALIBRATED` stands for it: from there calibration begins.

    Args:
        name_or_path: See `get_scenario`.

    Raises:
        InputError: See `get_scenario`.
    """
    data = _fields(name_or_path)
    calibrated = "utilisation_at_load_1" in data
    return build_scenario(
        {"utilisation_at_load_1": UNCALIBRATED, **data}, str(name_or_path)
    ), calibrated


def _fields(name_or_path: str | Path) -> dict[str, Any]:
    """Return the fields of a scenario as its file or suite has them."""
    suite, colon, cell = str(name_or_path).rpartition(":")
    if colon and not cell.endswith(".toml"):
        return get_suite(suite).cell(cell).scenario.model_dump(mode="json", exclude_none=True)
    path = scenario_path(name_or_path)
    return {"name": path.stem, **_anchored(read_toml(path, "a scenario file"), path.parent)}


def _without(data: dict[str, Any], fields: set[str]) -> dict[str, Any]:
    """Leave fields out, of the variants too: what a variant says would hide an override."""
    return {
        field: _each_variant(value, lambda variant: _without(variant, fields))
        if field == "variants"
        else value
        for field, value in data.items()
        if field not in fields
    }


def _each_variant(variants: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Change each variant; what is none is left to the validation, which names it."""
    if not isinstance(variants, list):
        return variants
    return [change(variant) if isinstance(variant, dict) else variant for variant in variants]


def _anchored(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make relative paths of files count from the scenario's folder, where they stand there."""

    def place(path: Any) -> Any:
        if isinstance(path, list):
            return [place(one) for one in path]
        return str(folder / path) if isinstance(path, str) else path

    anchored = dict(data)
    platforms = data.get("platform")
    if isinstance(platforms, list):
        anchored["platform"] = [place(one) if "/" in str(one) else one for one in platforms]
    elif "/" in str(platforms):  # a folder; else a name
        anchored["platform"] = place(platforms)
    if isinstance(trace := data.get("trace"), dict) and "paths" in trace:
        anchored["trace"] = {**trace, "paths": place(trace["paths"])}
    if isinstance(workload := data.get("workload"), dict):
        lengths = workload.get("lengths")
        if isinstance(lengths, dict) and "file" in lengths:
            lengths = {**lengths, "file": place(lengths["file"])}
            anchored["workload"] = {**workload, "lengths": lengths}
    if "variants" in data:
        anchored["variants"] = _each_variant(
            data["variants"], lambda variant: _anchored(variant, folder)
        )
    return anchored
