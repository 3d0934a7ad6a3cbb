"""The reference simulator: docs/semantics.md as plain Python, one step at a time.

Every iteration, link piece and decode step is an object that starts at one instant and ends at
another; nothing is cached and nothing is skipped. Sections below have the numbers and the words
of that page. ``mmrl/sim/kernel.py`` does the same fast; a test holds the two equal bit for bit.
"""

import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np

from mmrl.node import state as st
from mmrl.node.state import CostTable, Record
from mmrl.profiles.costs import decode_ns, prefill_chunk_ns

NEVER = int(st.NEVER)

# Section 8: the verbs of the two sets, and the group of each verb.
LEVELS = {"level0": 0.0, "level25": 0.25, "level50": 0.5, "level75": 0.75, "level100": 1.0}
FULL = ("out", *LEVELS, "pause", "resume", "focus")
CORE = ("out", "level100", "pause", "resume")
GROUP = dict.fromkeys(("out", *LEVELS), "residency") | {
    "pause": "run",
    "resume": "run",
    "focus": "focus",
}

REQUEST_CONSTANTS = (
    *("arrival_ns", "ttft_ns", "tpot_ns", "isolated_ns"),
    *("model", "prompt", "output"),
)
MODEL_CONSTANTS = (
    *("profile", "pieces", "base_bytes", "layer_bytes", "block_bytes"),
    *("load_fixed_ns", "load_base_ns", "load_layer_ns", "stream_fixed_ns", "stream_layer_ns"),
    *("save_fixed_ns", "save_block_ns", "restore_fixed_ns", "restore_block_ns"),
    *("decode_scale", "prefill_scale"),
)
NODE_STATE = (
    *("now_ns", "due_ns", "timer_ns", "done", "host_kv_bytes", "gdsf_clock", "rr_last"),
    *("h2d_busy_ns", "d2h_busy_ns", "h2d_turn", "illegal_actions", "urgency", "latency_area"),
    "misses",
)
MODEL_STATE = (
    *("target", "granted", "landed", "paused", "kv_blocks", "gdsf_uses", "gdsf_priority"),
    *("loads", "load_bytes", "loaded_ns", "stream_bytes", "kv_save_bytes", "kv_restore_bytes"),
    *("outs", "idle_evictions", "unblocked", "preempted", "kv_dropped", "abandoned"),
    *("gpu_busy_ns", "prefill_tokens", "decode_tokens"),
)
REQUEST_STATE = (*("state", "generated", "blocks", "first_ns", "finish_ns", "preemptions", "miss"),)


