"""Which hand-written rule is meant to suggest actions in the observation."""

from collections.abc import Mapping
from typing import Any

from mmrl.errors import InputError
from mmrl.rules import get_rule
from mmrl.rules.base import Rule


def as_rule(suggestion: str | Mapping[str, Any] | Rule) -> Rule:
    """Return the rule that is meant.

    Args:
        suggestion: A rule, its name, or a mapping of its ``name`` and parameters.

    Raises:
        InputError: There is no such rule, or a parameter is wrong.
    """
    if isinstance(suggestion, Rule):
        return suggestion
    if isinstance(suggestion, str):
        return get_rule(suggestion)
    params = dict(suggestion)
    if "name" not in params:
        raise InputError("suggestion has no name", "give {'name': 'slack', ...}")
    return get_rule(params.pop("name"), **params)
