"""Errors name what is wrong and the remedy, and survive the way between processes."""

import pickle

from mmrl.errors import InputError, nearest, unknown


def test_the_remedy_stands_in_brackets() -> None:
    assert str(InputError("no such file 'a'", "name one")) == "no such file 'a' (name one)"
    assert str(InputError("no such file 'a'")) == "no such file 'a'"


def test_an_unknown_name_gets_the_nearest_or_else_all() -> None:
    assert nearest("slak", ["slack", "lru"]) == "did you mean 'slack'?"
    assert nearest("SLACK", ["slack", "lru"]) == "did you mean 'slack'?"
    assert nearest("zzz", ["slack", "lru"]) == ""
    assert str(unknown("rule", "slak", ["slack"])) == "unknown rule 'slak' (did you mean 'slack'?)"
    assert str(unknown("rule", "zzz", ["slack", "lru"])) == "unknown rule 'zzz' (known: lru, slack)"


def test_an_error_crosses_processes_unchanged() -> None:
    error = pickle.loads(pickle.dumps(InputError("a", "b")))
    assert (type(error), error.message, error.remedy) == (InputError, "a", "b")
