"""Machine code is cached, and never outlives a change of any module."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmrl.node import jit

JIT = Path(jit.__file__)
INNER = "from mmrl.node.jit import jit\n\n@jit\ndef inner() -> int:\n    return {}\n"
OUTER = (
    "from mmrl.inner import inner\nfrom mmrl.node.jit import jit\n\n"
    "@jit\ndef outer() -> int:\n    return inner()\n"
)
CALL = (
    "from mmrl.outer import outer; print(outer());"
    "stats = getattr(outer, 'stats', None); print(stats and sum(stats.cache_hits.values()))"
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of the same name with `jit` and two compiled modules, one calling the other."""
    package = tmp_path / "mmrl"
    (package / "node").mkdir(parents=True)
    for folder in (package, package / "node"):
        (folder / "__init__.py").touch()
    shutil.copy(JIT, package / "node")
    (package / "inner.py").write_text(INNER.format(1))
    (package / "outer.py").write_text(OUTER)
    return package


def call(package: Path, **extra: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(package.parent), **extra}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-P", "-B", "-c", CALL]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return result.stdout.split()


def test_a_change_in_a_called_module_reaches_its_cached_caller(package: Path) -> None:
    assert call(package) == ["1", "0"]
    assert call(package) == ["1", "1"]
    (package / "inner.py").write_text(INNER.format(2))
    assert call(package) == ["2", "0"]


def test_without_compilation_it_is_the_function_itself(package: Path) -> None:
    assert call(package, NUMBA_DISABLE_JIT="1") == ["1", "None"]
    assert not (package / "__pycache__").exists()


def test_a_change_elsewhere_leaves_the_cache_alone(package: Path) -> None:
    assert call(package) == ["1", "0"]
    (package / "other.py").write_text(INNER.format(3))
    assert call(package) == ["1", "1"]
