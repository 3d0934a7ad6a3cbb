"""`Engine`: the loop that makes a node real.

`LiveNode` says what is to run, to load and to save. The engine has workers do it (`Iterations`: one
of a resident model, and the one that is link-bound; `Transfers`: one each way), tells the node what
has ended, and lets device memory follow the state (`PhysicalMemory`). In between, policies are
asked.

Time is real, or (`SimulatedTime`) that of the cost model: then the same jobs run, but end when the
simulator says so, and every decision can be compared with the simulator's.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmrl.agents.export import ExportedPolicy
from mmrl.deploy.adapter import DeployAdapter
from mmrl.deploy.clock import COMPUTE, D2H, H2D, LINK_BOUND, Clock, RealTime
from mmrl.deploy.iterations import Iterations, Job
from mmrl.deploy.kv import HostFull, HostKV
from mmrl.deploy.memory import OutOfDeviceMemory
from mmrl.deploy.node import LiveNode
from mmrl.deploy.physical import PhysicalMemory
from mmrl.deploy.protocol import Decision, Finish, Generate, Tokens
from mmrl.deploy.reasons import reason
from mmrl.deploy.served import Rows, Sequence_, ServedModel
from mmrl.deploy.streaming import Abandoned
from mmrl.deploy.transfers import Transfers
from mmrl.deploy.workers import Inbox, Lane, Worker
from mmrl.node.actions import LEVEL_100, VERBS, WAIT, decode
from mmrl.node.state import DONE, QUEUE_LIMIT, REFUSED, UNARRIVED
from mmrl.rules import Rule

FAILURES = 3  # failed iterations in a row after which a model is quarantined
DECISIONS = 100  # that the engine remembers
OUT_OF_MEMORY = (torch.OutOfMemoryError, OutOfDeviceMemory)
STANDSTILL_S = 1.0  # without memory that was granted, until something is said and done

log = logging.getLogger("mmrl.engine")


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
        watch: Called with each iteration, transfer and decision, for tests and measurements.
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
        self.inbox = Inbox()
        self.workers = {name: Worker(name, device, self.inbox) for name in (LINK_BOUND, H2D, D2H)}
        self.workers[COMPUTE] = Worker(COMPUTE, device, self.inbox, high_priority=True)
        self._rows: Rows = {}
        real, workers = self.clock.real, self.workers
        self.transfers = Transfers(
            self.models, node, self._rows, host_kv, workers[H2D], workers[D2H], self.inbox, real
        )
        self.iterations = Iterations(
            self.models,
            node,
            self._rows,
            self.transfers,
            workers[COMPUTE],
            workers[LINK_BOUND],
            self.inbox,
            real,
        )
        self._memory = PhysicalMemory(
            self.models, node, self._rows, self.iterations, self.transfers
        )
        self._lanes: dict[str, Lane[Any]] = {
            COMPUTE: self.iterations.compute,
            LINK_BOUND: self.iterations.link_bound,
            H2D: self.transfers.h2d,
            D2H: self.transfers.d2h,
        }
        self.foreseen_compute_end = False
        self._short_since: float | None = None
        self._numbers: dict[int, Sequence_] = {}
        self._cancelling: list[Sequence_] = []
        self._new: list[Sequence_] = []
        self._outgoing: list[tuple[int, Tokens]] = []
        self.deciding = False
        self.decision_until_ns = 0
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS)
        self.decision_count = 0
        self.decision_latencies_s: list[float] = []
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

    def change_policy(self, policy: ExportedPolicy | Rule) -> None:
        """Let another policy decide; weights and requests stay as they are.

        Raises:
            InputError: It has other verbs than the node; nothing has changed then.
        """
        self.adapter.change(policy, self.node.state)

    def preload(self, m: int) -> bool:
        """Load a model if it fits now; return whether it does."""
        fits = self.node.preload(m)
        self._memory.give_back()
        if fits:
            self._note(m, LEVEL_100, "operator", "preload", 0.0)
        return fits

    @property
    def overhead_ns(self) -> int:
        """How long the device has waited for the loop, though there was work."""
        return self.iterations.overhead_ns

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._numbers)

    # ------------------------------------------------------------------ the loop

    def run_instant(self) -> None:
        """Wait for something to happen, and do everything that follows from it."""
        ended = self.clock.wait(self)
        while self.inbox.calls:
            self.inbox.calls.popleft()()
        self._instant(ended)

    def begin(self) -> None:
        """Start what can start before anything has happened."""
        self._work()

    def ended(self) -> set[str]:
        """Return the workers whose jobs, as far as the state knows of them, have ended."""
        return {name for name, lane in self._lanes.items() if lane.ended}

    def join(self, worker: str) -> None:
        """Wait until the job of a worker has ended."""
        self.inbox.wait(lambda: self._lanes[worker].ended)

    def close(self) -> None:
        """Stop the workers."""
        if self.transfers.gate is not None:
            self.transfers.gate.cancel()
        for worker in self.workers.values():
            worker.close()
        self.adapter.close()

    def _instant(self, ended: set[str]) -> None:
        node = self.node
        short = self._fail_on_transfer_errors(ended)
        node.advance(self.clock.now_ns(), h2d=H2D in ended - short, d2h=D2H in ended - short)
        for worker in ended & {H2D, D2H}:
            _, done = self._lanes[worker].finish()
            if worker in short:
                self._fail_transfer(worker, done.error)
            elif self.watch is not None:
                self.watch(worker, done)
        if COMPUTE in ended:
            self._end_compute()
        elif self.foreseen_compute_end:
            self.foreseen_compute_end = False
            node.end_compute()
        self._look_at_link_bound()
        self._retry_cancels()
        due = node.settle()
        self._memory.give_back()
        self._welcome()
        if (due and not self.deciding and node.begin_decision()) or self.deciding:
            self._decide()
        self._work()
        self.iterations.rest()
        if self._outgoing:
            self.emit(self._outgoing)
            self._outgoing = []

    def _work(self) -> None:
        """Start what the state says; a live link-bound iteration leaves the device free."""
        more = True
        while more:
            self.transfers.hold_stream()
            self.node.start_work()
            self.iterations.leave_preempted()
            taken = self._memory.take_granted()
            more = taken and self.iterations.start()
            self.transfers.start(self._memory.unsettled, self._memory.ungranted)
        self._watch_memory(taken)
        if taken and not self._memory.unsettled:
            self.iterations.look_ahead()

    def _watch_memory(self, taken: bool) -> None:
        """Tell the log when memory that was granted has not been had for long.

        No iteration starts meanwhile. If nothing is at work but a link-bound iteration whose layers
        come behind what waits for memory, that is given up: its blocks can be moved then.
        """
        now = time.monotonic()
        if taken:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        elif now - self._short_since > STANDSTILL_S:
            self._short_since = now
            lanes = self._lanes.items()
            at_work = [name for name, lane in lanes if lane.current or lane.unfinished]
            log.error(
                "memory that was granted cannot be taken: weights of %s wait, and KV of %d "
                "requests; at work: %s",
                [self.names[m] for m in self._memory.ungranted],
                len(self._memory.unsettled),
                at_work,
            )
            if at_work == [LINK_BOUND] and self.transfers.gate is not None:
                self.transfers.gate.cancel()

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
            self._memory.give_back()
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

    def _fail_on_transfer_errors(self, ended: set[str]) -> set[str]:
        """Return whose transfers found no memory: a load, a save. Any other error is raised."""
        short = set()
        for worker in ended & {H2D, D2H}:
            task: Any = self._lanes[worker].current
            error = task.done.error
            if isinstance(error, HostFull) or (
                isinstance(error, OUT_OF_MEMORY) and isinstance(task.of, ServedModel)
            ):
                short.add(worker)
            elif error is not None:
                raise error
        return short

    def _fail_transfer(self, worker: str, error: BaseException | None) -> None:
        """Deal with a transfer that found no memory; the sequences that it is for go on later."""
        if worker == D2H:
            log.error("a save failed: its sequence is computed again", exc_info=error)
            self.node.fail_save()
            return
        m = int(self.node.state.h2d_model)
        self.node.fail_load()
        self._empty_cache()
        self._count_failure(m, "a load", error)

    def _empty_cache(self) -> None:
        """Give the device what torch has to spare."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _end_compute(self) -> None:
        job, done = self.iterations.end_compute()
        if done.error is not None:
            if not job.position:  # a step ahead is started again, and then only the guilty fail
                self._fail(job, done.error)
            return
        if self.watch is not None:
            self.watch("iteration", (job, done))
        self._take(job)
        self.node.end_compute()
        self._finish(job)

    def _look_at_link_bound(self) -> None:
        """End the link-bound iteration if it has failed, or computed and has its bytes."""
        job = self.iterations.link_bound.current
        if job is None:
            return
        complete = self.node.link_bound_complete
        if complete and not self.clock.real:
            self.join(LINK_BOUND)
        if job.done is None or not (complete or job.done.error is not None):
            return
        self.iterations.end_link_bound()
        if job.done.error is not None:
            self._fail(job, job.done.error)
            return
        self._take(job)
        self.node.end_link_bound()
        self._finish(job)

    def _take(self, job: Job) -> None:
        """Give the tokens of an iteration to its sequences, before the state does."""
        if not job.failed:
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
        """Fail the sequences of an iteration for which it raised, after its end.

        Where others of the batch have their tokens, the model works.
        """
        if not job.last:
            return
        wrong = {q: job.result[place] for q, place in job.batch.items()}
        wrong = {q: error for q, error in wrong.items() if isinstance(error, BaseException)}
        for sequence, error in wrong.items():
            self._end(sequence, Tokens((), Finish.ERROR, _describe(error)))
        if job.failed:
            self._count_failure(job.model, "an iteration", next(iter(wrong.values())))
            return
        for error in wrong.values():
            log.error("a sequence of %s failed", self.names[job.model], exc_info=error)

    def _fail(self, job: Job, error: BaseException) -> None:
        """Deal with an iteration that raised as a whole."""
        given_up = isinstance(error, Abandoned)  # for memory's sake: its model did nothing wrong
        memory = given_up or isinstance(error, OUT_OF_MEMORY)
        self.node.fail_iteration(job.model, link_bound=job.gate is not None, out=memory)
        if given_up:
            return
        self._count_failure(job.model, "an iteration", error)
        if memory:
            self._empty_cache()
            if not self.models[job.model].quarantined:
                return  # its sequences are preempted and continue later
        for sequence in job.batch:
            self._end(sequence, Tokens((), Finish.ERROR, _describe(error)))

    def _count_failure(self, m: int, what: str, error: BaseException | None) -> None:
        model = self.models[m]
        log.error("%s of %s failed", what, model.name, exc_info=error)
        model.failures += 1
        if model.failures >= FAILURES and not model.quarantined:
            model.quarantined = True
            log.error("%s failed %d times in a row: quarantined", model.name, model.failures)
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
            else:
                self._memory.forget(sequence)
        self._cancelling = left

    def _welcome(self) -> None:
        """Tell the front which of the new requests are in."""
        for sequence in self._new:
            if self.node.requests[sequence.row]["state"] == REFUSED:
                if not sequence.ending:  # cancelled before it arrived
                    sequence.ending = True
                    del self._numbers[sequence.number]
                    self.refuse(sequence.number, "queue_full", "the queue of the model is full")
                self._memory.forget(sequence)
            else:
                self.accept(sequence.number)
        self._new.clear()

    # ------------------------------------------------------------------ the request table

    def _waiting(self, m: int) -> int:
        return int(self.node.state.queue_len[m]) + sum(q.model == m for q in self._new)

    def _compact(self) -> None:
        self.inbox.wait(lambda: self.iterations.ahead_model < 0)
        self._retry_cancels()
        self._memory.give_back()
        moved = self.node.compact()
        self._memory.unsettled = [int(moved[row]) for row in self._memory.unsettled]
        sequences = list(self._rows.values())
        self._rows.clear()
        for sequence in sequences:
            sequence.row = int(moved[sequence.row])
            if sequence.row >= 0:
                self._rows[sequence.row] = sequence


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
