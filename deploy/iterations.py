"""`Iterations`: the device computes what the state says, and what it will surely say next.

One worker does the iterations of resident models, one after the other; another the one link-bound
iteration, whose layers compute as they come. While a decode step computes, the one that surely
follows is launched behind it and takes its tokens from it on the device, which so waits neither for
the loop nor for Python. Where the state decides otherwise after all, that step is dropped: it is
computed again later, with the same outcome.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mmrl.deploy.memory import OutOfDeviceMemory
from mmrl.deploy.node import LiveNode
from mmrl.deploy.runner import DecodeInput, ModelRunner
from mmrl.deploy.served import Rows, Sequence_, ServedModel
from mmrl.deploy.streaming import Abandoned, LinkBoundGate
from mmrl.deploy.transfers import Transfers
from mmrl.deploy.workers import Done, Inbox, Lane, Launched, Task, Worker
from mmrl.node.state import DECODE, DECODE_STEP, IDLE


@dataclass(eq=False)
class Job(Task):
    """An iteration in flight.

    Attributes:
        model: Of which model.
        kind: PREFILL_CHUNK or DECODE_STEP.
        sequences: Whose.
        last: Whether it yields tokens: a decode step, or the last chunk of a prefill.
        gate: Of a link-bound iteration.
        number: Of a link-bound iteration.
        result: A token or an exception for each sequence, set by the worker.
        batch: The place in sequences and result of each sequence that counts; all, but for a step
            ahead of the state some may have left since.
        position: Of each sequence's token in a step ahead of the state.
        serial: Of a decode step that was launched as a whole: its number on its runner.
        wait: Waits for it and returns its tokens; until then, and of any other iteration, nothing.
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
    serial: int = -1
    wait: Callable[[], list[int]] = list

    @property
    def failed(self) -> bool:
        """Whether it has ended and raised for every sequence that counts."""
        outcomes = [self.result[place] for place in self.batch.values()] if self.last else []
        return bool(outcomes) and all(isinstance(one, BaseException) for one in outcomes)

    def __post_init__(self) -> None:
        self.batch = {sequence: place for place, sequence in enumerate(self.sequences)}


