"""`Engine`: the loop that makes a node real.

`LiveNode` says what is to run, to load and to save; the engine has workers do it (the iteration of
a resident model, the one link-bound iteration, a transfer each way), tells the node what has ended,
and lets the physical layer follow the state: weights and KV blocks are committed where the state
has granted them, and given back where it has taken them away. Policies are asked in between.

Time is real, or (`SimulatedTime`) that of the cost model: then the same jobs run, but end when the
simulator says so, and every decision can be compared with the simulator's.
"""

import functools
import queue
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from mmrl.deploy.adapter import DeployAdapter
from mmrl.deploy.kv import HostKV, KVPool
from mmrl.deploy.memory import BudgetExceeded, OutOfDeviceMemory
from mmrl.deploy.node import LiveNode
from mmrl.deploy.protocol import Decision, Finish, Generate, Tokens
from mmrl.deploy.reasons import reason
from mmrl.deploy.runner import DecodeInput, ModelRunner
from mmrl.deploy.sampling import Choice
from mmrl.deploy.weights import LinkBoundGate, ModelWeights
from mmrl.deploy.workers import Done, Worker
from mmrl.node.actions import LEVEL_100, VERBS, WAIT, decode
from mmrl.node.state import (
    DECODE_STEP,
    DONE,
    IDLE,
    LINK_IDLE,
    LINK_LOAD,
    LINK_RESTORE,
    LINK_STREAM,
    QUEUE_LIMIT,
    REFUSED,
    RESTORING,
    SAVED,
    SAVING,
    UNARRIVED,
)

FAILURES = 3  # failed iterations in a row after which a model is quarantined
DECISIONS = 100  # that the engine remembers
COMPUTE, LINK_BOUND, H2D, D2H = "compute", "link-bound", "h2d", "d2h"


@dataclass(eq=False)
class ServedModel:
    """A model with everything that runs it.

    Attributes:
        name: What clients call it.
        weights: Its weights on host and device.
        pool: Its KV blocks.
        runner: Its iterations.
        eos: Its end-of-sequence tokens.
        failures: Failed iterations in a row.
        quarantined: Whether it takes no requests.
    """

    name: str
    weights: ModelWeights
    pool: KVPool
    runner: ModelRunner
    eos: frozenset[int]
    failures: int = 0
    quarantined: bool = False


@dataclass(eq=False)
class Sequence_:
    """A request that is in the node.

    Attributes:
        number: The front's number of the request, also the key of its KV.
        request: What was asked for.
        model: Index of its model.
        row: Its row in the node's table.
        tokens: Prompt and tokens generated so far.
        seed: Of its sampling.
        ending: Its last token has come, or an error: nothing is emitted any more.
    """

    number: int
    request: Generate
    model: int
    row: int
    tokens: list[int]
    seed: int
    ending: bool = False

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(eq=False)
class Job:
    """An iteration in flight.

    Attributes:
        model: Of which model.
        kind: PREFILL_CHUNK or DECODE_STEP.
        sequences: Whose.
        last: Whether it yields tokens: a decode step, or the last chunk of a prefill.
        gate: Of a link-bound iteration.
        number: Of a link-bound iteration.
        result: A token or an exception for each sequence, set by the worker.
        batch: The place in sequences and result of each sequence that the state counts; all,
            but for a step ahead of the state some may have left since.
        position: Of each sequence's token in a step ahead of the state.
        done: Its end, where it came before the state asked for the iteration.
    """

    model: int
    kind: int
    sequences: tuple[Sequence_, ...]
    last: bool
    gate: LinkBoundGate | None = None
    number: int = -1
    result: list[Any] = field(default_factory=list)
    batch: dict[Sequence_, int] = field(default_factory=dict)
    position: tuple[int, ...] = ()
    done: Done | None = None

    def __post_init__(self) -> None:
        self.batch = {sequence: place for place, sequence in enumerate(self.sequences)}


@dataclass(eq=False)
class Transfer:
    """A transfer host to device that the worker has been given.

    Attributes:
        kind: LINK_LOAD, LINK_STREAM or LINK_RESTORE.
        of: What it is for: the model, the gate of the link-bound iteration, or the sequence.
        done: Its end, where it came before the state asked for the transfer.
    """

    kind: int
    of: object
    done: Done | None = None


