"""Benchmark suites: frozen cells that policies are compared on, made from one TOML file.

A *base* is a platform class with a workload family, or a one-factor variation of it; a *cell* is a
base at a load with test episodes of its own. Three files make a suite: ``v1.toml`` says what is
played, ``v1.frozen.json`` at which rate the load of each base is 1 and what each cell hashes to,
and ``v1.tuned.toml`` how the hand-written rules were tuned. ``benchmarks/suite_freeze.py`` writes
the last two; from then on a cell that changed is an error.

A cell is also a scenario: ``get_scenario("v1:fast-chat-1.0")``.
"""

import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmrl.errors import InputError, first_error, unknown
from mmrl.files import read_toml
from mmrl.profiles.registry import get_platform, get_profile
from mmrl.scenarios.schema import ALTERNATIVES, Scenario, build_scenario
from mmrl.scenarios.seeds import Split

DATA = Path(__file__).parent / "data" / "suites"
FORMAT = 1
STRIDE = 1000  # episodes between the first ones of two cells: no two cells share random streams
DIGITS = 9  # of the numbers in a hash
UNCALIBRATED = 1.0
Group = Literal["core", "variation", "fixed"]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Opponent(_Strict):
    """A hand-written rule that takes part, tuned.

    Attributes:
        rule: Its name.
        objective: What it is tuned for.
        configs: Candidates that a tuning draws.
    """

    rule: str
    objective: Literal["goodput", "goodput-latency"] = "goodput-latency"
    configs: Count = 24


class Tuning(_Strict):
    """Budget of tuning.

    Attributes:
        training: Scenarios of the training distribution, mixed; there rules are tuned once ...
        once_episodes: ... on so many training episodes.
        cell_episodes: And for each cell on so many of its development episodes.
        calibration_episodes: Development episodes behind the rate at which a base's load is 1.
    """

    training: Annotated[tuple[str, ...], Field(min_length=1)]
    once_episodes: Annotated[int, Field(ge=9)]
    cell_episodes: Annotated[int, Field(ge=9)]
    calibration_episodes: Count


class Variation(_Strict):
    """One factor changed.

    Attributes:
        platforms: Platform classes it is played on.
        family: Workload family that it changes.
        change: Fields of the scenario, merged into those of platform class and family.
        only: Further fields for single platform classes.
        traces: Whether traces of the user are played on it: its fleet is fixed.
    """

    platforms: Annotated[tuple[str, ...], Field(min_length=1)]
    family: str
    change: dict[str, Any]
    only: dict[str, dict[str, Any]] = {}
    traces: bool = False


class LookaheadCells(_Strict):
    """On which cells, by patterns, a policy that looks ahead plays."""

    clairvoyant: tuple[str, ...] = ()
    mpc: tuple[str, ...] = ()
    episodes: Count = 40


class SuiteSpec(_Strict):
    """A suite as it is written in TOML.

    Attributes:
        description: One line.
        episodes: Test episodes of each cell.
        loads: Loads of the core cells; variations are played at load 1.
        common: Fields of the scenario in all cells; what a cell's hash is to hold is written out.
        platforms: The same for each platform class.
        families: The same for each workload family of the core cells.
        variations: One-factor variations by name.
        opponents: The rules by their names in tables.
        tuning: How they are tuned.
        lookahead: Where the policies that look ahead play.
    """

    description: str
    episodes: Annotated[int, Field(ge=1, le=STRIDE)]
    loads: Annotated[tuple[float, ...], Field(min_length=1)]
    common: dict[str, Any] = {}
    platforms: dict[str, dict[str, Any]]
    families: dict[str, dict[str, Any]]
    variations: dict[str, Variation] = {}
    opponents: Annotated[dict[str, Opponent], Field(min_length=1)]
    tuning: Tuning
    lookahead: LookaheadCells = LookaheadCells()

    @model_validator(mode="after")
    def _names_exist(self) -> "SuiteSpec":
        for name, variation in self.variations.items():
            for platform in (*variation.platforms, *variation.only):
                if platform not in self.platforms:
                    raise ValueError(f"variations.{name}: unknown platform class '{platform}'")
            if variation.family not in self.families:
                raise ValueError(f"variations.{name}: unknown family '{variation.family}'")
        return self


