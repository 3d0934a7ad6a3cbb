"""`Rig`: a fleet whose loop runs in the calling thread, as far as it is told to.

What a server does in a process of its own, driven by hand: requests are submitted, verbs are done,
and the loop runs until something holds. Benchmarks, profiles and the validation of the simulator
all measure the node through it. Models are checkpoints, or shapes of the testbed with random
weights that need no files.

    with Rig.of(["llama-tiny"], device="cpu", memory=10**8) as rig:
        rig.level("llama-tiny", LEVEL_100)
        number = rig.submit("llama-tiny", prompt=64, output=16)
        rig.until(lambda: rig.finished([number]))
"""

import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from mmrl.deploy.adapter import DeployAdapter, Verdict
from mmrl.deploy.checkpoint import Checkpoint
from mmrl.deploy.clock import Clock
from mmrl.deploy.config import ModelConfig, ServeConfig, build_config
from mmrl.deploy.fleet import Progress, open_fleet
from mmrl.deploy.known import model_dtype
from mmrl.deploy.protocol import Finish, Generate, Sampling, Tokens
from mmrl.deploy.testbed import MODELS, configuration
from mmrl.deploy.workers import Done, Task
from mmrl.errors import MmrlError
from mmrl.node.actions import LEVEL_0, OUT, WAIT, encode
from mmrl.node.state import DECODE_STEP, SEGMENT_STEPS

LIMIT_S = 120.0  # of what is waited for, unless told otherwise
CLEAR_S = 30.0  # for all requests to end


class Hands(DeployAdapter):
    """An adapter that decides nothing: verbs are done by hand (`Rig.act`)."""

    def poll(self, nodes: Any, table: Any) -> Verdict:
        """Wait."""
        return Verdict(WAIT, "policy", 0.0)


class Step(NamedTuple):
    """An iteration of a resident model that the engine ran.

    Attributes:
        model: Index of the model.
        kind: PREFILL_CHUNK or DECODE_STEP.
        batch: Sequences in it.
        first: Whether it is the first decode step of a segment.
        took_s: From its beginning to its end on the compute worker.
        begun_s: On the clock of ``time.monotonic``.
        ended_s: Likewise.
    """

    model: int
    kind: int
    batch: int
    first: bool
    took_s: float
    begun_s: float
    ended_s: float