class Iterations:
    """What the device computes.

    Args:
        models: The fleet.
        node: The state.
        rows: The requests in it.
        transfers: The link, which brings the layers of a link-bound iteration.
        compute: Who computes resident models.
        link_bound: Who computes the link-bound iteration.
        inbox: Where they leave their messages.
        real: Whether jobs end when they end, and not when the cost model says so.

    Attributes:
        overhead_ns: How long the device has waited for the loop, though there was work.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        node: LiveNode,
        rows: Rows,
        transfers: Transfers,
        compute: Worker,
        link_bound: Worker,
        inbox: Inbox,
        real: bool,
    ) -> None:
        self._models, self._node, self._rows, self._transfers = models, node, rows, transfers
        self.compute: Lane[Job] = Lane(compute)
        self.link_bound: Lane[Job] = Lane(link_bound)
        self._inbox, self._real = inbox, real
        self.overhead_ns = 0
        self._idle_since_ns: int | None = None

    # ------------------------------------------------------------------ as the state says

    def start(self) -> bool:
        """Start the iteration that the state has given the device to.

        Returns:
            Whether more may start at this instant: a live link-bound iteration leaves the device
            free.
        """
        s = self._node.state
        if s.gpu_kind == IDLE or self.compute.current is not None:
            return False
        m, kind, tokens = int(s.gpu_model), int(s.gpu_kind), int(s.gpu_tokens)
        if s.gpu_link_bound:
            if s.lb_abandoned and self._real:  # before there was memory for it to begin
                self._node.end_compute()
                self._inbox.put(None)  # what it held can be settled
                return True
            if self.link_bound.current is not None or s.lb_abandoned:
                return False  # under a simulated clock its compute has not ended yet
            self._start_link_bound(m, kind, tokens)
            return self._real
        if not self._adopt(m, kind):
            run, job = self._prepare(m, kind, tokens)
            self.compute.start(functools.partial(run, True), job)
            if self._idle_since_ns is not None:
                self.overhead_ns += time.monotonic_ns() - self._idle_since_ns
        return False

    def end_compute(self) -> tuple[Job, Done]:
        """Return the resident iteration that has ended; the device waits for the loop from then."""
        job, done = self.compute.finish()
        self._idle_since_ns = done.ended_ns
        return job, done

    def rest(self) -> None:
        """Note that the loop is through: if the device waits, it waits for something else."""
        self._idle_since_ns = None

    def end_link_bound(self) -> Job:
        """Close the link-bound iteration that has ended."""
        job, _ = self.link_bound.finish()
        assert job.gate is not None
        job.gate.close()
        self._transfers.gate = None
        return job

    def drop_abandoned(self) -> None:
        """End the link-bound iteration if the state has abandoned it."""
        s, job = self._node.state, self.link_bound.current
        if job is None or not (s.lb_kind == IDLE or s.lb_id != job.number or s.lb_abandoned):
            return
        assert job.gate is not None
        job.gate.cancel()
        self._inbox.wait(lambda: self.link_bound.ended)
        self.end_link_bound()

    def _start_link_bound(self, m: int, kind: int, tokens: int) -> None:
        self._inbox.wait(lambda: self.ahead_model != m)  # one iteration of a model at a time
        run, job = self._prepare(m, kind, tokens)
        s, weights = self._node.state, self._models[m].weights
        held = weights.choose(int(s.target[m]) - 1)
        gate = weights.link_bound(
            sorted(set(range(weights.layers)) - held),
            pull=not self._real,  # the simulator's instants are not those of the slots
            freed=lambda: self._inbox.put(None),
        )
        job.gate, job.number = gate, int(s.lb_id)
        self._transfers.gate = gate

        def iterate() -> None:
            with gate:
                launched = run(False)
                if launched is not None:
                    launched.wait()

        self.link_bound.start(iterate, job)
        if self._real:
            self._node.end_compute()

    def _prepare(
        self, m: int, kind: int, tokens: int
    ) -> tuple[Callable[[bool], Launched | None], Job]:
        """Gather the inputs of an iteration; they do not change while it runs."""
        model, node = self._models[m], self._node
        if kind == DECODE_STEP:
            job = Job(m, kind, tuple(self._rows[row] for row in node.decoding(m)), True)
            inputs = [self._input(sequence) for sequence in job.sequences]

            return functools.partial(_decode, model.runner, inputs, job), job
        row = int(node.state.prefilling[m])
        sequence = self._rows[row]
        start = int(node.requests[row]["prefilled"])
        chunk = sequence.tokens[start : start + tokens]
        last = start + tokens == len(sequence.tokens)
        table = model.pool.table(sequence.number)
        choice = sequence.choice() if last else None
        job = Job(m, kind, (sequence,), last)

        def prefill(resident: bool) -> None:
            job.result = [model.runner.prefill(chunk, start, table, choice, resident)]

        return prefill, job

    def _input(self, sequence: Sequence_, later: int = 0) -> DecodeInput:
        """Return the input of a sequence's next decode step, or of one so many steps later."""
        table = self._models[sequence.model].pool.table(sequence.number)
        position = len(sequence.tokens) - 1 + later
        return DecodeInput(sequence.tokens[-1], position, table, sequence.choice(later))

    # ------------------------------------------------------------------ ahead of the state

    @property
    def ahead_model(self) -> int:
        """The model of a decode step that is queued or runs ahead of the state, or -1."""
        ahead = self.compute.unfinished
        return -1 if ahead is None else ahead.model

    @property
    def models_in_use(self) -> set[int]:
        """The models of which something computes, or is about to."""
        jobs = [self.compute.current, self.compute.unfinished]
        link_bound = self.link_bound.current
        if link_bound is not None and link_bound.done is None:  # else it has computed, and waits
            jobs.append(link_bound)  # only for bytes that the state does not have yet
        return {job.model for job in jobs if job is not None}

    def leave_preempted(self) -> None:
        """Take the sequences that do not decode any more out of the steps ahead of the state."""
        states = self._node.requests["state"]
        for ahead in self.compute.ahead:
            ahead.batch = {q: place for q, place in ahead.batch.items() if states[q.row] == DECODE}

    def look_ahead(self) -> None:
        """Queue the decode step that surely comes next behind the one that computes."""
        now = self.compute.current
        if now is None or not self._real or self.compute.unfinished is not None:
            return
        self.compute.drop(lambda job: True)
        if now.kind != DECODE_STEP or (m := self._node.foresee()) < 0:
            return
        runner = self._models[m].runner
        if m == now.model:  # its tokens are those that are being computed
            sequences, places = tuple(now.batch), tuple(now.batch.values())
            inputs = [self._input(sequence, 1) for sequence in sequences]
        else:
            sequences = tuple(self._rows[row] for row in self._node.decoding(m))
            inputs = [self._input(sequence) for sequence in sequences]
        ahead = Job(m, DECODE_STEP, sequences, True)
        ahead.position = tuple(one.position for one in inputs)

        def step() -> Launched:
            ready = inputs
            if m == now.model:
                if now.serial == runner.serial:  # nothing came in between
                    tokens: list[Any] = [-1 - place for place in places]
                else:
                    known = now.result or now.wait()
                    tokens = [known[place] for place in places]
                ready = [replace(one, token=t) for one, t in zip(inputs, tokens, strict=True)]
            return _launch(runner, ready, ahead)

        self.compute.queue(step, ahead)

    def _adopt(self, m: int, kind: int) -> bool:
        """Take the step that was queued ahead for the one that the state starts, if it is it."""
        for ahead in self.compute.ahead:
            batch = self._batch_of(ahead, m) if kind == DECODE_STEP else {}
            if batch and (ahead.done is None or ahead.done.error is None):
                ahead.batch = batch
                self.compute.adopt(ahead)
                return True
        self.compute.drop(lambda job: True)  # its memory is in use until it has ended
        return False

    def _batch_of(self, ahead: Job, m: int) -> dict[Sequence_, int]:
        """Return the places in a step ahead of the sequences that decode, empty if not all are."""
        if ahead.model != m:
            return {}
        batch: dict[Sequence_, int] = {}
        for sequence in [self._rows[row] for row in self._node.decoding(m)]:
            place = ahead.batch.get(sequence)
            if place is None or ahead.position[place] != len(sequence.tokens) - 1:
                return {}
            batch[sequence] = place
        return batch


def _decode(
    runner: ModelRunner, inputs: Sequence[DecodeInput], job: Job, resident: bool
) -> Launched | None:
    """Launch a decode step; where it raises, do one sequence at a time: only the guilty one fails.

    The result of the job is a token or an exception for each sequence.
    """
    try:
        return _launch(runner, inputs, job, resident)
    except (torch.OutOfMemoryError, OutOfDeviceMemory, Abandoned):
        raise
    except Exception:
        if len(inputs) == 1:
            raise
    tokens: list[Any] = []
    for one in inputs:
        try:
            tokens += runner.decode([one], resident=resident)
        except (torch.OutOfMemoryError, OutOfDeviceMemory, Abandoned):
            raise
        except Exception as error:
            tokens.append(error)
    job.result = tokens
    return None


def _launch(
    runner: ModelRunner, inputs: Sequence[DecodeInput], job: Job, resident: bool = True
) -> Launched:
    """Launch a decode step whose tokens become the result of a job."""
    job.wait = wait = runner.launch_decode(inputs, resident)
    job.serial = runner.serial

    def end() -> None:
        job.result = list(wait())

    return Launched(end)
