"""`Subject`: a model that is being measured, on the device or beside it, as a section needs it.

The fleet it lives in has the model and a second instance of it over the same host memory, so that
what happens beside another model can be seen: streaming and loading are paced by the link, whose
bytes per second do not depend on whose they are.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmrl.deploy.checkpoint import Checkpoint
from mmrl.deploy.clock import COMPUTE
from mmrl.deploy.hardware import find_device, used_bytes
from mmrl.deploy.kv import Table
from mmrl.deploy.memory import BudgetExceeded, OutOfDeviceMemory
from mmrl.deploy.profiler.timing import Deadline, Patience
from mmrl.deploy.rig import Rig
from mmrl.deploy.served import ServedModel
from mmrl.node.state import BLOCK_TOKENS

FIRST_KEY = 10**9  # of sequences that no request has
FILL_BYTES = 1 << 30  # of KV that are made random at a time
SPARE_TOKENS = 2 * BLOCK_TOKENS


class NotResident(Exception):
    """The model does not fit on the device as a whole."""


class Subject:
    """One model, opened when first needed, and again after a section has left it in disorder.

    Args:
        path: Its checkpoint, or its name in the testbed.
        checkpoint: What the path stands for.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        memory: Bytes of the device for everything; all that is usable unless given.
        host_kv: Bytes of host memory for saved KV.
        deadline: When its time ends; what is worth most is measured all the same.
        progress: Told (model, bytes read, bytes in all) while weights are read.

    Attributes:
        used_before: Bytes of a GPU that were in use when it was opened.
    """

    def __init__(
        self,
        path: str,
        checkpoint: Checkpoint,
        device: str,
        memory: int | None,
        host_kv: int,
        deadline: Deadline,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.path, self.checkpoint, self.deadline = path, checkpoint, deadline
        self._device, self._memory, self._host_kv = device, memory, host_kv
        self._progress = progress
        self._rig: Rig | None = None
        self.used_before = 0

    @property
    def rig(self) -> Rig:
        """Return the open fleet: the model, and a second instance of it."""
        if self._rig is None:
            if self.on_gpu:
                self.used_before = used_bytes(find_device(self._device))
            self._rig = Rig.of(
                [self.path, self.path],
                device=self._device,
                memory=self._memory,
                host_kv=self._host_kv,
                warm=False,
                progress=self._progress,
                checkpoints=[self.checkpoint, self.checkpoint],
            )
        return self._rig

    @property
    def opened(self) -> bool:
        """Return whether it is open."""
        return self._rig is not None

    @property
    def model(self) -> ServedModel:
        """Return the model."""
        return self.rig.engine.models[0]

    @property
    def names(self) -> list[str]:
        """Return the names of the model and of its second instance in the rig."""
        return self.rig.names

    @property
    def on_gpu(self) -> bool:
        """Return whether it runs on a GPU."""
        return find_device(self._device).type == "cuda"

    @property
    def room_bytes(self) -> int:
        """Return what the device has for KV beside all weights of the model; below 0 if none."""
        weights = self.model.weights
        missing = sum(weights.piece_bytes) - weights.device_bytes
        return self.rig.fleet.memory.free_bytes - missing - self.model.pool.slack_bytes

    @property
    def longest(self) -> int:
        """Return the longest context that the model knows and that there is room for."""
        tokens = self.room_bytes // self.model.pool.block_bytes * BLOCK_TOKENS - SPARE_TOKENS
        return int(max(0, min(self.checkpoint.max_context, tokens)))

    def patience(self, limit_s: float = 1.0, least: int = 5, most: int = 40) -> Patience:
        """Return how long to measure one thing, less where time is short."""
        left = self.deadline.left_s
        if left < limit_s:
            return Patience(min(least, 3), min(most, 5), max(0.0, left))
        return Patience(least, most, limit_s)

    def close(self) -> None:
        """Give everything back."""
        if self._rig is not None:
            rig, self._rig = self._rig, None
            rig.close()

    @contextmanager
    def resident(self) -> Iterator[ServedModel]:
        """Have all weights on the device, beside what the loop knows, which rests meanwhile.

        Raises:
            NotResident: They do not fit.
        """
        model = self.model
        weights = model.weights
        try:
            weights.set_granted(range(weights.layers))
        except BudgetExceeded as error:
            raise NotResident(str(error)) from error
        try:
            for piece in range(1 + weights.layers):
                weights.copy_piece(piece)
            model.runner.capture()
            yield model
        finally:
            weights.set_granted(None)

    @contextmanager
    def sequences(self, count: int, tokens: int) -> Iterator[list[Table]]:
        """Have sequences of so many tokens of random KV, as many of them as there is room for."""
        pool, memory = self.model.pool, self.rig.fleet.memory
        blocks = -(-tokens // BLOCK_TOKENS)
        room = memory.free_bytes - pool.slack_bytes
        count = min(count, room // (blocks * pool.block_bytes), pool.capacity // blocks)
        keys = range(FIRST_KEY, FIRST_KEY + count)
        try:
            with contextlib.suppress(OutOfDeviceMemory):  # torch, too, takes of the device
                for key in keys:
                    pool.resize(key, blocks)
            tables = [pool.table(key) for key in keys if len(pool.table(key))]
            self._fill(tables)
            yield tables
        finally:
            for key in reversed(keys):
                pool.free(key)

    def compute(self, job: Callable[[], Any], times: int = 1) -> float:
        """Do something on the compute worker, as the engine would.

        Returns:
            The seconds it took, the last of so many times.
        """
        done = self.rig.on_worker(COMPUTE, job, times)
        return (done.ended_ns - done.begun_ns) / 1e9

    def _fill(self, tables: list[Table]) -> None:
        """Write random numbers: reading zeros can be faster than what a model leaves behind."""
        pool = self.model.pool
        blocks = sorted(int(block) for table in tables for block in table)
        step = max(1, FILL_BYTES // pool.block_bytes)
        while blocks:
            run = 1
            while run < min(step, len(blocks)) and blocks[run] == blocks[0] + run:
                run += 1
            pool.data[blocks[0] : blocks[0] + run].normal_()
            blocks = blocks[run:]
        if self.on_gpu:
            torch.cuda.synchronize(pool.device)
