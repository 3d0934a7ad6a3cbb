"""A file is written whole or not at all, and every reason why not is told in one line."""

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from mmrl.errors import InputError, MmrlError
from mmrl.files import atomic_write, finite, write_json


def test_a_written_file_has_what_was_written_and_ordinary_rights(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(path) as file:
        file.write("α\r\n")
        assert not path.exists()
    assert path.read_bytes() == "α\r\n".encode()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("stop", [ValueError(), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, stop: BaseException
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(stop)), atomic_write(path, "wb") as file:
        file.write(b"new")
        raise stop
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_full_disk_is_told_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MmrlError, match="disk full") as caught, atomic_write(path) as file:
        file.write("new")
    assert not isinstance(caught.value, InputError)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written_are_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot write"), atomic_write(place):
            pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_of_the_block_itself_is_not_taken_for_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        (tmp_path / "missing").read_text()


def test_json_takes_numpy_values_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": np.float64(0.5), "a": np.arange(2), "path": Path("x")})
    assert json.loads(path.read_text()) == {"b": 0.5, "a": [0, 1], "path": "x"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"b": float("nan")})
    assert json.loads(path.read_text())["b"] == 0.5


def test_what_is_not_finite_becomes_none(tmp_path: Path) -> None:
    value = {"a": [1.5, float("nan"), (np.float64("inf"), "x")], 3: None, "b": {"c": True}}
    plain = {"a": [1.5, None, [None, "x"]], "3": None, "b": {"c": True}}
    assert finite(value) == plain
    write_json(tmp_path / "a.json", finite(value))
