"""What `mmrl plan` says of a policy that is not there."""

import pytest

from mmrl.cli.plan import _player
from mmrl.errors import InputError


@pytest.mark.parametrize(
    ("policy", "remedy"), [("runs/mine", "known: .*slack"), ("slak", "did you mean 'slack'")]
)
def test_neither_a_folder_nor_a_rule(policy: str, remedy: str) -> None:
    with pytest.raises(InputError, match=f"unknown rule or folder '{policy}' .*{remedy}"):
        _player(policy)
