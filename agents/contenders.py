"""`Contender`: a policy that takes part in an evaluation, named as the user names it.

A rule (``slack``; ``slack@tuned`` with the parameters that are shipped as tuned for the scenario
or, where it has none, for fleets of any kind; ``slack@runs/tuned.toml`` with those of a file that
`mmrl tune` wrote), ``mpc`` or ``clairvoyant`` (see ``mmrl.bounds``), the best policy of a run
folder (``runs/x``; ``runs/x@step0`` is the one it started from), the folder of an exported policy,
or ``default``, the one that is shipped. ``label=...`` in front of a learned policy gives it a name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmrl.agents import runs
from mmrl.agents.export import DEFAULT, DESCRIPTION, load_policy
from mmrl.bounds import PLANNERS, Planner
from mmrl.errors import InputError, nearest
from mmrl.rules import get_rule, rule_names, tuned_rule
from mmrl.rules.base import Rule
from mmrl.rules.registry import TUNED, tuned_for, tuned_params
from mmrl.scenarios.registry import get_scenario

CHAMPION = "slack"
AT_TUNED = "@tuned"
STEP0 = "@step0"
Kind = Literal["rule", "learned", "live", "step0", "bound"]
CLAIRVOYANT = "clairvoyant"


@dataclass(frozen=True)
class Contender:
    """One policy of an evaluation; small, so that it can be sent to another process.

    Attributes:
        name: Its label in tables and figures, unique within an evaluation.
        kind: ``rule``, ``learned``, ``live`` for what a server did, ``step0`` for what a learned
            policy started from, or ``bound`` for one that knows the future.
        rule: Name of the rule.
        tuned: File whose parameters for the scenario a rule takes.
        planner: Name of the planner.
        path: Folder of the exported policy.
        run: Run folder that the policy comes from.
        params: Parameters of a rule, or of a planner's base rule, in place of all others.
    """

    name: str
    kind: Kind
    rule: str = ""
    planner: str = ""
    path: Path | None = None
    run: Path | None = None
    params: tuple[tuple[str, Any], ...] | None = None
    tuned: Path | None = None

    def plays(self, scenario: str) -> bool:
        """Whether the contender exists for a scenario: a rule may not be tuned for it."""
        return self.tuned is None or tuned_for(scenario, self.rule, self.tuned) is not None

    def rule_for(self, scenario: str) -> Rule:
        """Return the rule with its parameters for a scenario."""
        if self.params is not None:
            return get_rule(self.rule, **dict(self.params))
        if self.tuned is not None:
            return tuned_rule(self.rule, scenario, self.tuned)
        return get_rule(self.rule)

    def planner_for(self, scenario: str) -> Planner:
        """Return the planner on the champion, tuned for a scenario where it was."""
        base = champion_for(scenario)
        if self.params is not None:
            base = get_rule(CHAMPION, **dict(self.params))
        return replace(PLANNERS[self.planner], base=base)


def champion_for(scenario: str) -> Rule:
    """Return the champion as tuned for a scenario, or else for any fleet."""
    return tuned_rule(CHAMPION, scenario)


def _differs(scenario: str) -> bool:
    """Whether the champion tuned for this very scenario is another than the champion."""
    params = tuned_params().get(scenario, {}).get(CHAMPION)
    return params is not None and get_rule(CHAMPION, **params) != get_rule(CHAMPION)


def everyone(scenarios: Iterable[str]) -> list[str]:
    """Return who takes part where nobody is named: the shipped policy and all rules.

    The two rules that are mostly the best come once more as tuned.

    Args:
        scenarios: Names or paths; the shipped policy stays away if it has not the verbs of one.

    Raises:
        InputError: A scenario is unknown, or the shipped policy cannot be read.
    """
    shipped = load_policy(DEFAULT)
    suits = all(shipped.plays(get_scenario(name).verbs == "full") for name in scenarios)
    tuned = [name + AT_TUNED for name in (CHAMPION, "partial")]
    return [*([DEFAULT] if suits else []), *rule_names(), *tuned]


def resolve(names: Sequence[str], scenarios: Iterable[str]) -> list[Contender]:
    """Return the contenders that a user names.

    A run brings the policy it started from in a row of its own, and the champion comes once more
    with the parameters tuned for the scenario where these are others.

    Args:
        names: As in the module's docstring.
        scenarios: Names of the scenarios they will play.

    Raises:
        InputError: A policy is unknown or cannot be read, or two have the same name.
    """
    played = list(scenarios)
    found: list[Contender] = []
    for name in names:
        for contender in _named(name):
            if contender.tuned and not any(map(contender.plays, played)):
                file = "runs/tuned.toml" if contender.tuned == TUNED else str(contender.tuned)
                raise InputError(
                    f"{contender.tuned.name} has no '{contender.rule}' tuned for "
                    f"{', '.join(played)}",
                    f"tune it (mmrl tune --help) and name the file: {contender.rule}@{file}",
                )
            if contender not in found:
                found.append(contender)
    champion = Contender(CHAMPION + AT_TUNED, "rule", CHAMPION, tuned=TUNED)
    names_found = [contender.name for contender in found]
    if CHAMPION in names_found and champion not in found and any(map(_differs, played)):
        found.insert(names_found.index(CHAMPION) + 1, champion)
    for contender in found:
        if sum(contender.name == other.name for other in found) > 1:
            raise InputError(
                f"two policies are named '{contender.name}'", "name one of them: label=path"
            )
    return found


def _named(name: str) -> list[Contender]:
    rule, at, tuned = name.partition("@")
    if rule in rule_names():
        if not at:
            return [Contender(name, "rule", rule)]
        file = TUNED if name == rule + AT_TUNED else Path(tuned)
        tuned_params(file)  # says what is wrong now rather than in another process
        short = name if file == TUNED else f"{rule}@{file.name}"
        return [Contender(short, "rule", rule, tuned=file)]
    if name in PLANNERS:
        return [Contender(name, "bound" if name == CLAIRVOYANT else "rule", planner=name)]
    label, _, place = name.rpartition("=")
    path = Path(place.removesuffix(STEP0))
    if place == DEFAULT:
        return _learned(Path(DEFAULT), label or DEFAULT)
    if not place or not path.exists():
        raise _unknown(name, place)
    learned = _learned(path, label or path.resolve().name)
    if not place.endswith(STEP0):
        return learned
    if len(learned) == 1:
        raise InputError(f"{path} is not a run: it has no step-0 policy", "name the run folder")
    return [replace(learned[1], name=label) if label else learned[1]]


def _learned(path: Path, label: str) -> list[Contender]:
    """Return the policy of a run and the one it started from, or an exported policy."""
    load_policy(path)  # says what is wrong now rather than in another process
    if not runs.is_run(path):
        return [Contender(label, "learned", path=path)]
    load_policy(path / runs.STEP0)
    return [
        Contender(label, "learned", path=path / runs.BEST, run=path),
        Contender(f"{label} step 0", "step0", path=path / runs.STEP0, run=path),
    ]


def _unknown(name: str, place: str) -> InputError:
    folders = [
        str(folder)
        for folder in Path("runs").glob("*/")
        if runs.is_run(folder) or (folder / DESCRIPTION).is_file()
    ]
    known = [*rule_names(), *PLANNERS, DEFAULT]
    near = nearest(place, [*known, *folders])
    return InputError(
        f"unknown policy '{name}'",
        near or f"a rule ({', '.join(known)}), a run folder or an exported policy",
    )
