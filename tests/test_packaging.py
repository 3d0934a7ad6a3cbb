"""Imports point one way, and the wheel is the package: all of it, once, and it runs."""

import ast
import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmrl import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmrl"
ROOMS = ("envs", "agents", "deploy")


def package_files() -> Iterator[Path]:
    """Every file of the package, through its links, as a path below mmrl."""
    for folder, folders, names in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(folder, name).relative_to(PACKAGE) for name in names)


def imports(tree: ast.AST, package: str, in_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield (module, whether inside a function) of every import below tree."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", in_function) for alias in node.names)
        else:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                in_function = True  # never runs: as lazy as can be
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, in_function or function)


def upward(file: Path, source: str) -> list[str]:
    """Name the imports in file (a path below mmrl) that point up the table of CONTRIBUTING."""
    room = file.parts[0]
    above = {"envs": ("agents", "deploy"), "agents": ("deploy",), "deploy": ()}.get(room, ROOMS)
    package = ".".join(("mmrl", *file.parent.parts))
    wrong = []
    for module, in_function in imports(ast.parse(source), package):
        first, second = (*module.split("."), "")[:2]
        lazily_from_cli = room == "cli" and in_function
        # Imported without `mmrl.`, a room would be loaded a second time.
        if (first == "mmrl" and second in above and not lazily_from_cli) or first in ROOMS:
            wrong.append(module)
    return wrong


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("node/a.py", "import mmrl.envs.env", ["mmrl.envs.env"]),
        ("node/a.py", "def f():\n    from mmrl import agents", ["mmrl.agents"]),
        ("node/a.py", "from ..deploy import x", ["mmrl.deploy.x"]),
        ("files.py", "from .envs import x", ["mmrl.envs.x"]),
        ("files.py", "from mmrl.errors import x\nimport gymnasium.envs", []),
        ("cli/a.py", "from mmrl.agents import x", ["mmrl.agents.x"]),
        ("cli/a.py", "def f():\n    from mmrl.agents import x", []),
        ("cli/a.py", "if TYPE_CHECKING:\n    from mmrl.agents import x", []),
        ("files.py", "if TYPE_CHECKING:\n    from mmrl.agents import x", ["mmrl.agents.x"]),
        ("envs/a.py", "import mmrl.node.jit, mmrl.agents", ["mmrl.agents"]),
        ("envs/a.py", "if True:\n    from mmrl.deploy import x", ["mmrl.deploy.x"]),
        ("agents/a.py", "from mmrl.envs import x\nimport mmrl.deploy", ["mmrl.deploy"]),
        ("agents/a.py", "from envs.env import x", ["envs.env.x"]),
        ("deploy/a.py", "import mmrl.agents, mmrl.envs", []),
    ],
)
def test_the_import_check_sees(file: str, source: str, wrong: list[str]) -> None:
    assert upward(Path(file), source) == wrong


def test_imports_never_point_up() -> None:
    sources = [file for file in package_files() if file.suffix == ".py"]
    assert {file.parts[0] for file in sources} >= {*ROOMS, "cli", "node"}
    wrong = {str(file): upward(file, (PACKAGE / file).read_text("utf-8")) for file in sources}
    assert {file: modules for file, modules in wrong.items() if modules} == {}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--wheel", "--no-isolation", "--outdir", str(folder)]
    build = [sys.executable, "-m", "build", *options, str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = Counter(name for name in archive.namelist() if ".dist-info/" not in name)
    assert held == Counter(f"mmrl/{file.as_posix()}" for file in package_files())
    assert {f"mmrl/{room}/__init__.py" for room in ROOMS} <= set(held)
    assert "mmrl/py.typed" in held
    shipped = {f"mmrl/agents/data/default/policy.{kind}" for kind in ("json", "safetensors")}
    assert shipped <= set(held)


def test_the_wheel_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    # First on the path: what is imported is the wheel and not this checkout.
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def output(*command: str | Path) -> str:
        result = subprocess.run(
            command, cwd=empty, env=environment, check=True, capture_output=True, text=True
        )
        return result.stdout

    where = "import mmrl.envs, mmrl.agents as a; print(mmrl.envs.__file__, a.__file__, sep='\\n')"
    for file in output(sys.executable, "-c", where).split():
        assert Path(file).is_relative_to(site)
    assert output(site / "bin" / "mmrl", "--version") == f"mmrl {__version__}\n"
    assert "Usage: mmrl" in output(site / "bin" / "mmrl", "--help")