class Rig(AbstractContextManager["Rig"]):
    """An open fleet and the record of what it did.

    Args:
        config: The fleet and its node. A path that is no folder but a name of the testbed stands
            for that shape with random weights, bf16 unless its ``dtype`` says otherwise.
        by_hand: Nothing is decided but by `act`; else the config's policy decides.
        warm: Run the models once before anything is asked for (`open_fleet`).
        progress: Told (model, bytes read, bytes in all) while weights are read.
        clock: Time of the engine; real unless given.
        checkpoints: What the paths stand for, where they have been opened already.

    Attributes:
        names: The models, in order.
        fleet: The open fleet.
        engine: Its engine.
        node: The state that the engine moves.
        checkpoints: What the models were made from.
        times: For each request the tokens it got, and when (``time.monotonic`` seconds).
        steps: Iterations of resident models, in order.
        transfers: Ends of transfers, host to device and back, in order.
        opened_s: How long opening took, host memory included.

    Raises:
        InputError: Something in the configuration cannot be served.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        by_hand: bool = True,
        warm: bool = True,
        progress: Progress | None = None,
        clock: Clock | None = None,
        checkpoints: list[Checkpoint] | None = None,
    ) -> None:
        self.names = [model.name for model in config.models]
        self.checkpoints = checkpoints or open_checkpoints(config.models)
        self.times: dict[int, list[tuple[float, Tokens]]] = {}
        self.steps: list[Step] = []
        self.transfers: list[Done] = []
        self._number = 0
        begun = time.monotonic()
        self.fleet = open_fleet(config, progress, clock, self.checkpoints, warm)
        self.opened_s = time.monotonic() - begun
        self.engine, self.node = self.fleet.engine, self.fleet.engine.node
        if by_hand:
            given = self.engine.adapter
            tables = given.decode_tables, given.prefill_tables
            self.engine.adapter = Hands(given.champion, given.champion, *tables)
            given.close()
        self.engine.emit = self._emit
        self.engine.watch = self._watch
        self.engine.begin()

    @classmethod
    def of(
        cls,
        models: Sequence[str],
        *,
        device: str = "auto",
        memory: int | None = None,
        host_kv: int = 4 * 10**9,
        **options: Any,
    ) -> "Rig":
        """Open models by their names in the testbed, or by their folders.

        Args:
            models: Names or folders; a model may be given twice.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            memory: Bytes of the device for everything; all that is usable unless given.
            host_kv: Bytes of host memory for saved KV.
            **options: See the class.
        """
        # A rule: what is measured must not change with the policy that is shipped.
        node = {"device": device, "memory": memory, "host_kv": host_kv, "policy": "slack"}
        names: list[str] = []
        times: Counter[str] = Counter()
        for path in models:
            name = Path(path).name
            times[name] += 1
            names.append(name if times[name] == 1 else f"{name} ({times[name]})")
        data = {
            "models": [
                {"path": path, "name": name} for path, name in zip(models, names, strict=True)
            ],
            "node": {field: value for field, value in node.items() if value is not None},
        }
        return cls(build_config(data, "rig"), **options)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back."""
        self.engine.close()
        self.fleet.close()
        gc.collect()
        if self.fleet.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ what is done

    def submit(self, name: str, prompt: int, output: int) -> int:
        """Submit a greedy request of so many tokens that ends at its length; return its number."""
        tokens = tuple(10 + (7 * i + self._number + 1) % 200 for i in range(prompt))
        return self.send(Generate(name, tokens, output, ignore_eos=True, sampling=Sampling(0.0)))

    def send(self, request: Generate) -> int:
        """Submit a request; return its number."""
        self._number += 1
        self.times[self._number] = []
        self.engine.submit(self._number, request)
        return self._number

    def act(self, name: str, verb: int) -> None:
        """Have a verb done at the next instant, as a policy would."""
        m = self.names.index(name)
        self.engine.call(lambda: self._act(m, verb))

    def level(self, name: str, verb: int, limit_s: float = LIMIT_S) -> float:
        """Bring a model to a level and run until its load has ended; return the seconds.

        Args:
            name: The model.
            verb: OUT or one of the levels; nothing is done where the model is there already.
            limit_s: See `until`.
        """
        m, s = self.names.index(name), self.node.state
        layers = int(s.pieces[m]) - 1
        wanted = 0 if verb == OUT else 1 + (layers * (verb - LEVEL_0) + 3) // 4
        begun = time.monotonic()
        if s.target[m] != wanted:
            count = s.actions.sum()
            self.act(name, verb)
            self.until(lambda: s.actions.sum() > count, limit_s)
        self.until(lambda: s.granted[m] == wanted == s.landed[m], limit_s)
        return time.monotonic() - begun

    def until(self, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> float:
        """Run the loop until something holds; return the seconds it took.

        Raises:
            TimeoutError: It did not hold in time.
        """
        begun = time.monotonic()
        while not condition():
            self.engine.run_instant()
            if time.monotonic() - begun > limit_s:
                raise TimeoutError(f"not within {limit_s} s")
        return time.monotonic() - begun

    def on_worker(self, worker: str, job: Callable[[], Any], times: int = 1) -> Done:
        """Have one of the engine's workers do a job, as it would an iteration or a transfer.

        The loop hears nothing of it; what the job uses must be no concern of the state.

        Args:
            worker: ``compute``, ``link-bound``, ``h2d`` or ``d2h``.
            job: As workers take them.
            times: How often; where it only launches work, one is begun behind the other.

        Returns:
            Its end, the last one.

        Raises:
            Exception: What the job raised.
        """
        tasks = [Task() for _ in range(times)]
        for task in tasks:
            self.engine.workers[worker].submit(job, task)
        self.engine.inbox.wait(lambda: all(task.done is not None for task in tasks))
        ends = [task.done for task in tasks if task.done is not None]
        for end in ends:
            if end.error is not None:
                raise end.error
        return ends[-1]

    def clear(self) -> None:
        """End all requests, and forget the steps and transfers so far."""
        for number in list(self.times):
            self.engine.call(lambda number=number: self.engine.cancel(number))  # type: ignore[misc]
        state = self.node.state
        self.until(lambda: self.engine.open_requests == 0 and state.in_system == 0, CLEAR_S)
        self.steps.clear()
        self.transfers.clear()

    # ------------------------------------------------------------------ what was seen

    def finished(self, numbers: Sequence[int]) -> bool:
        """Return whether all of these requests have ended."""
        return all(self.times[n] and self.times[n][-1][1].finish is not None for n in numbers)

    def tokens(self, number: int) -> list[int]:
        """Return the tokens that a request has got."""
        return [token for _, item in self.times[number] for token in item.tokens]

    def gaps(self, number: int, skip: int = 3) -> list[float]:
        """Return the times between the tokens of a request after the first ones, s."""
        times = [at for at, tokens in self.times[number] if tokens.tokens]
        return [b - a for a, b in itertools.pairwise(times[skip:])]

    def _emit(self, items: list[tuple[int, Tokens]]) -> None:
        now = time.monotonic()
        for number, tokens in items:
            if tokens.finish is Finish.ERROR:
                raise MmrlError(f"request {number} failed: {tokens.error}")
            self.times[number].append((now, tokens))

    def _watch(self, what: str, value: Any) -> None:
        if what in ("h2d", "d2h"):
            self.transfers.append(value)
        elif what == "iteration":
            job, done = value
            begun_s, ended_s = done.begun_ns / 1e9, done.ended_ns / 1e9
            settled = bool(self.node.state.seg_left[job.model] == SEGMENT_STEPS)
            first, count = job.kind == DECODE_STEP and settled, len(job.sequences)
            self.steps.append(
                Step(job.model, job.kind, count, first, ended_s - begun_s, begun_s, ended_s)
            )

    def _act(self, m: int, verb: int) -> None:
        state = self.node.state
        state.acted[:] = 0
        done = state.actions.sum()
        self.node.act(encode(int(state.full_verbs), m, verb))
        if state.actions.sum() != done + 1:
            raise MmrlError(f"verb {verb} on {self.names[m]} is not legal now")


def open_checkpoints(models: Sequence[ModelConfig]) -> list[Checkpoint]:
    """Open the checkpoints of a fleet; a name of the testbed stands for random weights.

    The same path with the same data type gives the same object, so that its weights are read once.
    """
    opened: dict[tuple[str, str | None], Checkpoint] = {}
    for i, model in enumerate(models):
        key, dtype = (model.path, model.dtype), model_dtype(model)
        if key in opened:
            continue
        if model.path in MODELS and not Path(model.path).is_dir():
            shape = configuration(model.path)
            opened[key] = Checkpoint.from_config(shape, dtype or torch.bfloat16, seed=i)
        else:
            opened[key] = Checkpoint.open(model.path, dtype)
    return [opened[model.path, model.dtype] for model in models]
