"""`jit` and `jit_arrays`: compile a function with numba and keep its type.

With ``NUMBA_DISABLE_JIT=1`` in the environment every function stays plain Python, so that the
same source can be read, stepped through and covered as the reference. Compiled code divides as
NumPy does (x/0 is inf or nan) where plain Python raises, so a function must not divide by zero.

Machine code is cached on disk. Numba renews it when a function's own file changes, but not when
a function that it calls changes in another file; here the cache belongs to the text of the
function's module and of all modules that it imports, so that no edit can leave stale code behind.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE = Path(__file__).parent.parent
_IMPORT = re.compile(r"^\s*(?:from|import)\s+(mmrl[\w.]*)", re.MULTILINE)


def jit(function: F) -> F:
    """Compile function on its first call, without the GIL, and cache the machine code on disk.

    It may take arrays and parts of them but make none: without references to count, which numba
    would do at every row that is looked at, the simulator takes a third less time.
    """
    return _compile(function, count_references=False)


def jit_arrays(function: F) -> F:
    """Compile as `jit` does a function that makes arrays."""
    return _compile(function, count_references=True)


def _compile(function: F, count_references: bool) -> F:
    config: Any = numba.config  # fills itself from the environment, unseen by type checkers
    given = config.CACHE_DIR
    config.CACHE_DIR = _cache_folder(given, function.__module__)
    try:
        # Always said: else a function would take the choice of whoever happens to call it first.
        options: dict[str, Any] = {"error_model": "numpy", "_nrt": count_references}
        return cast(F, numba.njit(cache=True, nogil=True, **options)(function))
    finally:
        config.CACHE_DIR = given  # other users of numba in this process keep theirs


@functools.cache
def _cache_folder(given: str, module: str) -> str:
    """Name the cache of a module after the sources that its compiled code can come from.

    Args:
        given: The folder of ``NUMBA_CACHE_DIR``, or an empty string.
        module: The module in which a function is compiled.

    Returns:
        A folder below given or, without one, in the package; an empty string (numba then takes
        its place in the user's cache) where the package cannot be written to, and so not edited.
    """
    if not given and not os.access(_PACKAGE, os.W_OK):
        return ""
    digest = hashlib.sha256()
    for source in sorted(_sources(module)):
        digest.update(source.read_bytes())
    return str(Path(given or _PACKAGE / "__pycache__") / f"numba-{digest.hexdigest()[:16]}")


def _sources(module: str) -> set[Path]:
    """Return the files of a module of the package and of all that it imports, transitively."""
    found: set[Path] = set()
    modules = [module]
    while modules:
        path = _PACKAGE.parent.joinpath(*modules.pop().split("."))
        candidates = [path.with_suffix(".py"), *path.glob("*.py")]
        for source in set(filter(Path.is_file, candidates)) - found:
            found.add(source)
            modules += _IMPORT.findall(source.read_text("utf-8"))
    return found
