"""The shipped H200 files are what the converter makes of the raw measurements."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrl.profiles.registry import DATA

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convert_h200_probe.py"
PROBES = os.environ.get("MMRL_PROBE_DIR")


@pytest.mark.skipif(PROBES is None, reason="MMRL_PROBE_DIR does not name the raw measurements")
def test_converter_reproduces_the_shipped_files(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, str(PROBES), "--out", tmp_path], check=True)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_text() for path in (DATA / "h200").iterdir()}
    assert made == shipped


def test_transfer_fit_recovers_fixed_part_and_rate() -> None:
    spec = importlib.util.spec_from_file_location("convert_h200_probe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    moved = [(size, 0.002 + size / 50e9) for size in (10**7, 10**8, 10**9)]
    fitted = converter._fit_transfer(moved)
    assert fitted.fixed_s == pytest.approx(0.002)
    assert fitted.bytes_per_s == pytest.approx(50e9)
