"""`NodeProcesses`: the nodes of a training played in processes of their own.

Threads share one interpreter: above half a dozen of them, nodes wait for it more than for the
processor. Here each process plays some parts of the nodes with a copy of the actor, and writes
what it sees into memory that all share. Parts, seeds and generators are those of `TrainingNodes`,
so that the result is the same, bit for bit.
"""

import ctypes
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th

from mmrl.agents.buffer import EventTimeRolloutBuffer, Floats
from mmrl.agents.nodes import NodePlan, PlanNodes
from mmrl.agents.playing import Rolled, play_part
from mmrl.errors import MmrlError

Shared = tuple[Any, tuple[int, ...], type]  # memory, shape and type of an array
Call = tuple[bytes, list[th.Tensor], float]  # pickled actor, states of generators, reward scale


@dataclass(frozen=True)
class Work:
    """What a process is started with: the plan, its parts of it, the arrays of the rollout."""

    plan: NodePlan
    parts: list[int]
    arrays: Mapping[str, Shared]


class NodeProcesses(PlanNodes):
    """The nodes of a plan in processes, for `EventTimePPO`, which has them play whole rollouts.

    The processes start with the first call: `allocate` comes before.

    Args:
        plan: The nodes.
        processes: How many; each plays a part at least.

    Attributes:
        count: Parts altogether.
    """

    def __init__(self, plan: NodePlan, processes: int) -> None:
        super().__init__(plan)
        self.count = len(plan.rows)
        self._plan = plan
        split = np.array_split(range(self.count), min(processes, self.count))
        self._shares: list[list[int]] = [share.tolist() for share in split]
        self._context = multiprocessing.get_context("spawn")
        self._arrays: dict[str, Shared] = {}
        self._started: list[tuple[Any, Connection]] = []

    def allocate(self, name: str, shape: tuple[int, ...], kind: type) -> npt.NDArray[Any]:
        """Return an array of zeros in memory that the processes will share."""
        memory = self._context.RawArray(ctypes.c_byte, prod(shape) * np.dtype(kind).itemsize)
        self._arrays[name] = (memory, shape, kind)
        return _array(self._arrays[name])

    def play(
        self, actor: bytes, generators: Sequence[th.Generator], reward_scale: float
    ) -> list[Rolled]:
        """Have all parts play a rollout into the arrays.

        Args:
            actor: A pickled `Actor`.
            generators: One for each part; they end as they are after the rollout.
            reward_scale: Rewards are multiplied by it.
        """
        calls: list[Call] = [
            (actor, [generators[k].get_state() for k in share], reward_scale)
            for share in self._shares
        ]
        rolled: list[Rolled] = []
        for parts, states in self._ask("play", calls):
            for part, state in zip(parts, states, strict=True):
                generators[len(rolled)].set_state(state)
                rolled.append(part)
        return rolled

    def reset(self) -> Floats:
        """Draw an episode for each node."""
        return np.concatenate(self._ask("reset"))

    def get_state(self) -> dict[str, Any]:
        """Return everything on which the episodes to come depend; arrays and text only."""
        return {name: value for part in self._ask("get_state") for name, value in part.items()}

    def set_state(self, state: Mapping[str, Any]) -> Floats:
        """Continue from a state; return the observations float32[N, D] at that point."""
        calls = [
            {name: value for name, value in state.items() if int(name.split(".")[0]) in share}
            for share in self._shares
        ]
        return np.concatenate(self._ask("set_state", calls))

    def step_async(self, actions: npt.NDArray[np.int64]) -> None:
        """Refuse: processes play whole rollouts."""
        raise NotImplementedError

    def step_wait(self) -> Any:
        """Refuse: processes play whole rollouts."""
        raise NotImplementedError

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._started:
            connection.close()  # which it takes as the end
            process.join()
        self._started = []

    def _ask(self, what: str, calls: Sequence[Any] | None = None) -> list[Any]:
        """Call a method of the `Worker` of each process at once; return what each returned.

        Raises:
            MmrlError: One of them failed or died.
        """
        if not self._started:
            self._compile()
            self._started = [self._start(share) for share in self._shares]
        found = []
        try:
            for k, (_, connection) in enumerate(self._started):
                connection.send((what, calls[k : k + 1] if calls else ()))
            for _, connection in self._started:
                done, result = connection.recv()
                if not done:
                    raise MmrlError(f"a process that plays nodes failed: {result}")
                found.append(result)
        except (EOFError, BrokenPipeError):
            remedy = "train with fewer processes or envs if memory is short, and --resume"
            raise MmrlError("a process that plays nodes died", remedy) from None
        return found

    def _compile(self) -> None:
        """Play a step here, so that the processes find compiled code on the disk."""
        part = self._plan.part(0)
        part.reset()
        part.action_masks()
        part.step(np.zeros(part.num_envs, np.int64))

    def _start(self, share: list[int]) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        work = Work(self._plan, share, self._arrays)
        process = self._context.Process(target=serve, args=(theirs, work), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process ends our waiting for it
        return process, ours


class Worker:
    """Some parts of the nodes, in the process that plays them."""

    def __init__(self, work: Work) -> None:
        self._names = work.parts
        self._parts = [work.plan.part(k) for k in work.parts]
        self._seen: list[Floats] = []
        steps, nodes = work.arrays["actions"][1]
        layout = work.plan.layout
        self._steps = steps
        self._buffer = EventTimeRolloutBuffer(
            steps,
            layout.observation_space,
            layout.action_space,
            n_envs=nodes,
            discount_s=1.0,
            trace_s=1.0,
            allocate=lambda name, shape, kind: _array(work.arrays[name]),
        )

    def reset(self) -> Floats:
        """Draw an episode for each node."""
        self._seen = [part.reset() for part in self._parts]
        return np.concatenate(self._seen)

    def get_state(self) -> dict[str, Any]:
        """Return the states of the parts."""
        parts = zip(self._names, self._parts, strict=True)
        return {name: value for k, part in parts for name, value in part.get_state(k).items()}

    def set_state(self, state: Mapping[str, Any]) -> Floats:
        """Continue from states."""
        parts = zip(self._names, self._parts, strict=True)
        self._seen = [part.set_state(k, state) for k, part in parts]
        return np.concatenate(self._seen)

    def play(self, call: Call) -> tuple[list[Rolled], list[th.Tensor]]:
        """Play a rollout of each part; return what is left of it, and the generators after it."""
        pickled, states, reward_scale = call
        actor = pickle.loads(pickled)
        rolled, after = [], []
        for k, part in enumerate(self._parts):
            generator = th.Generator()
            generator.set_state(states[k])
            found = play_part(
                part, actor, generator, self._seen[k], self._buffer, self._steps, reward_scale
            )
            self._seen[k] = found.last
            rolled.append(found)
            after.append(generator.get_state())
        return rolled, after


def serve(connection: Connection, work: Work) -> None:
    """Do what is asked until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    th.set_num_threads(1)
    worker = Worker(work)
    while True:
        try:
            what, call = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(worker, what)(*call)))
        except Exception:
            connection.send((False, traceback.format_exc()))


def _array(shared: Shared) -> npt.NDArray[Any]:
    memory, shape, kind = shared
    return np.frombuffer(memory, kind).reshape(shape)
