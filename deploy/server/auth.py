"""API keys: where they come from, and whether a request shows one."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path

from mmrl.deploy.server.errors import ApiError
from mmrl.errors import InputError


def read_keys(file: Path | None, listed: str = "") -> tuple[str, ...]:
    """Return the keys of a file and those listed beside it.

    Args:
        file: One key a line; empty lines and lines that start with ``#`` count for nothing.
        listed: Keys separated by commas or blanks, as in a variable of the environment.

    Raises:
        InputError: The file cannot be read or holds no key, or a key cannot travel in a header.
    """
    keys = [key for key in re.split(r"[,\s]+", listed) if key]
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot read the keys in {file}", "give a text file with one key a line"
            ) from error
        found = [line.strip() for line in lines]
        found = [line for line in found if line and not line.startswith("#")]
        if not found:
            raise InputError(f"{file} holds no key", "write one key a line")
        keys += found
    if any(not re.fullmatch(r"[!-~]+", key) for key in keys):
        raise InputError("a key holds a blank or a special character", "use plain ASCII")
    return tuple(dict.fromkeys(keys))


class Keys:
    """Keys that open a part of this server; without any, it is open."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Let a request pass that shows a key.

        Args:
            authorization: The header of this name.

        Raises:
            ApiError: 401.
        """
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refused("An API key is needed: send 'Authorization: Bearer KEY'.")
        shown = _digest(key.strip())
        # All are compared, and digests of one length: the time tells nothing about any key.
        if not sum(hmac.compare_digest(shown, digest) for digest in self._digests):
            raise _refused("The API key is not valid.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refused(message: str) -> ApiError:
    return ApiError(
        401,
        message,
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": 'Bearer realm="mmrl"'},
    )