def blocks_for(tokens: int) -> int:
    """Return the KV blocks that hold ``tokens`` tokens of one sequence."""
    return -(-tokens // st.BLOCK_TOKENS)


@dataclass(eq=False)
class Request:
    """One request (section 5); the index is its place in order of arrival."""

    index: int
    arrival_ns: int
    ttft_ns: int
    tpot_ns: int
    isolated_ns: int
    model: int
    prompt: int
    output: int
    state: int = st.UNARRIVED
    generated: int = 0
    prefilled: int = 0
    blocks: int = 0  # on the device, or on the host when saved
    first_ns: int = -1
    finish_ns: int = -1
    preemptions: int = 0
    miss: int = st.MISS_NONE

    @property
    def deadline_ns(self) -> int:
        """The last instant at which a first token meets the TTFT target."""
        return self.arrival_ns + self.ttft_ns

    @property
    def prefill_tokens(self) -> int:
        """Tokens that its prefill computes, ``p``."""
        return self.prompt + self.generated

    @property
    def kv_tokens(self) -> int:
        """KV tokens once it decodes: those of all tokens but the last."""
        return self.prompt + self.generated - 1

    def can_meet_ttft(self, now_ns: int) -> bool:
        """Whether its first token is out or can still come in time."""
        return self.first_ns >= 0 or now_ns <= self.deadline_ns


@dataclass(eq=False)
class Model:
    """One model of the node: its constants, weights, requests and counters."""

    index: int
    profile: int
    pieces: int  # L + 1
    base_bytes: int
    layer_bytes: int
    block_bytes: int
    load_fixed_ns: int
    load_base_ns: int
    load_layer_ns: int
    stream_fixed_ns: int
    stream_layer_ns: int
    save_fixed_ns: int
    save_block_ns: float
    restore_fixed_ns: int
    restore_block_ns: float
    decode_scale: float
    prefill_scale: float
    # weights
    target: int = 0
    granted: int = 0
    landed: int = 0
    load_begun: bool = False  # load_fixed has been paid since the last grant
    loaded_ns: int = -1
    paused: bool = False
    # requests
    queue: list[Request] = field(default_factory=list)
    begun: list[Request] = field(default_factory=list)
    decode_due: bool = False
    seg_left: int = 0
    step_ns: int = 0
    kv_blocks: int = 0
    # eviction order
    gdsf_uses: float = 0.0
    gdsf_priority: float = 0.0
    # counters
    loads: int = 0
    load_bytes: int = 0
    stream_bytes: int = 0
    kv_save_bytes: int = 0
    kv_restore_bytes: int = 0
    outs: int = 0
    idle_evictions: int = 0
    unblocked: int = 0
    preempted: int = 0
    kv_dropped: int = 0
    abandoned: int = 0
    gpu_busy_ns: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0

    def weights(self, pieces: int) -> int:
        """Bytes of the first ``pieces`` pieces."""
        return self.base_bytes + (pieces - 1) * self.layer_bytes if pieces else 0

    def level(self, level: float) -> int:
        """Pieces of a level in 0..1."""
        return 1 + math.ceil(level * (self.pieces - 1))

    def begun_in(self, *states: int) -> list[Request]:
        """Its begun requests in one of these states, in order of arrival."""
        return [request for request in self.begun if request.state in states]

    @property
    def has_requests(self) -> bool:
        """Whether it has a request queued or begun."""
        return bool(self.queue or self.begun)

    @property
    def lacks_weights(self) -> bool:
        """Whether it is out and has requests queued or begun."""
        return self.target == 0 and self.has_requests


@dataclass(eq=False)
class Iteration:
    """One prefill chunk or decode step (section 6)."""

    kind: int  # PREFILL_CHUNK or DECODE_STEP
    model: Model
    batch: list[Request]  # the sequence in prefill, or those that decode when it starts
    tokens: int  # that it computes
    duration_ns: int
    end_ns: int  # of its compute
    link_bound: bool
    need: int  # link-bound: pieces that must have landed for it to end
    layers: int  # link-bound: layers still to be streamed
    fixed_paid: bool = False
    computed: bool = False
    abandoned: bool = False


@dataclass(eq=False)
class Transfer:
    """What is on one direction of the link (section 4)."""

    kind: int  # LINK_RESTORE, LINK_STREAM or LINK_LOAD; saves have their own direction
    model: Model
    duration_ns: int
    end_ns: int
    request: Request | None = None  # whose KV moves
    iteration: Iteration | None = None  # that the layer is streamed for


class ReferenceNode:
    """One node and its requests, from the first instant to the end of the episode.

    Args:
        node: ``NODE`` record; only its numbers and the constants of its models are read.
        requests: ``recarray[R]`` of ``REQUEST``, the first ``node.n_requests`` in order of arrival.
        decode_tables: Seconds, ``float64[P, 65, 33]``, row ``node.profile[m]`` for model ``m``.
        prefill_tables: Seconds, ``float64[P, 257]``.
    """

    def __init__(
        self,
        node: Record,
        requests: "np.recarray",
        decode_tables: CostTable,
        prefill_tables: CostTable,
    ) -> None:
        self.decode_tables, self.prefill_tables = decode_tables, prefill_tables
        self.horizon_ns, self.interval_ns = int(node["horizon_ns"]), int(node["interval_ns"])
        self.latency_ns, self.budget_bytes = int(node["latency_ns"]), int(node["budget_bytes"])
        self.reserve_bytes = int(node["reserve_bytes"])
        self.host_kv_limit_bytes = int(node["host_kv_limit_bytes"])
        self.dispatch, self.prefetch = int(node["dispatch"]), bool(node["prefetch"])
        self.full_verbs = bool(node["full_verbs"])
        self.verbs = FULL if self.full_verbs else CORE
        self.models = [
            Model(m, **{name: node[name][m].item() for name in MODEL_CONSTANTS})
            for m in range(int(node["n_models"]))
        ]
        self.requests = [
            Request(i, **{name: requests[name][i].item() for name in REQUEST_CONSTANTS})
            for i in range(int(node["n_requests"]))
        ]
        self.now_ns = 0
        self.due_ns, self.timer_ns = NEVER, self.interval_ns
        self.asking = False  # time stands at a decision of the policy
        self.acted: set[tuple[int, str]] = set()  # (model, verb group) used at this instant
        self.done = 0  # 1 terminated, 2 truncated
        self.grant_queue: list[Model] = []
        self.load_queue: list[Model] = []
        self.restore_queue: list[Request] = []
        self.save_queue: list[Request] = []
        self.focus: Model | None = None
        self.host_kv_bytes = 0
        self.gdsf_clock = 0.0
        self.gpu: Iteration | None = None  # the iteration that computes
        self.rr_last = -1
        self.link_bound: Iteration | None = None  # in flight, computing or waiting for its bytes
        self.h2d: Transfer | None = None
        self.d2h: Transfer | None = None
        self.h2d_turn = st.LINK_STREAM  # which of stream and load went last
        self.h2d_busy_ns = self.d2h_busy_ns = self.illegal_actions = 0
        self.urgency, self.urgency_since_ns = 0.0, 0
        self.latency_area, self.misses = 0.0, 0

    # --- 2. Weights -----------------------------------------------------------------------------

    def _computes(self, model: Model) -> bool:
        return self.gpu is not None and self.gpu.model is model

    def _at_rest(self, model: Model) -> bool:
        loads = self.h2d and self.h2d.kind == st.LINK_LOAD and self.h2d.model is model
        return not loads and not self._computes(model)

    def _is_idle(self, model: Model) -> bool:
        loaded = model.target > 0 and model.landed == model.granted == model.target
        return loaded and not self._computes(model) and not model.has_requests

    # --- 3. Memory ------------------------------------------------------------------------------

    def _free(self) -> int:
        taken = sum(m.weights(m.granted) + m.kv_blocks * m.block_bytes for m in self.models)
        return self.budget_bytes - self.reserve_bytes - taken

    def _promised(self, but: Model | None = None) -> int:
        waiting = [m for m in self.grant_queue if m is not but]
        return sum(m.weights(m.target) - m.weights(m.granted) for m in waiting)

    def _releasing(self, but: Model) -> int:
        total = 0
        for model in self.models:
            if model is not but:
                total += max(0, model.weights(model.granted) - model.weights(model.target))
                leaving = model.begun_in(st.SAVING)
                if model.target == 0:
                    leaving += model.begun_in(st.PREFILL, st.DECODE)
                total += sum(request.blocks for request in leaving) * model.block_bytes
        return total

    def _idle_others(self, but: Model) -> list[Model]:
        return [m for m in self.models if m is not but and self._is_idle(m)]

    def _idle_bytes(self, but: Model) -> int:
        return sum(m.weights(m.granted) for m in self._idle_others(but))

    def _grant(self, model: Model) -> None:
        model.granted = model.target
        model.load_begun = False
        self._keep_load_queue(model)

    def _look_at_grants(self) -> None:
        while self.grant_queue:
            head = self.grant_queue[0]
            if head.weights(head.target) - head.weights(head.granted) > self._free():
                return
            self.grant_queue.pop(0)
            self._grant(head)

    def _can_take(self, model: Model, blocks: int) -> bool:
        available = self._free() - self._promised() + self._idle_bytes(model)
        return blocks * model.block_bytes <= available

    def _take(self, request: Request, blocks: int) -> bool:
        """Take KV blocks on the device; evict idle models where that makes it possible."""
        model = self.models[request.model]
        if not self._can_take(model, blocks):
            return False
        while blocks * model.block_bytes > self._free() - self._promised():
            self._evict_one(model)
        model.kv_blocks += blocks
        return True

    def _evict_one(self, but: Model) -> None:
        victim = min(self._idle_others(but), key=attrgetter("gdsf_priority", "index"))
        self.gdsf_clock = victim.gdsf_priority
        victim.target = victim.granted = victim.landed = 0
        victim.idle_evictions += 1

    def _use(self, model: Model) -> None:
        layers = model.pieces - 1
        load_ns = model.load_fixed_ns + model.load_base_ns + layers * model.load_layer_ns
        gigabytes = model.weights(model.pieces) / 1e9
        model.gdsf_uses += 1.0
        model.gdsf_priority = self.gdsf_clock + model.gdsf_uses * (load_ns * 1e-9) / gigabytes

    # --- 4. The link ----------------------------------------------------------------------------

    def _keep_load_queue(self, model: Model) -> None:
        """Put the model into the load queue or out of it: it is in while a piece is missing."""
        missing = model.landed < min(model.target, model.granted)
        if missing and model not in self.load_queue:
            self.load_queue.append(model)
        elif not missing and model in self.load_queue:
            self.load_queue.remove(model)

    def _start_transfers(self) -> None:
        if self.h2d is None:
            self._start_host_to_device()
        if self.d2h is None and self.save_queue:
            request = self.save_queue.pop(0)
            model = self.models[request.model]
            duration = model.save_fixed_ns + int(request.blocks * model.save_block_ns + 0.5)
            self.d2h = Transfer(0, model, duration, self.now_ns + duration, request)

    def _start_host_to_device(self) -> None:
        streaming = self.link_bound
        if streaming is not None and (streaming.abandoned or streaming.layers == 0):
            streaming = None
        if self.restore_queue:
            request = self.restore_queue.pop(0)
            model = self.models[request.model]
            duration = model.restore_fixed_ns + int(request.blocks * model.restore_block_ns + 0.5)
            end = self.now_ns + duration
            self.h2d = Transfer(st.LINK_RESTORE, model, duration, end, request)
        elif streaming and not (self.load_queue and self.h2d_turn == st.LINK_STREAM):
            model = streaming.model
            fixed = 0 if streaming.fixed_paid else model.stream_fixed_ns
            duration = fixed + model.stream_layer_ns
            streaming.fixed_paid = True
            end = self.now_ns + duration
            self.h2d_turn = st.LINK_STREAM
            self.h2d = Transfer(st.LINK_STREAM, model, duration, end, iteration=streaming)
        elif self.load_queue:
            model = self.load_queue[0]
            fixed = 0 if model.load_begun else model.load_fixed_ns
            piece = model.load_layer_ns if model.landed else model.load_base_ns
            duration = fixed + piece
            model.load_begun = True
            self.h2d_turn = st.LINK_LOAD
            self.h2d = Transfer(st.LINK_LOAD, model, duration, self.now_ns + duration)

    def _end_host_to_device(self, transfer: Transfer) -> None:
        model, request = transfer.model, transfer.request
        self.h2d = None
        self.h2d_busy_ns += transfer.duration_ns
        if transfer.kind == st.LINK_LOAD:
            model.landed += 1
            model.load_bytes += model.layer_bytes if model.landed > 1 else model.base_bytes
            self._keep_load_queue(model)
            if model.landed == model.target:  # the load has ended
                model.loads += 1
                model.loaded_ns = self.now_ns
                self._ask_soon()
        elif transfer.iteration is not None:
            transfer.iteration.layers -= 1  # lost when that iteration was abandoned
            model.stream_bytes += model.layer_bytes
        elif request is not None:
            model.kv_restore_bytes += request.blocks * model.block_bytes
            if model.target == 0:
                model.kv_blocks -= request.blocks
                request.state = st.SAVED
            else:
                self.host_kv_bytes -= request.blocks * model.block_bytes
                request.state = st.JOINING
            self._ask_soon()

    def _end_device_to_host(self, transfer: Transfer) -> None:
        model, request = transfer.model, transfer.request
        assert request is not None
        self.d2h = None
        self.d2h_busy_ns += transfer.duration_ns
        model.kv_save_bytes += request.blocks * model.block_bytes
        model.kv_blocks -= request.blocks
        request.state = st.SAVED
        self._ask_soon()

    # --- 5. Requests ----------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        model = self.models[request.model]
        if len(model.queue) >= st.QUEUE_LIMIT:
            request.state, request.finish_ns = st.REFUSED, self.now_ns
            self._miss(request, st.MISS_REFUSED)
        else:
            request.state = st.QUEUED
            model.queue.append(request)
            self._change_urgency(1e9 / request.isolated_ns)
        self._ask_soon()

    def _head(self, model: Model) -> Request | None:
        in_time = [r for r in model.queue if r.can_meet_ttft(self.now_ns)]
        return next(iter(in_time or model.queue), None)

    @staticmethod
    def _admission_blocks(request: Request) -> int:
        return blocks_for(request.prefill_tokens) + 1

    def _to_prefill(self, model: Model) -> Request | None:
        """Return the sequence in prefill, or the head where it can be admitted."""
        for request in model.begun_in(st.PREFILL):
            return request
        head = self._head(model)
        if head is None or len(model.begun) >= st.BATCH_LIMIT or model.begun_in(st.SAVED):
            return None
        return head if self._can_take(model, self._admission_blocks(head)) else None

    def _admit(self, model: Model, request: Request) -> None:
        self._take(request, self._admission_blocks(request))
        request.blocks = self._admission_blocks(request)
        request.state, request.prefilled = st.PREFILL, 0
        model.queue.remove(request)
        insort(model.begun, request, key=attrgetter("index"))
        self._use(model)

    def _queue_again(self, model: Model, request: Request) -> None:
        model.kv_blocks -= request.blocks
        request.state, request.blocks, request.prefilled = st.QUEUED, 0, 0
        model.begun.remove(request)
        insort(model.queue, request, key=attrgetter("index"))

    def _preempt(self, model: Model, request: Request) -> None:
        model.seg_left = 0
        model.preempted += 1
        request.preemptions += 1
        blocks = blocks_for(request.kv_tokens)
        model.kv_blocks -= request.blocks - blocks
        request.blocks = blocks
        if self.host_kv_bytes + blocks * model.block_bytes <= self.host_kv_limit_bytes:
            self.host_kv_bytes += blocks * model.block_bytes
            request.state = st.SAVING
            self.save_queue.append(request)
        else:
            model.kv_dropped += 1
            self._queue_again(model, request)

    def _suspend(self, model: Model) -> None:
        for request in model.begun_in(st.PREFILL):
            self._queue_again(model, request)
        for request in model.begun_in(st.DECODE):
            self._preempt(model, request)
        for request in model.begun_in(st.RESTORING):
            if request in self.restore_queue:
                self.restore_queue.remove(request)
                model.kv_blocks -= request.blocks
                request.state = st.SAVED

    def _join(self, model: Model) -> None:
        for iteration in (self.gpu, self.link_bound):
            if iteration and iteration.model is model and iteration.kind == st.DECODE_STEP:
                return
        for request in model.begun_in(st.JOINING):
            request.state = st.DECODE
            model.seg_left = 0

    def _look_at_restores(self, model: Model) -> None:
        if model.paused or not model.granted >= model.target >= 1:
            return
        for request in model.begun_in(st.SAVED):
            if not self._take(request, request.blocks):
                return
            request.state = st.RESTORING
            self.restore_queue.append(request)

    def _finish(self, model: Model, request: Request) -> None:
        model.kv_blocks -= request.blocks
        request.state, request.blocks, request.finish_ns = st.DONE, 0, self.now_ns
        model.begun.remove(request)
        self._scan_for_miss(request)
        self._change_urgency(-1e9 / request.isolated_ns)
        if not any(m.has_requests for m in self.models):
            self.urgency = 0.0
        self._ask_soon()

    # --- 6. Iterations --------------------------------------------------------------------------

    def _runnable(self, model: Model) -> bool:
        if model.target < 1 or model.landed < 1 or model.paused:
            return False
        if not model.begun_in(st.DECODE) and self._to_prefill(model) is None:
            return False  # no work
        resident = model.landed == model.pieces
        return resident or (model.granted >= model.target and self.link_bound is None)

    def _would_prefill(self, model: Model) -> bool:
        decode_first = model.decode_due and model.begun_in(st.DECODE)
        return not decode_first and self._to_prefill(model) is not None

    def _next_model(self) -> Model | None:
        """Order among models: the one that the idle device is given to."""
        after = self.rr_last + 1
        runnable = [m for m in self.models[after:] + self.models[:after] if self._runnable(m)]
        if not runnable:
            return None
        if self.focus in runnable:
            return self.focus
        if self.dispatch == st.DISPATCH_EDF:
            deadlines = []
            for model in filter(self._would_prefill, runnable):
                request = self._to_prefill(model)
                if request is not None and request.can_meet_ttft(self.now_ns):
                    deadlines.append((request.deadline_ns, model.index))
            if deadlines:
                return self.models[min(deadlines)[1]]
        if self.dispatch == st.DISPATCH_LAS:
            return min(runnable, key=self._attained_service)  # the first of equals
        return runnable[0]

    def _attained_service(self, model: Model) -> int:
        if self._would_prefill(model):
            return 0
        return min(request.generated for request in model.begun_in(st.DECODE))

    def _give_device(self) -> None:
        while self.gpu is None:
            model = self._next_model()
            if model is None:
                return
            if self._would_prefill(model):
                self._start_prefill_chunk(model)
            elif model.seg_left > 0 or self._settle(model):
                self._start_decode_step(model)

    def _start_prefill_chunk(self, model: Model) -> None:
        request = self._to_prefill(model)
        assert request is not None
        if request.state == st.QUEUED:
            self._admit(model, request)
        left = request.prefill_tokens - request.prefilled
        resident = model.landed == model.pieces
        tokens = min(st.CHUNK_TOKENS, left) if resident else left
        table = self.prefill_tables[model.profile]
        duration = prefill_chunk_ns(table, model.prefill_scale, request.prefilled, tokens)
        self._start(st.PREFILL_CHUNK, model, [request], tokens, duration)

    def _settle(self, model: Model) -> bool:
        """Take blocks for a segment and fix its price; False when no sequence decodes any more."""
        for request in model.begun_in(st.DECODE):
            while request.state == st.DECODE:
                missing = blocks_for(request.kv_tokens + st.SEGMENT_STEPS) - request.blocks
                if missing <= 0:
                    break
                if self._take(request, missing):
                    request.blocks += missing
                    break
                self._preempt(model, model.begun_in(st.DECODE)[-1])
        batch = model.begun_in(st.DECODE)
        if not batch:
            return False
        context = sum(request.kv_tokens for request in batch)
        table = self.decode_tables[model.profile]
        model.step_ns = decode_ns(table, model.decode_scale, len(batch), context)
        model.seg_left = st.SEGMENT_STEPS
        return True

    def _start_decode_step(self, model: Model) -> None:
        model.decode_due = False
        batch = model.begun_in(st.DECODE)
        self._start(st.DECODE_STEP, model, batch, len(batch), model.step_ns)

    def _start(
        self, kind: int, model: Model, batch: list[Request], tokens: int, duration: int
    ) -> None:
        end, link_bound = self.now_ns + duration, model.landed < model.pieces
        need, layers = model.target, model.pieces - model.target
        self.rr_last = model.index
        self.gpu = Iteration(
            kind, model, batch, tokens, duration, end, link_bound, need=need, layers=layers
        )
        if link_bound:
            self.link_bound = self.gpu

    def _end_compute(self, iteration: Iteration) -> None:
        self.gpu = None
        iteration.model.gpu_busy_ns += iteration.duration_ns
        if not iteration.link_bound:
            self._end_iteration(iteration)
        elif iteration.abandoned:
            self._drop(iteration)
        else:
            iteration.computed = True

    def _can_end(self, iteration: Iteration) -> bool:
        bytes_there = iteration.model.landed >= iteration.need and iteration.layers == 0
        return iteration.computed and bytes_there

    def _end_iteration(self, iteration: Iteration) -> None:
        model = iteration.model
        if iteration.kind == st.PREFILL_CHUNK:
            (request,) = iteration.batch
            request.prefilled += iteration.tokens
            model.prefill_tokens += iteration.tokens
            model.decode_due = True
            if request.prefilled == request.prefill_tokens:
                self._give_token(model, request)
                if request.state == st.PREFILL:  # not done: it joins the decode batch
                    request.state = st.DECODE
                    model.seg_left = 0
        else:
            model.decode_tokens += iteration.tokens
            model.seg_left -= 1
            for request in iteration.batch:
                self._give_token(model, request)
                if request.state == st.DONE:  # it leaves the decode batch
                    model.seg_left = 0

    def _give_token(self, model: Model, request: Request) -> None:
        request.generated += 1
        if request.first_ns < 0:
            request.first_ns = self.now_ns
        if request.generated == request.output:
            self._finish(model, request)

    def _abandon(self, model: Model) -> None:
        """Abandon the link-bound iteration of the model: at once, or at the end of its compute."""
        iteration = self.link_bound
        if iteration is not None and iteration.model is model:
            iteration.abandoned = True
            if iteration.computed:
                self._drop(iteration)

    def _drop(self, iteration: Iteration) -> None:
        self.link_bound = None
        iteration.model.abandoned += 1

    # --- 7. One instant -------------------------------------------------------------------------

    def advance(self) -> None:
        """Run to the next decision at which some verb is legal, or to the end."""
        self.misses, self.latency_area = 0, 0.0
        if self.asking:
            self.asking = False
            self._leave_instant()
        while not self.done:
            instant = min(self._instants())
            if instant >= self.horizon_ns:
                self.now_ns = self.horizon_ns
                self.done = 2
            else:
                self.now_ns = instant
                self._instant()
            if self.asking or self.done:
                self._account()
                return

    def _instants(self) -> Iterator[int]:
        for busy in (self.gpu, self.h2d, self.d2h):
            if busy is not None:
                yield busy.end_ns
        for request in self.requests:
            if request.state == st.UNARRIVED:
                yield request.arrival_ns
                break
        yield self.due_ns
        yield self.timer_ns

    def _instant(self) -> None:
        now = self.now_ns
        if self.h2d is not None and self.h2d.end_ns == now:  # 1
            self._end_host_to_device(self.h2d)
        if self.d2h is not None and self.d2h.end_ns == now:  # 2
            self._end_device_to_host(self.d2h)
        if self.gpu is not None and self.gpu.end_ns == now:  # 3
            self._end_compute(self.gpu)
        if self.link_bound is not None and self._can_end(self.link_bound):  # 4
            iteration, self.link_bound = self.link_bound, None
            self._end_iteration(iteration)
        for request in self.requests:  # 5
            if request.state == st.UNARRIVED and request.arrival_ns <= now:
                self._arrive(request)
        self._look_at_memory()  # 6
        if all(request.state in (st.DONE, st.REFUSED) for request in self.requests):  # 7
            self.done = 1
            return
        if now >= min(self.due_ns, self.timer_ns):  # 8
            self.due_ns, self.timer_ns = NEVER, now + self.interval_ns
            self.acted.clear()
            if any(self.legal_actions()[1:]):
                self.asking = True
                return
        self._leave_instant()

    def _look_at_memory(self) -> None:
        """Step 6."""
        if self.focus is not None and not self.focus.has_requests:
            self.focus = None
        for model in self.models:
            self._join(model)
            if model.target == 0 and not self._computes(model):
                self._suspend(model)
            if model.granted > model.target and self._at_rest(model):
                model.granted = model.target
                model.landed = min(model.landed, model.target)
        self._look_at_grants()
        for model in self.models:
            self._look_at_restores(model)

    def _leave_instant(self) -> None:
        """Steps 9 and 10, and once more with step 6 for each model put out of a blocked node."""
        self._give_device()
        self._start_transfers()
        moving = (self.gpu, self.link_bound, self.h2d, self.d2h)
        while moving == (None, None, None, None) and self.due_ns == NEVER:
            waiting = [m for m in self.models if m.target and not m.paused and m.has_requests]
            if not waiting:
                return
            model = min(waiting, key=attrgetter("gdsf_priority", "index"))
            model.unblocked += 1
            self._put_out(model)
            self._look_at_memory()
            self._give_device()
            self._start_transfers()
            moving = (self.gpu, self.link_bound, self.h2d, self.d2h)

    def _ask_soon(self) -> None:
        self.due_ns = min(self.due_ns, self.now_ns + self.latency_ns)

    # --- 8. Verbs -------------------------------------------------------------------------------

    def act(self, action: int) -> None:
        """Apply a legal verb; advance on WAIT, on what is illegal, and when no verb is legal then.

        Args:
            action: 0 is WAIT, ``1 + m * V + v`` is verb ``v`` of the set's ``V`` on model ``m``.
        """
        if action == 0 or self.done:
            self.advance()
            return
        m, v = divmod(action - 1, len(self.verbs))
        if not (0 <= m < len(self.models) and self.legal(m, self.verbs[v])):
            self.illegal_actions += 1
            self.advance()
            return
        self.misses, self.latency_area = 0, 0.0
        self.acted.add((m, GROUP[self.verbs[v]]))
        self._apply(self.models[m], self.verbs[v])
        self._look_at_memory()
        if not any(self.legal_actions()[1:]):
            self.advance()

    def legal_actions(self) -> list[bool]:
        """Return which of the ``1 + n_models * V`` actions are legal; WAIT always is."""
        return [True] + [self.legal(m.index, verb) for m in self.models for verb in self.verbs]

    def legal(self, m: int, verb: str) -> bool:
        """Whether the verb is in the verb set and legal on model ``m`` now."""
        model = self.models[m]
        if verb not in self.verbs or (m, GROUP[verb]) in self.acted:
            return False
        if not self.full_verbs:
            if verb == "level100" and not (
                model.lacks_weights or (self.prefetch and model.target == 0)
            ):
                return False
            others = [other for other in self.models if other is not model]
            if verb in ("out", "pause") and not any(other.lacks_weights for other in others):
                return False
        if verb in LEVELS:
            pieces = model.level(LEVELS[verb])
            return model.target != pieces and self._fits(model, pieces)
        return {
            "out": model.target > 0,
            "pause": not model.paused and model.target > 0 and model.has_requests,
            "resume": model.paused,
            "focus": model.has_requests or self.focus is model,
        }[verb]

    def _need(self, model: Model, pieces: int) -> int:
        """Bytes for so many pieces, and for the KV of the first request it would serve."""
        need = max(0, model.weights(pieces) - model.weights(model.granted))
        head = self._head(model)
        for request in model.begun_in(st.SAVED):
            return need + request.blocks * model.block_bytes
        return need + (self._admission_blocks(head) * model.block_bytes if head else 0)

    def _room(self, model: Model) -> int:
        return self._free() + self._releasing(but=model) - self._promised(but=model)

    def _fits(self, model: Model, pieces: int) -> bool:
        if pieces <= model.granted:
            return True
        return self._need(model, pieces) <= self._room(model) + self._idle_bytes(model)

    def _apply(self, model: Model, verb: str) -> None:
        if verb in LEVELS:
            self._set_level(model, model.level(LEVELS[verb]))
        elif verb == "out":
            model.outs += 1
            self._put_out(model)
        elif verb == "focus":
            self.focus = None if self.focus is model else model
        else:
            model.paused = verb == "pause"

    def _set_level(self, model: Model, pieces: int) -> None:
        if pieces > model.granted:
            while self._need(model, pieces) > self._room(model):
                self._evict_one(model)
        model.target = pieces
        self._abandon(model)
        if pieces <= model.granted:
            if model in self.grant_queue:
                self.grant_queue.remove(model)
        elif model not in self.grant_queue:
            need = model.weights(pieces) - model.weights(model.granted)
            if not self.grant_queue and need <= self._free():
                self._grant(model)
            else:
                self.grant_queue.append(model)
        self._keep_load_queue(model)

    def _put_out(self, model: Model) -> None:
        model.target, model.paused = 0, False
        if model in self.grant_queue:
            self.grant_queue.remove(model)
        self._keep_load_queue(model)
        self._abandon(model)  # suspended, and its weights freed, by step 6

    # --- 9. Misses and reward -------------------------------------------------------------------

    def _miss(self, request: Request, why: int) -> None:
        request.miss = why
        self.misses += 1

    def _scan_for_miss(self, request: Request) -> None:
        now, first = self.now_ns, request.first_ns
        if request.miss != st.MISS_NONE:
            return
        if (now if first < 0 else first) > request.deadline_ns:
            self._miss(request, st.MISS_TTFT)
        elif first >= 0 and 0 < request.tpot_ns * (request.output - 1) < now - first:
            self._miss(request, st.MISS_TPOT)

    def _change_urgency(self, change: float) -> None:
        elapsed = self.now_ns - self.urgency_since_ns
        self.latency_area += self.urgency * elapsed * 1e-9
        self.urgency_since_ns = self.now_ns
        self.urgency += change

    def _account(self) -> None:
        """Bring the reward up to now: when the policy is asked, and at the end."""
        self._change_urgency(0.0)
        for model in self.models:
            for request in model.queue + model.begun:
                self._scan_for_miss(request)

    # --- 10. Invariants -------------------------------------------------------------------------

    def check(self) -> None:
        """Assert invariants 1 to 5 as far as one instant shows them."""
        for model in self.models:
            requests = [r for r in self.requests if r.model == model.index]
            queued = [r for r in requests if r.state == st.QUEUED]
            begun = [r for r in requests if st.PREFILL <= r.state <= st.JOINING]
            assert model.queue == queued and model.begun == begun  # 1, in order of arrival
            assert len(begun) <= st.BATCH_LIMIT and len(model.begun_in(st.PREFILL)) <= 1
            on_device = [r for r in begun if r.state != st.SAVED]
            assert model.kv_blocks == sum(r.blocks for r in on_device)  # 3
            assert 0 <= model.landed <= model.granted <= model.pieces
            assert model.target <= model.granted or model in self.grant_queue
            missing = model.landed < min(model.target, model.granted)
            assert missing == (model in self.load_queue)
        moving = [t.request for t in (self.h2d, self.d2h) if t and t.request]
        moving += self.restore_queue + self.save_queue
        for request in self.requests:
            assert moving.count(request) == (request.state in (st.SAVING, st.RESTORING))  # 1
            assert (request.state == st.UNARRIVED) <= (request.arrival_ns >= self.now_ns)
            assert (request.state == st.DONE) == (request.generated == request.output)
            assert (request.first_ns >= 0) == (request.generated > 0)  # 4
            if st.DECODE <= request.state <= st.JOINING:
                assert request.blocks >= blocks_for(request.kv_tokens)
                assert request.prefilled >= request.prompt and request.generated > 0  # 4
            elif request.state != st.PREFILL:
                assert request.blocks == 0
        hosted = [r for r in self.requests if st.SAVING <= r.state <= st.RESTORING]
        host = sum(r.blocks * self.models[r.model].block_bytes for r in hosted)
        assert self.host_kv_bytes == host <= self.host_kv_limit_bytes  # 3
        assert self._free() >= 0  # 3
        for busy in (self.gpu, self.h2d, self.d2h):
            assert busy is None or busy.end_ns >= self.now_ns  # 2
        for iteration in filter(None, (self.gpu, self.link_bound)):  # 4
            assert iteration.model.landed == iteration.model.pieces or (
                iteration is self.link_bound and iteration.model.landed >= 1
            )
        for busy_ns in (sum(m.gpu_busy_ns for m in self.models), self.h2d_busy_ns):
            assert busy_ns <= self.now_ns  # 5
        assert self.d2h_busy_ns <= self.now_ns  # 5

    def state(self) -> dict[str, Any]:
        """Return every dynamic quantity, by its name in NODE (models) and REQUEST (requests)."""
        gpu, bound, h2d, d2h = self.gpu, self.link_bound, self.h2d, self.d2h
        return {
            **{name: getattr(self, name) for name in NODE_STATE},
            **{name: [getattr(m, name) for m in self.models] for name in MODEL_STATE},
            "queue": [[r.index for r in m.queue] for m in self.models],
            "begun": [[(r.index, r.state) for r in m.begun] for m in self.models],
            "focus": self.focus.index if self.focus else -1,
            "grant_queue": [m.index for m in self.grant_queue],
            "load_queue": [m.index for m in self.load_queue],
            "restore_queue": [r.index for r in self.restore_queue],
            "save_queue": [r.index for r in self.save_queue],
            "gpu_kind": gpu.kind if gpu else st.IDLE,
            "gpu_model": gpu.model.index if gpu else -1,
            "gpu_end_ns": gpu.end_ns if gpu else NEVER,
            "lb_kind": bound.kind if bound else st.IDLE,
            "lb_model": bound.model.index if bound else -1,
            "lb_computed": bool(bound and bound.computed),
            "lb_abandoned": bool(bound and bound.abandoned),
            "lb_need": bound.need if bound else 0,
            "lb_layers": bound.layers if bound and not bound.abandoned else 0,
            "h2d_kind": h2d.kind if h2d else st.LINK_IDLE,
            "h2d_model": h2d.model.index if h2d else -1,
            "h2d_request": h2d.request.index if h2d and h2d.request else -1,
            "h2d_end_ns": h2d.end_ns if h2d else NEVER,
            "d2h_request": d2h.request.index if d2h and d2h.request else -1,
            "d2h_end_ns": d2h.end_ns if d2h else NEVER,
            "requests": {name: [getattr(r, name) for r in self.requests] for name in REQUEST_STATE},
        }