class Clock(Protocol):
    """Where time comes from."""

    real: bool

    def now_ns(self) -> int:
        """Return the time."""

    def wait(self, engine: "Engine") -> set[str]:
        """Let time pass until something has happened; return the workers whose jobs ended."""


class RealTime:
    """The clock on the wall: jobs end when they end."""

    real = True

    def __init__(self) -> None:
        self._start_ns = time.monotonic_ns()
        self._last_ns = 0

    def now_ns(self) -> int:
        """Return nanoseconds since the start, never less than before."""
        self._last_ns = max(self._last_ns, time.monotonic_ns() - self._start_ns)
        return self._last_ns

    def wait(self, engine: "Engine") -> set[str]:
        """Wait for a message, the end of a job, or the next decision."""
        s = engine.node.state
        until_ns = int(min(s.due_ns, s.timer_ns))
        if engine.deciding:
            until_ns = min(until_ns, engine.decision_until_ns)
        timeout_s = (until_ns - self.now_ns()) / 1e9
        engine.receive(max(0.0, timeout_s))
        return set(engine.ended)


class SimulatedTime:
    """The clock of the cost model: an event happens when the simulator says so.

    Args:
        script: What comes from outside, and when: (instant in ns, function), in order.
    """

    real = False

    def __init__(self, script: Sequence[tuple[int, Callable[[], None]]] = ()) -> None:
        self._now_ns = 0
        self._script = deque(script)

    def now_ns(self) -> int:
        """Return simulated nanoseconds."""
        return self._now_ns

    def wait(self, engine: "Engine") -> set[str]:
        """Go to the next event that the costs foresee; jobs that end there have really ended."""
        s = engine.node.state
        self._now_ns = engine.node.next_event_ns()
        if self._script:
            self._now_ns = min(self._now_ns, self._script[0][0])
        while self._script and self._script[0][0] == self._now_ns:
            self._script.popleft()[1]()
        ends = {COMPUTE: s.gpu_end_ns, H2D: s.h2d_end_ns, D2H: s.d2h_end_ns}
        ended = {worker for worker, end in ends.items() if end == self._now_ns}
        if s.gpu_kind != IDLE and s.gpu_link_bound:
            ended.discard(COMPUTE)
            engine.foreseen_compute_end = bool(s.gpu_end_ns == self._now_ns)
        for worker in ended:
            engine.join(worker)
        return ended


