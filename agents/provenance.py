"""Where figures come from: versions, commit, machine, scenarios, seeds and the command."""

import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mmrl
from mmrl.scenarios.schema import Scenario

PACKAGES = ("numpy", "numba", "torch", "stable-baselines3", "sb3-contrib", "gymnasium")


def provenance(scenarios: Sequence[Scenario], **more: Any) -> dict[str, Any]:
    """Return where figures that are made now come from.

    Args:
        scenarios: What they are about; each is hashed with all its fields.
        **more: Seeds, episodes and the like, added as they are.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "commit": git_commit(),
        "versions": versions(),
        "machine": {"system": platform.platform(), "processor": _processor()},
        "scenarios": {scenario.name: scenario_hash(scenario) for scenario in scenarios},
        **more,
    }


def command_line() -> str:
    """Return the command that this process runs, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def scenario_hash(scenario: Scenario) -> str:
    """Return a hash of all fields of a scenario, 12 hexadecimal digits."""
    return hashlib.sha256(scenario.model_dump_json().encode()).hexdigest()[:12]


def git_commit() -> str | None:
    """Return the commit of the source tree, with ``+`` where it was changed; None without git."""
    root = Path(mmrl.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changes else head


def versions() -> dict[str, str]:
    """Return the versions of mmrl, Python and the packages that decide about results."""
    found = {"mmrl": mmrl.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a part of the system that pip does not know
            found[package] = "unknown"
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
