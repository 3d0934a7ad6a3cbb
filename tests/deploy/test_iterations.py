"""What becomes of an iteration that does not end as it began."""

from typing import Any

import pytest

from mmrl.deploy.iterations import Job, _decode
from mmrl.deploy.runner import DecodeInput
from mmrl.deploy.sampling import Choice
from mmrl.deploy.streaming import Abandoned
from mmrl.node.state import DECODE_STEP


class Runner:
    """Fails for a batch, and counts what is tried after that."""

    def __init__(self, error: Exception) -> None:
        self.error, self.tried = error, 0

    def launch_decode(self, inputs: Any, resident: bool) -> Any:
        """Raise."""
        raise self.error

    def decode(self, inputs: Any, resident: bool) -> list[int]:
        """Decode one sequence."""
        self.tried += 1
        return [7]


def test_an_abandoned_step_is_not_tried_again_one_sequence_at_a_time() -> None:
    """The loop waits for its end: it would stand still while all sequences are tried in vain."""
    inputs = [DecodeInput(1, position, [], Choice()) for position in range(3)]
    job = Job(0, DECODE_STEP, (), True)
    runner: Any = Runner(Abandoned())
    with pytest.raises(Abandoned):
        _decode(runner, inputs, job, resident=False)
    assert runner.tried == 0
    runner = Runner(ValueError())
    assert _decode(runner, inputs, job, resident=False) is None
    assert (runner.tried, job.result) == (3, [7, 7, 7])
