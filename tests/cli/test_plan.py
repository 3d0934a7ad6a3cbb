"""What `mmrl plan` refuses: a policy that is not there, a folder that is not its own."""

from pathlib import Path

import pytest

from mmrl.cli.plan import _player, command
from mmrl.errors import InputError


@pytest.mark.parametrize(
    ("policy", "remedy"), [("runs/mine", "known: .*slack"), ("slak", "did you mean 'slack'")]
)
def test_neither_a_folder_nor_a_rule(policy: str, remedy: str) -> None:
    with pytest.raises(InputError, match=f"unknown rule or folder '{policy}' .*{remedy}"):
        _player(policy)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no plan"):
        command(["qwen2.5-0.5b=1"], out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
