"""The state of the reference simulator: sections 2, 3, 9 and 10 of docs/semantics.md.

What a node holds, what memory is free, what is owed to the reward, and what must always be true.
``mmrl/sim/reference.py`` makes it move.
"""

from operator import attrgetter
from typing import Any

import numpy as np

from mmrl.node import state as st
from mmrl.node.state import CostTable, Record
from mmrl.sim.reference_objects import Iteration, Model, Request, Transfer, blocks_for

NEVER = int(st.NEVER)

REQUEST_CONSTANTS = (
    *("arrival_ns", "ttft_ns", "tpot_ns", "isolated_ns"),
    *("model", "prompt", "output"),
)
MODEL_CONSTANTS = (
    *("profile", "pieces", "base_bytes", "layer_bytes", "block_bytes"),
    *("load_fixed_ns", "load_base_ns", "load_layer_ns", "stream_fixed_ns", "stream_layer_ns"),
    *("save_fixed_ns", "save_block_ns", "restore_fixed_ns", "restore_block_ns"),
    *("beside_load", "beside_stream", "beside_save", "settle_ns"),
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


class ReferenceState:
    """One node as it stands, its memory and its reward; it knows nothing of time passing.

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
        self.gap_ns, self.reserve_bytes = int(node["gap_ns"]), int(node["reserve_bytes"])
        self.host_kv_limit_bytes = int(node["host_kv_limit_bytes"])
        self.dispatch, self.prefetch = int(node["dispatch"]), bool(node["prefetch"])
        self.full_verbs = bool(node["full_verbs"])
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
        self.asked_ns = -self.gap_ns  # instant at which the policy was last asked
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

    def _keep_load_queue(self, model: Model) -> None:
        """Put the model into the load queue or out of it: it is in while a piece is missing."""
        missing = model.landed < min(model.target, model.granted)
        if missing and model not in self.load_queue:
            self.load_queue.append(model)
        elif not missing and model in self.load_queue:
            self.load_queue.remove(model)

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
