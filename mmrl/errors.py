"""Errors that a user can act on: what is wrong in one line, and what to do about it."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class MmrlError(Exception):
    """A failure that is explained to the user in one line; the command line exits with 1.

    Args:
        message: What went wrong; names the field, file or line.
        remedy: What the user can do about it.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class InputError(MmrlError):
    """Something that the user gave is wrong; the command line exits with 2."""


def first_error(error: "ValidationError") -> str:
    """Say the first error of a validation in one line, the field first, and how many more."""
    errors = error.errors(include_url=False)
    field = ".".join(str(part) for part in errors[0]["loc"])
    message = errors[0]["msg"].removeprefix("Value error, ")
    message = f"{field}: {message[:1].lower()}{message[1:]}" if field else message
    more = len(errors) - 1
    return f"{message} (and {more} more)" if more else message


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the candidate closest to name, or an empty string."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    return f"did you mean '{by_lower_case[close[0]]}'?" if close else ""


def unknown(kind: str, name: str, candidates: Iterable[str]) -> InputError:
    """Build the error for a name that does not exist.

    Args:
        kind: What was looked up, for example ``"scenario"``.
        name: The name that was not found.
        candidates: The names that exist.

    Returns:
        The error, to be raised; its remedy is the nearest name, or else all of them.
    """
    known = sorted(candidates)
    remedy = nearest(name, known) or (f"known: {', '.join(known)}" if known else "there are none")
    return InputError(f"unknown {kind} '{name}'", remedy)