@dataclass(frozen=True)
class Cell:
    """What is played: a scenario at a load, and which test episodes.

    Attributes:
        name: For example ``fast-chat-1.0``.
        base: The cell without its load, ``fast-chat``.
        group: ``core``, ``variation``, or ``fixed`` for one with a fixed fleet.
        platform: Platform class.
        family: Workload family.
        variation: Name of the variation; empty for a core cell.
        load: The load.
        scenario: The scenario, fixed to the load.
        first: Index of the first of its episodes.
        split: Whose random streams.
        origin: Of a cell that plays a trace, the cell with its scenario.
        trace: Its trace: names and hash of the files; empty for generated requests.
    """

    name: str
    base: str
    group: Group
    platform: str
    family: str
    variation: str
    load: float
    scenario: Scenario
    first: int
    split: Split = "test"
    origin: str = ""
    trace: str = ""

    @property
    def source(self) -> str:
        """The cell of the suite that has its scenario and its tuned rules."""
        return self.origin or self.name

    @cached_property
    def hash(self) -> str:
        """Hash of the scenario, its profiles and seeds: what decides about the arrivals."""
        return digest(
            {
                # As written: a field that the schema gains later changes no cell.
                "scenario": self.scenario.model_dump(mode="json", exclude_unset=True),
                "costs": costs(self.scenario),
                "split": self.split,
                "first": self.first,
                "trace": self.trace,
            }
        )


