"""Files are written whole or not at all: a reader never meets half a file."""

import errno
import hashlib
import json
import math
import os
import secrets
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from mmrl.errors import InputError, MmrlError

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def atomic_write(path: str | Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file that takes its place at path only when the block ends without an exception.

    The text goes to a temporary file beside it, which is synchronised to disk and renamed; on
    any exception, Ctrl-C included, the temporary file is removed and path stays as it was.
    Missing parent folders are made. Text is UTF-8 with the line ends as written.

    Args:
        path: Where the file shall stand.
        mode: ``"w"`` for text, ``"wb"`` for bytes.

    Yields:
        The open temporary file.

    Raises:
        InputError: Nothing can be written at path.
        MmrlError: The disk is full.
    """
    # Written through a link, as open() would: the link itself is not replaced.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _not_writable(target):
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            target.parent.mkdir(parents=True, exist_ok=True)
            # O_EXCL with 0o666: an ordinary new file, with the rights that the umask leaves.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            encoding, newline = ("utf-8", "") if mode == "w" else (None, None)
            with open(descriptor, mode, encoding=encoding, newline=newline) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with _not_writable(target):
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise MmrlError(f"disk full while writing {path}", "free some space and retry") from error


def refuse_foreign(folder: Path, ours: bool, what: str) -> None:
    """Refuse a folder to write into that holds something else.

    Args:
        folder: It may not be there, or be empty.
        ours: Whether it holds what is to be written.
        what: That, for the message.

    Raises:
        InputError: It holds something else, or is a file.
    """
    if folder.exists() and not (folder.is_dir() and (ours or not any(folder.iterdir()))):
        raise InputError(f"{folder} is there and holds no {what}", "choose another --out")


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.
        kind: What it should be, with its article, for the remedy.

    Raises:
        InputError: It cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot read {path}: {reason}", f"name {kind}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}", "correct the line") from error


def write_json(path: str | Path, obj: object, indent: int | None = 2) -> None:
    """Write obj as JSON, atomically; NumPy values become numbers and lists.

    Args:
        path: Where the file shall stand.
        obj: What it shall hold.
        indent: Spaces of each level; None: all on one line, for long columns of numbers.

    Raises:
        InputError: Nothing can be written at path.
        MmrlError: The disk is full.
        ValueError: obj holds a NaN or an infinity, which JSON does not know; see `finite`.
    """
    with atomic_write(path) as file:
        json.dump(obj, file, indent=indent, allow_nan=False, default=_plain)
        file.write("\n")


def files_hash(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of what files hold, one after the other, in hexadecimal digits."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
    return found.hexdigest()


def finite(value: Any) -> Any:
    """Return a value with None for each NaN and infinity in its dicts, lists and tuples."""
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> object:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


@contextmanager
def _not_writable(target: Path) -> Iterator[None]:
    """Explain why a file cannot be made at target; a full disk is left to the caller."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        # A parent that is a file: mkdir says "file exists" about the parent, not about target.
        in_a_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "its folder is a file" if in_a_file else (error.strerror or str(error)).lower()
        raise InputError(
            f"cannot write {target}: {reason}", "choose another place or correct its rights"
        ) from error
