"""Rules by name, with the parameters that tuning found for a scenario."""

import functools
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmrl.errors import InputError, first_error, nearest, unknown
from mmrl.files import read_toml
from mmrl.rules.base import Rule
from mmrl.rules.drain_first import DrainFirst
from mmrl.rules.full_swap import FullSwap
from mmrl.rules.gdsf import Gdsf
from mmrl.rules.idle_cost import IdleCost
from mmrl.rules.lru import Lru
from mmrl.rules.partial import Partial
from mmrl.rules.setup_index import SetupIndex
from mmrl.rules.slack import Slack
from mmrl.rules.static import Static

ANY_FLEET = "universal"  # scenario that draws fleets of any kind: what was tuned there suits others
TUNED = Path(__file__).parent / "data" / "tuned.toml"
RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (Slack, FullSwap, Lru, Gdsf, IdleCost, Static, DrainFirst, SetupIndex, Partial)
}


def rule_names() -> list[str]:
    """Return the names of the rules, the champion first."""
    return list(RULES)


def rule_class(name: str) -> type[Rule]:
    """Return the class of a rule.

    Raises:
        InputError: There is no rule of that name.
    """
    if name not in RULES:
        raise unknown("rule", name, RULES)
    return RULES[name]


def read_tuned(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what `mmrl tune` wrote: scenario, rule, and an entry with the table ``params``.

    Raises:
        InputError: The file cannot be read, is not TOML, or holds something else.
    """
    tables = read_toml(path, "a file of mmrl tune")
    for rules in tables.values():
        for entry in rules.values() if isinstance(rules, dict) else [rules]:
            if not isinstance(entry, dict) or not isinstance(entry.get("params"), dict):
                raise InputError(
                    f"{path} holds something else than tuned parameters",
                    "name a file of mmrl tune",
                )
    return tables


@functools.cache
def tuned_params(path: Path = TUNED) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the tuned parameters of a file: scenario, rule, parameter.

    Raises:
        InputError: See `read_tuned`.
    """
    return {
        scenario: {name: dict(entry["params"]) for name, entry in rules.items()}
        for scenario, rules in read_tuned(path).items()
    }


def tuned_for(scenario: str, rule: str, path: Path = TUNED) -> dict[str, Any] | None:
    """Return a rule's parameters as tuned for a scenario, or else for fleets of any kind.

    Args:
        scenario: Name of the scenario.
        rule: Name of the rule.
        path: A file of `tuned_params`.

    Returns:
        The parameters; None where the file has the rule for neither.

    Raises:
        InputError: The file cannot be read or is not TOML.
    """
    table = tuned_params(path)
    places = (place for place in (scenario, ANY_FLEET) if rule in table.get(place, {}))
    found = next(places, None)
    return None if found is None else table[found][rule]


def get_rule(name: str, **params: Any) -> Rule:
    """Return a rule.

    Args:
        name: One of ``rule_names``.
        **params: Parameters in place of its defaults.

    Raises:
        InputError: There is no such rule, or a parameter is unknown or out of its bounds.
    """
    rule = rule_class(name)
    try:
        return rule(**params)
    except ValidationError as error:
        raise _explain(rule, error) from None


def tuned_rule(name: str, scenario: str, path: Path = TUNED) -> Rule:
    """Return a rule as tuned for a scenario, or else for fleets of any kind, or else as it comes.

    Args:
        name: One of ``rule_names``.
        scenario: Name of the scenario.
        path: A file of `tuned_params`.

    Raises:
        InputError: There is no such rule, or the file cannot be used; see `tuned_for`.
    """
    return get_rule(name, **(tuned_for(scenario, name, path) or {}))


def _explain(rule: type[Rule], error: ValidationError) -> InputError:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        known = list(rule.model_fields)
        remedy = nearest(field, known) or f"known: {', '.join(known)}"
        return InputError(f"rule '{rule.name}': unknown parameter '{field}'", remedy)
    return InputError(f"rule '{rule.name}': {first_error(error)}")