class Suite:
    """A suite: its cells, and what was frozen of it.

    Args:
        path: Its TOML file.

    Raises:
        InputError: A file cannot be read, or a field is wrong.

    Attributes:
        name: Name of the suite.
        path: Its TOML file.
        place: How `get_suite` finds it.
        spec: What it consists of.
        frozen: Content of the frozen file; empty before the first freeze.
        tuned: Tuned rules: ``once`` or a cell's name, opponent, entry.
        cells: All cells, in order.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.stem, path
        self.place = self.name if path.parent == DATA else str(path)
        self.frozen_path = path.with_suffix(".frozen.json")
        self.tuned_path = path.with_suffix(".tuned.toml")
        try:
            self.spec = SuiteSpec.model_validate(read_toml(path, "a suite"))
        except ValidationError as error:
            raise InputError(f"{path}: {first_error(error)}") from None
        self.frozen: dict[str, Any] = {}
        if self.frozen_path.exists():
            try:
                self.frozen = json.loads(self.frozen_path.read_text("utf-8"))
            except ValueError as error:
                raise InputError(f"{self.frozen_path}: {error}", "freeze the suite again") from None
        self.tuned: dict[str, dict[str, dict[str, Any]]] = {}
        if self.tuned_path.exists():
            self.tuned = read_toml(self.tuned_path, "a suite")
        self.cells = self._make_cells()

    def cell(self, name: str) -> Cell:
        """Return a cell by its name.

        Raises:
            InputError: There is none.
        """
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise unknown(f"cell of suite {self.name}:", name, [cell.name for cell in self.cells])

    def choose(self, patterns: tuple[str, ...] | list[str]) -> list[Cell]:
        """Return the cells that patterns name: ``fast-*``, or a group; all for none.

        Raises:
            InputError: A pattern names no cell.
        """
        chosen: set[str] = set()
        for pattern in patterns:
            found = {
                cell.name
                for cell in self.cells
                if fnmatchcase(cell.name, pattern) or cell.group == pattern
            }
            if not found:
                names = [cell.name for cell in self.cells]
                raise unknown(f"cell of suite {self.name}:", pattern, names)
            chosen |= found
        return [cell for cell in self.cells if not patterns or cell.name in chosen]

    def bases(self) -> dict[str, Scenario]:
        """Return the scenario of each base at load 1."""
        found: dict[str, Scenario] = {}
        for cell in self.cells:
            scenario = cell.scenario.model_copy(update={"load": (1.0, 1.0), "name": cell.base})
            found.setdefault(cell.base, scenario)
        return found

    @property
    def hash(self) -> str:
        """Hash of all cells and of the tuned rules: the version, in one word."""
        return digest(
            {
                "cells": {cell.name: cell.hash for cell in self.cells},
                "episodes": self.spec.episodes,
                "tuned": {
                    cell: {name: entry["params"] for name, entry in rules.items()}
                    for cell, rules in self.tuned.items()
                },
            }
        )

    def check(self, cells: list[Cell]) -> None:
        """Refuse cells that are not as they were frozen.

        Raises:
            InputError: The suite was never frozen, or a cell or a profile changed since.
        """
        hashes = self.frozen.get("cells", {})
        remedy = "a changed benchmark is another version; benchmarks/suite_freeze.py writes one"
        for cell in [cell for cell in cells if not cell.trace]:
            if cell.name not in hashes:
                raise InputError(
                    f"suite {self.name}: cell '{cell.name}' is not frozen yet",
                    f"python benchmarks/suite_freeze.py {self.place}",
                )
            if hashes[cell.name] != cell.hash:
                raise InputError(
                    f"suite {self.name}: cell '{cell.name}' is not what was frozen: its scenario "
                    "or a profile changed",
                    remedy,
                )

    def _make_cells(self) -> list[Cell]:
        spec = self.spec
        cells: list[Cell] = []
        for platform, fields in spec.platforms.items():
            for family, workload in spec.families.items():
                base = f"{platform}-{family}"
                data = merge(merge(spec.common, fields), workload)
                for load in spec.loads:
                    cells.append(
                        self._cell("core", base, platform, family, "", load, data, len(cells))
                    )
        for name, variation in spec.variations.items():
            for platform in variation.platforms:
                data = merge(
                    merge(spec.common, spec.platforms[platform]), spec.families[variation.family]
                )
                data = merge(merge(data, variation.change), variation.only.get(platform, {}))
                group: Group = "fixed" if variation.traces else "variation"
                about = group, f"{platform}-{name}", platform, variation.family, name
                cells.append(self._cell(*about, 1.0, data, len(cells)))
        names = [cell.name for cell in cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(
                f"{self.path}: cell '{twice[0]}' is there twice",
                "give each load once, and no variation the name of a family",
            )
        return cells

    def _cell(
        self,
        group: Group,
        base: str,
        platform: str,
        family: str,
        variation: str,
        load: float,
        data: dict[str, Any],
        number: int,
    ) -> Cell:
        name = f"{base}-{load_name(load)}"
        found = self.frozen.get("utilisation", {}).get(base, {})
        fields = {
            **data,
            "name": name,
            "load": load,
            "utilisation_at_load_1": found.get("utilisation", UNCALIBRATED),
        }
        scenario = build_scenario(fields, f"suite {self.name}, cell {name}")
        return Cell(name, base, group, platform, family, variation, load, scenario, number * STRIDE)


def load_name(load: float) -> str:
    """Return a load as names of cells have it: one decimal at least, and no digit lost."""
    return f"{load:.1f}" if float(f"{load:.1f}") == load else str(load)


def suite_names() -> list[str]:
    """Return the names of the shipped suites."""
    return sorted(path.stem for path in DATA.glob("*.toml") if "." not in path.stem)


def get_suite(name_or_path: str | Path) -> Suite:
    """Return a suite that is shipped, or one of the user's own.

    Args:
        name_or_path: A name of `suite_names`, or the path of a ``.toml`` file.

    Raises:
        InputError: There is none, or a field is wrong.
    """
    if str(name_or_path).endswith(".toml"):
        return Suite(Path(name_or_path))
    if name_or_path not in suite_names():
        raise unknown("suite", str(name_or_path), suite_names())
    return Suite(DATA / f"{name_or_path}.toml")


def merge(fields: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return fields with a change: tables are merged, and of two alternatives the other goes."""
    merged = dict(fields)
    for key, value in change.items():
        for pair in ALTERNATIVES:
            if key in pair:
                merged.pop(pair[1 - pair.index(key)], None)
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def costs(scenario: Scenario) -> dict[str, Any]:
    """Return the profiles that a scenario plays with, without what only documents them."""
    skip = {"provenance", "description", "schema_version", "kind"}
    found: dict[str, Any] = {}
    for part in scenario.parts():
        models = part.fleet.choose_from if part.fleet else part.models or ()
        for platform in part.platform:
            found[platform] = get_platform(platform).model_dump(mode="json", exclude=skip)
            for model in sorted(set(models)):
                profile = get_profile(platform, model)
                found[f"{platform}/{model}"] = profile.model_dump(mode="json", exclude=skip)
    return found


def digest(value: Any) -> str:
    """Return a hash of JSON data, 16 hexadecimal digits; numbers count to nine digits."""
    text = json.dumps(_rounded(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