class Engine:
    """Serves a fleet on one device.

    Args:
        models: The fleet, in the order of the node's models.
        node: Its state.
        adapter: Who decides.
        host_kv: Saved KV.
        device: Where the models run.
        clock: Where time comes from; real unless given.

    Attributes:
        emit: Called with (number, tokens) of requests, those of an instant together.
        accept: Called with the number of a request that is taken in.
        refuse: Called with number, kind and words for one that is not.
        watch: Called with each iteration and decision, for tests and measurements.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        node: LiveNode,
        adapter: DeployAdapter,
        host_kv: HostKV,
        device: torch.device,
        clock: Clock | None = None,
    ) -> None:
        self.models, self.node, self.adapter, self.host_kv = list(models), node, adapter, host_kv
        self.device, self.clock = device, clock or RealTime()
        self.names = [model.name for model in models]
        self.emit: Callable[[list[tuple[int, Tokens]]], None] = lambda items: None
        self.accept: Callable[[int], None] = lambda number: None
        self.refuse: Callable[[int, str, str], None] = lambda number, kind, words: None
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.workers = {name: Worker(name, device, self.inbox) for name in (LINK_BOUND, H2D, D2H)}
        self.workers[COMPUTE] = Worker(COMPUTE, device, self.inbox, high_priority=True)
        self.ended: dict[str, Done] = {}
        self.foreseen_compute_end = False
        self._messages: deque[Callable[[], None]] = deque()
        self._rows: dict[int, Sequence_] = {}
        self._numbers: dict[int, Sequence_] = {}
        self._cancelling: list[Sequence_] = []
        self._new: list[Sequence_] = []
        self._h2d: Transfer | None = None  # that the state knows to be on the link
        self._ahead: Transfer | None = None  # queued behind it, before the state asks for it
        self._saving = False
        self._streamed = 0  # layers of the link-bound iteration that went or go over the link
        self._on_host: set[Sequence_] = set()  # whose KV is saved, or being saved
        self._changed: list[int] = []  # rows whose KV blocks are still to be resized
        self._outgoing: list[tuple[int, Tokens]] = []
        self._compute: Job | None = None
        self._ahead_step: Job | None = None  # a decode step queued behind it, likewise
        self._link_bound: Job | None = None
        self.deciding = False
        self.decision_until_ns = 0
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS)
        self.decision_count = 0
        self.decision_latencies_s: list[float] = []
        self.overhead_ns = 0
        self._compute_idle_since_ns: int | None = None
        self.watch: Callable[[str, Any], None] | None = None
        adapter.check(node.state)
        adapter.prepare(node.state)
        adapter.wake = lambda: self.inbox.put(None)

    # ------------------------------------------------------------------ from outside

    def call(self, message: Callable[[], None]) -> None:
        """Have the loop call a function between two instants; from any thread."""
        self.inbox.put(message)

    def submit(self, number: int, request: Generate) -> None:
        """Take a request in, on the loop. It is accepted or refused at the next instant."""
        m = self.names.index(request.model)
        if self.models[m].quarantined:
            self.refuse(number, "quarantined", f"{request.model} failed repeatedly")
            return
        if self.node.full:
            self._compact()
        if self.node.full or self._waiting(m) >= QUEUE_LIMIT:
            self.refuse(number, "queue_full", f"{QUEUE_LIMIT} requests wait for {request.model}")
            return
        row = self.node.submit(
            self.clock.now_ns(), m, len(request.prompt), max(1, request.max_tokens)
        )
        seed = request.sampling.seed
        sequence = Sequence_(
            number,
            request,
            m,
            row,
            list(request.prompt),
            random.getrandbits(62) if seed is None else seed,
        )
        self._rows[row] = self._numbers[number] = sequence
        self._new.append(sequence)

    def cancel(self, number: int) -> None:
        """Take a request out, on the loop."""
        sequence = self._numbers.get(number)
        if sequence is not None and not sequence.ending:
            self._end(sequence, Tokens((), Finish.CANCELLED))

    def set_pinned(self, m: int, pinned: bool) -> None:
        """Keep a model where it is, or let it go again."""
        self.node.state.pinned[m] = pinned

    def release(self, m: int) -> None:
        """Take a model out of quarantine."""
        self.models[m].quarantined = False
        self.models[m].failures = 0

    def revert(self, reverted: bool) -> None:
        """Let the champion decide, or the policy again."""
        self.adapter.reverted = reverted
        self.adapter.prepare(self.node.state)

    def preload(self, m: int) -> bool:
        """Load a model if it fits now; return whether it does."""
        fits = self.node.preload(m)
        self._give_back()
        if fits:
            self._note(m, LEVEL_100, "operator", "preload", 0.0)
        return fits

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._numbers)

    # ------------------------------------------------------------------ the loop

    def run_instant(self) -> None:
        """Wait for something to happen, and do everything that follows from it."""
        ended = self.clock.wait(self)
        while self._messages:
            self._messages.popleft()()
        self._instant(ended)

    def begin(self) -> None:
        """Start what can start before anything has happened."""
        self._work()

    def receive(self, timeout_s: float) -> None:
        """Wait for messages; sort them into ends of jobs and calls."""
        try:
            message = self.inbox.get(timeout=timeout_s) if timeout_s > 0 else self.inbox.get(False)
        except queue.Empty:
            return
        while True:
            if isinstance(message, Done):
                expected = {COMPUTE: self._compute, H2D: self._h2d}.get(message.worker, message.tag)
                if message.tag is expected:
                    self.ended[message.worker] = message
                elif isinstance(message.tag, Transfer | Job):
                    message.tag.done = message  # ahead: the state comes to it, or does without
            elif message is not None:
                self._messages.append(message)
            try:
                message = self.inbox.get(False)
            except queue.Empty:
                return

    def join(self, worker: str) -> None:
        """Wait until the job of a worker has ended."""
        while worker not in self.ended:
            self.receive(60.0)

    def close(self) -> None:
        """Stop the workers."""
        if self._link_bound is not None and self._link_bound.gate is not None:
            self._link_bound.gate.cancel()
        for worker in self.workers.values():
            worker.close()
        self.adapter.close()

    def _instant(self, ended: set[str]) -> None:
        node = self.node
        self._fail_on_transfer_errors(ended)
        node.advance(self.clock.now_ns(), h2d=H2D in ended, d2h=D2H in ended)
        for worker in ended & {H2D, D2H}:
            done = self.ended.pop(worker)
            if worker == H2D:
                self._h2d = None
            else:
                self._saving = False
            if self.watch is not None:
                self.watch(worker, done)
        if COMPUTE in ended:
            self._end_compute(self.ended.pop(COMPUTE))
        elif self.foreseen_compute_end:
            self.foreseen_compute_end = False
            node.end_compute()
        if self._link_bound is not None and node.link_bound_complete:
            if not self.clock.real:
                self.join(LINK_BOUND)
            if LINK_BOUND in self.ended:
                self._end_link_bound(self.ended.pop(LINK_BOUND))
        elif LINK_BOUND in self.ended and self.ended[LINK_BOUND].error is not None:
            self._end_link_bound(self.ended.pop(LINK_BOUND))
        self._retry_cancels()
        due = node.settle()
        self._give_back()
        self._welcome()
        if (due and not self.deciding and node.begin_decision()) or self.deciding:
            self._decide()
        self._work()
        self._compute_idle_since_ns = None  # from here on the device waits for something else
        if self._outgoing:
            self.emit(self._outgoing)
            self._outgoing = []

    def _work(self) -> None:
        """Start what the state says; a live link-bound iteration leaves the device free."""
        while True:
            self.node.start_work()
            if not self._take_granted():
                return
            more = self._start_iteration()
            self._start_transfers()
            if not more:
                self._step_ahead()
                return

    # ------------------------------------------------------------------ decisions

    def _decide(self) -> None:
        """Ask, or look whether the answer has come; do what it says until it says WAIT."""
        node = self.node
        while True:
            if not self.clock.real:
                verdict = self.adapter.decide(node.nodes, node.table)
            else:
                if not self.deciding:
                    self.deciding = True
                    deadline_ns = round(self.adapter.deadline_s * 1e9)
                    self.decision_until_ns = self.clock.now_ns() + deadline_ns
                    self.adapter.ask(node.nodes, node.table)
                answer = self.adapter.poll(node.nodes, node.table)
                if answer is None:
                    return
                verdict = answer
            self.deciding = False
            self.decision_latencies_s.append(verdict.latency_s)
            if self.watch is not None:
                self.watch("decision", verdict.action)
            if verdict.action != WAIT:
                m, verb = decode(int(node.state.full_verbs), verdict.action)
                if node.legal(m, verb):
                    words = reason(node, self.names, m, verb)
                    self._note(m, verb, verdict.by, words, verdict.latency_s)
            more = node.act(verdict.action)
            self._give_back()
            if not more:
                return

    def _note(self, m: int, verb: int, by: str, words: str, latency_s: float) -> None:
        self.decision_count += 1
        self.decisions.append(
            Decision(
                self.decision_count, time.time(), self.names[m], VERBS[verb], by, words, latency_s
            )
        )

    # ------------------------------------------------------------------ ends

    def _fail_on_transfer_errors(self, ended: set[str]) -> None:
        for worker in (H2D, D2H):
            if worker in ended and (error := self.ended[worker].error) is not None:
                raise error

    def _end_compute(self, done: Done) -> None:
        job, self._compute = self._compute, None
        assert job is not None
        self._compute_idle_since_ns = done.ended_ns
        if done.error is not None:
            self._fail(job, done.error)
            return
        if self.watch is not None:
            self.watch("iteration", (job, done))
        self._take(job)
        self.node.end_compute()
        self._finish(job)

    def _end_link_bound(self, done: Done) -> None:
        job, self._link_bound = self._link_bound, None
        assert job is not None and job.gate is not None
        job.gate.close()
        self._forget_ahead(job.gate)
        if done.error is not None:
            self._fail(job, done.error)
            return
        self._take(job)
        self.node.end_link_bound()
        self._finish(job)

    def _take(self, job: Job) -> None:
        """Give the tokens of an iteration to its sequences, before the state does."""
        self.models[job.model].failures = 0
        if not job.last:
            return
        for sequence, place in job.batch.items():
            token = job.result[place]
            if isinstance(token, BaseException):
                continue
            sequence.tokens.append(token)
            if sequence.ending:
                continue
            request = sequence.request
            ends = token in self.models[job.model].eos and not request.ignore_eos
            if ends and sequence.generated > request.min_tokens:
                self.node.end_output(sequence.row)
                self._end(sequence, Tokens((), Finish.STOP))
            elif sequence.generated >= request.max_tokens:
                self._end(sequence, Tokens((token,), Finish.LENGTH))
            else:
                self._outgoing.append((sequence.number, Tokens((token,))))

    def _finish(self, job: Job) -> None:
        """Fail the sequences of an iteration for which it raised, after its end."""
        if not job.last:
            return
        for sequence, place in job.batch.items():
            token = job.result[place]
            if isinstance(token, BaseException):
                self._count_failure(job.model)
                self._end(sequence, Tokens((), Finish.ERROR, _describe(token)))

    def _fail(self, job: Job, error: BaseException) -> None:
        """Deal with an iteration that raised as a whole."""
        memory = isinstance(error, torch.OutOfMemoryError | OutOfDeviceMemory)
        self.node.fail_iteration(job.model, link_bound=job.gate is not None, out=memory)
        self._count_failure(job.model)
        if memory:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if not self.models[job.model].quarantined:
                return  # its sequences are preempted and continue later
        for sequence in job.batch:
            self._end(sequence, Tokens((), Finish.ERROR, _describe(error)))

    def _count_failure(self, m: int) -> None:
        model = self.models[m]
        model.failures += 1
        if model.failures >= FAILURES and not model.quarantined:
            model.quarantined = True
            for sequence in [q for q in self._numbers.values() if q.model == m]:
                self._end(sequence, Tokens((), Finish.ERROR, f"{model.name} failed repeatedly"))

    def _end(self, sequence: Sequence_, tokens: Tokens) -> None:
        """Say the last word of a request, once, and see that it leaves the node."""
        if sequence.ending:
            return
        sequence.ending = True
        del self._numbers[sequence.number]
        self._outgoing.append((sequence.number, tokens))
        self._cancelling.append(sequence)

    def _retry_cancels(self) -> None:
        """Take ended requests out of the node where it still has them and does not need them."""
        left = []
        for sequence in self._cancelling:
            state = self.node.requests[sequence.row]["state"]
            if state == UNARRIVED or (state < DONE and not self.node.cancel(sequence.row)):
                left.append(sequence)
        self._cancelling = left

    def _welcome(self) -> None:
        """Tell the front which of the new requests are in."""
        for sequence in self._new:
            if self.node.requests[sequence.row]["state"] == REFUSED:
                sequence.ending = True
                del self._numbers[sequence.number]
                self.refuse(sequence.number, "queue_full", "the queue of the model is full")
            else:
                self.accept(sequence.number)
        self._new.clear()

    # ------------------------------------------------------------------ the physical layer

    def _give_back(self) -> None:
        """Give back what the state has taken away.

        After every transition that can take: what is granted again at the same instant has to be
        loaded again.
        """
        s = self.node.state
        job = self._link_bound
        if job is not None and (s.lb_kind == IDLE or s.lb_id != job.number or s.lb_abandoned):
            assert job.gate is not None
            job.gate.cancel()
            self.join(LINK_BOUND)
            del self.ended[LINK_BOUND]
            job.gate.close()
            self._forget_ahead(job.gate)
            self._link_bound = None
            s.stream_hold = 0
        running = self._ahead_model  # gives back when its step has ended
        for m, model in enumerate(self.models):
            pieces, weights = int(s.granted[m]), model.weights
            if pieces < _pieces(weights) and m != running:
                self._forget_ahead(model)
                weights.set_granted(weights.choose(pieces - 1) if pieces else None)
        for sequence in list(self._on_host):
            if self.node.requests[sequence.row]["state"] not in (SAVING, SAVED, RESTORING):
                self._on_host.remove(sequence)
                self.host_kv.free(sequence.number)
        left = []
        for row in self._changed + self.node.kv_changes():
            sequence = self._rows[row]
            pool, blocks = self.models[sequence.model].pool, self.node.blocks(row)
            if blocks > len(pool.table(sequence.number)) or sequence.model == running:
                left.append(row)
                continue
            pool.resize(sequence.number, blocks)
            if self.node.requests[row]["state"] >= DONE:
                del self._rows[row]
        self._changed = left

    def _take_granted(self) -> bool:
        """Take what the state has granted.

        Returns:
            Whether all of it could be taken; if not, nothing new may start yet.
        """
        self._give_back()
        try:
            self._grow()
        except BudgetExceeded:
            self._compact_pools()
            try:
                self._grow()
            except BudgetExceeded:  # when what is in flight has ended, more can be moved
                return False
        return True

    def _grow(self) -> None:
        """Take the memory that the state has granted.

        Raises:
            BudgetExceeded: Blocks lie scattered and hold more memory than they need.
        """
        for m, model in enumerate(self.models):
            pieces, weights = int(self.node.state.granted[m]), model.weights
            if pieces > _pieces(weights):
                weights.set_granted(weights.choose(pieces - 1))
        for row in list(self._changed):
            sequence = self._rows[row]
            pool, blocks = self.models[sequence.model].pool, self.node.blocks(row)
            if blocks > len(pool.table(sequence.number)):
                pool.resize(sequence.number, blocks)
                self._changed.remove(row)

    def _compact_pools(self) -> None:
        """Close the holes of all pools, moving what nothing in flight uses."""
        requests = self.node.requests
        jobs = (self._compute, self._link_bound, self._ahead_step)
        running = {job.model for job in jobs if job is not None}
        movable: dict[int, set[int]] = {m: set() for m in range(len(self.models))}
        for row, sequence in self._rows.items():
            moving = requests[row]["state"] in (SAVING, RESTORING)
            if not moving and sequence.model not in running:
                movable[sequence.model].add(sequence.number)
        for m, model in enumerate(self.models):
            model.pool.compact(movable[m])

    def _start_transfers(self) -> None:
        s = self.node.state
        kind = int(s.h2d_kind)
        # What a step ahead still uses is resized later, and moved after that.
        restores = kind == LINK_RESTORE and int(s.h2d_request) in self._changed
        if kind != LINK_IDLE and self._h2d is None and not restores:
            of = self._subject(kind)
            if self._ahead is not None and (self._ahead.kind, self._ahead.of) == (kind, of):
                self._h2d, self._ahead = self._ahead, None
                if self._h2d.done is not None:
                    self.inbox.put(self._h2d.done)
            else:
                self._h2d = self._send(kind, of)
        self._look_ahead()
        if s.d2h_request >= 0 and not self._saving and int(s.d2h_request) not in self._changed:
            saved = self._rows[int(s.d2h_request)]
            if saved in self._on_host:  # restored and preempted again within one instant
                self.host_kv.free(saved.number)
            self._on_host.add(saved)
            pool = self.models[saved.model].pool
            self._saving = True
            self.workers[D2H].submit(lambda: self.host_kv.save(pool, saved.number))

    def _subject(self, kind: int) -> object:
        """Return what the transfer of the state is for."""
        s = self.node.state
        if kind == LINK_LOAD:
            return self.models[int(s.h2d_model)]
        if kind == LINK_STREAM:
            return None if self._link_bound is None else self._link_bound.gate
        return self._rows[int(s.h2d_request)]

    def _send(self, kind: int, of: object) -> Transfer:
        """Give the worker a transfer."""
        transfer = Transfer(kind, of)
        job: Callable[[], Any] = _nothing
        if isinstance(of, ServedModel):
            s, weights, m = self.node.state, of.weights, self.models.index(of)
            piece = weights.claim_piece(int(min(s.target[m], s.granted[m])) - 1)
            if piece is not None:  # or it came ahead, for a load that ended early
                job = functools.partial(weights.copy_piece, piece)
        elif isinstance(of, LinkBoundGate):
            weights = self.models[int(self.node.state.lb_model)].weights
            layer = of.streamed[self._streamed]
            self._streamed += 1
            job = functools.partial(weights.stream_layer, layer, of)
        elif isinstance(of, Sequence_):
            job = functools.partial(self.host_kv.restore, self.models[of.model].pool, of.number)
        self.workers[H2D].submit(job, transfer)
        self._hold_stream()
        return transfer

    def _look_ahead(self) -> None:
        """Queue the transfer that surely comes next behind the one on the link.

        The worker goes on without waiting for the loop. Where the state decides otherwise after
        all, what came ahead is there when it comes to it.
        """
        s = self.node.state
        if self._h2d is None or self._ahead is not None or not self.clock.real or s.restore_len:
            return
        of = self._h2d.of
        streaming = s.lb_kind != IDLE and s.lb_layers > 0
        if isinstance(of, ServedModel):
            m = self.models.index(of)
            left = min(s.target[m], s.granted[m]) - s.landed[m] - 1
            if left > 0 and not streaming and s.load_len == 1 and s.load_queue[0] == m:
                self._ahead = self._send(LINK_LOAD, of)
        elif (
            isinstance(of, LinkBoundGate)
            and of is self._subject(LINK_STREAM)
            and s.load_len == 0
            and self._streamed < len(of.streamed)
            and of.slot_free(self._streamed)
        ):
            self._ahead = self._send(LINK_STREAM, of)

    def _forget_ahead(self, of: object) -> None:
        """Wait for a transfer of something that has come ahead, and forget it."""
        while self._ahead is not None and self._ahead.of is of:
            if self._ahead.done is not None:
                self._ahead = None
                return
            self.receive(60.0)

    def _hold_stream(self) -> None:
        """Let no further layer start on the link before its slot is free."""
        job = self._link_bound
        if job is None or job.gate is None or not self.clock.real:
            return
        ahead = self._ahead is not None and self._ahead.of is job.gate
        free = self._streamed < len(job.gate.streamed) and job.gate.slot_free(self._streamed)
        self.node.state.stream_hold = not (ahead or free)

    def _start_iteration(self) -> bool:
        """Start the iteration that the state has given the device to.

        Returns:
            Whether more may start at this instant.
        """
        s = self.node.state
        if s.gpu_kind == IDLE or self._compute is not None:
            return False
        if s.gpu_link_bound and (self._link_bound is not None or s.lb_abandoned):
            return False  # under a simulated clock its compute has not ended yet
        m, kind = int(s.gpu_model), int(s.gpu_kind)
        model = self.models[m]
        if not s.gpu_link_bound:
            if self._compute_idle_since_ns is not None:
                self.overhead_ns += time.monotonic_ns() - self._compute_idle_since_ns
            if not self._adopt(m, kind):
                run, self._compute = self._prepare(m, kind, int(s.gpu_tokens))
                self.workers[COMPUTE].submit(functools.partial(run, True), self._compute)
            return False
        while self._ahead_model == m:  # one iteration of a model at a time
            self.receive(60.0)
        run, job = self._prepare(m, kind, int(s.gpu_tokens))
        weights = model.weights
        held = weights.choose(int(s.target[m]) - 1)
        gate = weights.link_bound(
            sorted(set(range(weights.layers)) - held),
            pull=not self.clock.real,  # the simulator's instants are not those of the slots
            freed=lambda: self.inbox.put(self._hold_stream),
        )
        job.gate, job.number = gate, int(s.lb_id)
        self._link_bound = job
        self._streamed = 0
        s.stream_hold = 0

        def iterate() -> None:
            with gate:
                run(False)

        self.workers[LINK_BOUND].submit(iterate)
        if not self.clock.real:
            return False
        self.node.end_compute()
        return True

    def _prepare(self, m: int, kind: int, tokens: int) -> tuple[Callable[[bool], None], Job]:
        """Gather the inputs of an iteration; they do not change while it runs."""
        model, node = self.models[m], self.node
        if kind == DECODE_STEP:
            job = Job(m, kind, tuple(self._rows[row] for row in node.decoding(m)), True)
            inputs = [self._input(sequence) for sequence in job.sequences]

            def step(resident: bool) -> None:
                job.result = _decode(model.runner, inputs, resident)

            return step, job
        row = int(node.state.prefilling[m])
        sequence = self._rows[row]
        start = int(node.requests[row]["prefilled"])
        chunk = sequence.tokens[start : start + tokens]
        last = start + tokens == len(sequence.tokens)
        table = model.pool.table(sequence.number)
        choice = self._choice(sequence) if last else None
        job = Job(m, kind, (sequence,), last)

        def prefill(resident: bool) -> None:
            job.result = [model.runner.prefill(chunk, start, table, choice, resident)]

        return prefill, job

    def _input(self, sequence: Sequence_, later: int = 0) -> DecodeInput:
        """Return the input of a sequence's next decode step, or of one so many steps later."""
        table = self.models[sequence.model].pool.table(sequence.number)
        position = len(sequence.tokens) - 1 + later
        return DecodeInput(sequence.tokens[-1], position, table, self._choice(sequence, later))

    @property
    def _ahead_model(self) -> int:
        """The model of a decode step that is queued or runs ahead of the state, or -1."""
        ahead = self._ahead_step
        return -1 if ahead is None or ahead.done is not None else ahead.model

    def _step_ahead(self) -> None:
        """Queue the decode step that surely comes next behind the one that computes.

        The device goes on without waiting for the loop. Where the state decides otherwise after
        all, the step is dropped: it is computed again later, with the same outcome.
        """
        now = self._compute
        if now is None or not self.clock.real or self._ahead_model >= 0:
            return
        self._ahead_step = None
        if now.kind != DECODE_STEP or (m := self.node.foresee()) < 0 or self._changed:
            return
        runner = self.models[m].runner
        if m == now.model:  # its tokens are those that are being computed
            sequences, places = tuple(now.batch), tuple(now.batch.values())
            inputs = [self._input(sequence, 1) for sequence in sequences]
        else:
            sequences = tuple(self._rows[row] for row in self.node.decoding(m))
            inputs = [self._input(sequence) for sequence in sequences]
        ahead = Job(m, DECODE_STEP, sequences, True)
        ahead.position = tuple(one.position for one in inputs)

        def step() -> None:
            ready = inputs
            if m == now.model:
                tokens = [now.result[place] for place in places]
                ready = [replace(one, token=t) for one, t in zip(inputs, tokens, strict=True)]
            ahead.result = list(runner.decode(ready, resident=True))

        self._ahead_step = ahead
        self.workers[COMPUTE].submit(step, ahead)

    def _adopt(self, m: int, kind: int) -> bool:
        """Take the step that was queued ahead for the one that the state starts, if it is it."""
        ahead, self._ahead_step = self._ahead_step, None
        if ahead is None:
            return False
        rows = self.node.decoding(m) if kind == DECODE_STEP and ahead.model == m else []
        at = {q: (i, ahead.position[i]) for i, q in enumerate(ahead.sequences)}
        batch: dict[Sequence_, int] = {}
        for sequence in [self._rows[row] for row in rows]:
            place, position = at.get(sequence, (-1, -1))
            if position != len(sequence.tokens) - 1:
                batch.clear()
                break
            batch[sequence] = place
        if not batch or (ahead.done is not None and ahead.done.error is not None):
            if ahead.done is None:
                self._ahead_step = ahead  # its memory is in use until it has ended
            return False
        ahead.batch = batch
        self._compute = ahead
        if ahead.done is not None:
            self.inbox.put(ahead.done)
        return True

    def _choice(self, sequence: Sequence_, later: int = 0) -> Choice:
        request = sequence.request
        generated = sequence.generated + later
        no_eos = generated < request.min_tokens and not request.ignore_eos
        return Choice.of(request.sampling, sequence.seed, no_eos)

    def _waiting(self, m: int) -> int:
        return int(self.node.state.queue_len[m]) + sum(q.model == m for q in self._new)

    def _compact(self) -> None:
        while self._ahead_model >= 0:
            self.receive(60.0)
        self._give_back()
        moved = self.node.compact()
        rows = {}
        for row, sequence in self._rows.items():
            sequence.row = int(moved[row])
            if sequence.row >= 0:
                rows[sequence.row] = sequence
        self._rows = rows


def _nothing() -> None:
    """Do a transfer of which nothing is left to do."""


def _pieces(weights: ModelWeights) -> int:
    """Return for how many pieces device memory is committed."""
    return 0 if weights.granted is None else 1 + len(weights.granted)


def _decode(runner: ModelRunner, inputs: Sequence[DecodeInput], resident: bool) -> list[Any]:
    """Do a decode step; where it raises, one sequence at a time, so that only the guilty fails.

    Returns:
        A token or an exception for each sequence.
    """
    try:
        return list(runner.decode(inputs, resident=resident))
    except (torch.OutOfMemoryError, OutOfDeviceMemory):
        raise
    except Exception:
        if len(inputs) == 1:
            raise
    tokens: list[Any] = []
    for one in inputs:
        try:
            tokens += runner.decode([one], resident=resident)
        except (torch.OutOfMemoryError, OutOfDeviceMemory):
            raise
        except Exception as error:
            tokens.append(error)
    return tokens


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
