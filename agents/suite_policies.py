"""`Entry`: who takes part in a benchmark: tuned rules, policies that look ahead, learned ones.

Every rule comes twice: tuned once on the training distribution (comparator ``once``) and tuned for
the very cell (``cell``). A learned policy with several training seeds is a group of entries:

    label=runs/a-s0+runs/a-s1+runs/a-s2      or the folder that holds the runs

One that was trained for some of the cells names them: ``there@*-fleet16=runs/b-s0+runs/b-s1``. It
plays these alone, and the others are compared with it there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mmrl.agents import runs
from mmrl.agents.contenders import CHAMPION, CLAIRVOYANT, Contender, resolve
from mmrl.agents.export import (
    DEFAULT,
    DEFAULT_FOLDER,
    DESCRIPTION,
    ExportedPolicy,
    load_policy,
    policy_hash,
)
from mmrl.bounds import PLANNERS
from mmrl.errors import InputError, nearest
from mmrl.rules import rule_names
from mmrl.scenarios.suite import Cell, Suite, digest

Kind = Literal["rule", "learned", "bound", "planner"]
ONCE, CELL = "once", "cell"
COMPARATORS = (ONCE, CELL)
FOR = "@"  # between the name of a policy and the cells that it was trained for


@dataclass(frozen=True)
class Entry:
    """One policy of a benchmark.

    Attributes:
        name: Unique in the benchmark.
        kind: ``rule``, ``learned``, ``bound`` for who knows the future, or ``planner`` for who
            samples futures.
        comparator: Of a rule: tuned ``once`` or for each ``cell``.
        opponent: Name of a rule among the suite's opponents, or of a planner.
        rule: Name of the rule.
        params: For each cell's name the parameters of the rule, or of the planner's base.
        path: Folder of a learned policy.
        group: Learned policies of one group differ in the training seed only.
        seed: Which of them it is: the seed that its files tell, else its number.
        sha256: Of a learned policy's two files.
    """

    name: str
    kind: Kind
    comparator: str = ""
    opponent: str = ""
    rule: str = ""
    params: dict[str, dict[str, Any]] = field(default_factory=dict)
    path: Path | None = None
    group: str = ""
    seed: int = 0
    sha256: str = ""

    def contender(self, cell: Cell) -> Contender:
        """Return the entry as it plays a cell."""
        if self.path is not None:
            return Contender(self.name, "learned", path=self.path)
        params = tuple(self.params[cell.source].items())
        if self.kind == "rule":
            return Contender(self.name, "rule", self.rule, params=params)
        kind: Literal["bound", "rule"] = "bound" if self.kind == "bound" else "rule"
        return Contender(self.name, kind, planner=self.opponent, params=params)

    @property
    def trained_for(self) -> str:
        """Return the pattern of cells that a learned policy was trained for; empty for any."""
        return self.group.partition(FOR)[2]

    def wanted(self, cell: Cell) -> bool:
        """Whether it is to play a cell: who was trained for some cells plays no others."""
        return not self.trained_for or fnmatchcase(cell.name, self.trained_for)

    def identity(self, cell: Cell) -> str:
        """Return a hash of what decides about its actions in a cell."""
        if self.path is not None:
            return self.sha256
        planner = repr(PLANNERS[self.opponent]) if self.opponent in PLANNERS else ""
        return digest([self.rule, planner, self.params[cell.source]])

    def plays(self, cell: Cell) -> bool:
        """Whether it plays a cell: a learned policy needs its verb set and must be wanted."""
        if self.path is not None:
            return self.wanted(cell) and _policy(self.path).plays(cell.scenario.verbs == "full")
        return cell.source in self.params


def entries(suite: Suite, cells: Sequence[Cell], names: Sequence[str]) -> list[Entry]:
    """Return who takes part.

    Args:
        suite: Whose tuned rules.
        cells: What is played.
        names: Opponents, planners and learned policies; without a rule among them all opponents
            take part, and the planners where the suite wants them.

    Raises:
        InputError: A name is unknown, a policy cannot be read, a rule was not tuned, or two
            policies have one name.
    """
    opponents = suite.spec.opponents
    hand_written = [name for name in names if name in opponents or name in PLANNERS]
    learned = [name for name in names if name not in hand_written]
    for name in learned:
        if name in rule_names():
            raise InputError(
                f"rule '{name}' is not an opponent of suite {suite.name}",
                nearest(name, opponents) or f"opponents: {', '.join(opponents)}",
            )
    found: list[Entry] = []
    for name in hand_written or [*opponents, *PLANNERS]:
        found += _rule(suite, cells, name) if name in opponents else _planner(suite, cells, name)
    for name in learned:
        found += _learned(name)
        if pattern := found[-1].trained_for:
            suite.choose([pattern])  # or it is of no cell
    for entry in found:
        if sum(entry.name == other.name for other in found) > 1:
            raise InputError(f"two policies are named '{entry.name}'", "name one: label=path")
    return found


def _rule(suite: Suite, cells: Sequence[Cell], name: str) -> list[Entry]:
    rule = suite.spec.opponents[name].rule
    found = []
    for comparator in COMPARATORS:
        params = {
            cell.source: _tuned(suite, ONCE if comparator == ONCE else cell.source, name)
            for cell in cells
        }
        found.append(Entry(f"{name} ({comparator})", "rule", comparator, name, rule, params))
    return found


def _planner(suite: Suite, cells: Sequence[Cell], name: str) -> list[Entry]:
    """Return a planner for the cells that the suite wants it on, above the champion tuned once."""
    patterns = getattr(suite.spec.lookahead, name)
    wanted = {cell.name for cell in suite.choose(patterns)} if patterns else set()
    base = _tuned(suite, ONCE, CHAMPION)
    params = {cell.source: base for cell in cells if cell.name in wanted}
    kind: Kind = "bound" if name == CLAIRVOYANT else "planner"
    return [Entry(name, kind, opponent=name, params=params)] if params else []


def _tuned(suite: Suite, place: str, name: str) -> dict[str, Any]:
    entry = suite.tuned.get(place, {}).get(name)
    if entry is None:
        raise InputError(
            f"suite {suite.name}: rule '{name}' is not tuned for '{place}'",
            f"python benchmarks/suite_freeze.py {suite.place}",
        )
    return dict(entry["params"])


def _learned(name: str) -> list[Entry]:
    """Return the entries of a run, an exported policy, or a group of them."""
    label, _, places = name.rpartition("=")
    parts = [label + "=" + place if label else place for place in places.split("+")]
    folder = Path(places)
    if len(parts) == 1 and folder.is_dir() and not _is_policy(folder):
        runs = sorted(run for run in folder.iterdir() if run.is_dir() and _is_policy(run))
        if not runs:
            raise InputError(f"{folder} holds no run and no policy", "name a run folder")
        parts, label = [str(run) for run in runs], label or folder.resolve().name
    paths = [_policy_path(part) for part in parts]
    if len(paths) == 1:
        return [_entry(label or paths[0][0], paths[0][1], label or paths[0][0], 0)]
    label = label or paths[0][0]
    found = [_entry("", path, label, number) for number, (_, path) in enumerate(paths)]
    seeds = [entry.seed for entry in found]
    if len(set(seeds)) < len(seeds):  # made elsewhere: numbered
        found = [_entry("", path, label, k, k) for k, (_, path) in enumerate(paths)]
    return found


def _is_policy(folder: Path) -> bool:
    return runs.is_run(folder) or (folder / DESCRIPTION).is_file()


def _policy_path(name: str) -> tuple[str, Path]:
    """Return label and folder of a learned policy, of a run its best."""
    contender = resolve([name], [])[0]
    if contender.path is None:
        raise InputError(f"'{name}' is no learned policy", "name a run folder or a policy")
    shipped = contender.path == Path(DEFAULT)
    return contender.name, DEFAULT_FOLDER if shipped else contender.path


def _entry(name: str, path: Path, group: str, number: int, seed: int | None = None) -> Entry:
    if seed is None:
        told = _policy(path.resolve()).card.seed
        seed = number if told is None else told
    return Entry(
        name or f"{group} seed {seed}",
        "learned",
        path=path.resolve(),
        group=group,
        seed=seed,
        sha256=policy_hash(path),
    )


@cache
def _policy(path: Path) -> ExportedPolicy:
    return load_policy(path)
