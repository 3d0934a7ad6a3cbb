"""`jit`: compile a function with numba and keep its type.

With ``NUMBA_DISABLE_JIT=1`` in the environment every function stays plain Python, so that the
same source can be read, stepped through and covered as the reference. Compiled code divides as
NumPy does (x/0 is inf or nan) where plain Python raises, so a function must not divide by zero.

Machine code is cached on disk. Numba renews it when a function's own file changes, but not when
a function that it calls changes in another file; here the cache belongs to the text of all
modules together, so that no edit can leave stale code behind.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

# Nothing in these is compiled, so that their changes need not renew the cache.
UNCOMPILED = frozenset({"agents", "cli", "deploy"})

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile function on its first call, without the GIL, and cache the machine code on disk."""
    config: Any = numba.config  # fills itself from the environment, unseen by type checkers
    given = config.CACHE_DIR
    config.CACHE_DIR = _cache_folder(given)
    try:
        return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    finally:
        config.CACHE_DIR = given  # other users of numba in this process keep theirs


@functools.cache
def _cache_folder(given: str) -> str:
    """Name the cache after the sources that compiled code, constants included, can come from.

    Args:
        given: The folder of ``NUMBA_CACHE_DIR``, or an empty string.

    Returns:
        A folder below given or, without one, in the package; an empty string (numba then takes
        its place in the user's cache) where the package cannot be written to, and so not edited.
    """
    package = Path(__file__).parent.parent
    if not given and not os.access(package, os.W_OK):
        return ""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(package, followlinks=True):
        folders[:] = sorted(set(folders) - UNCOMPILED)
        for name in sorted(names):
            if name.endswith(".py"):
                digest.update(Path(folder, name).read_bytes())
    return str(Path(given or package / "__pycache__") / f"numba-{digest.hexdigest()[:16]}")
