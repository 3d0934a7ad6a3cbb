"""The reference simulator: docs/semantics.md as plain Python, one step at a time.

Every iteration, link piece and decode step is an object that starts at one instant and ends at
another; nothing is cached and nothing is skipped. The sections have the numbers and the words of
that page (2, 3, 9 and 10 are in ``reference_state.py``). ``mmrl/sim/kernel.py`` does the same
fast; a test holds the two equal bit for bit.
"""

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from mmrl.node import state as st
from mmrl.profiles.costs import decode_ns, prefill_chunk_ns
from mmrl.sim.reference_objects import Iteration, Model, Request, Transfer, blocks_for
from mmrl.sim.reference_state import NEVER, ReferenceState

# Section 8: the verbs of the two sets, and the group of each verb.
LEVELS = {"level0": 0.0, "level25": 0.25, "level50": 0.5, "level75": 0.75, "level100": 1.0}
FULL = ("out", *LEVELS, "pause", "resume", "focus")
CORE = ("out", "level100", "pause", "resume")
GROUP = dict.fromkeys(("out", *LEVELS), "residency") | {
    "pause": "run",
    "resume": "run",
    "focus": "focus",
}


class ReferenceNode(ReferenceState):
    """One node and its requests, from the first instant to the end of the episode."""

    @property
    def verbs(self) -> tuple[str, ...]:
        """The verb set of the scenario."""
        return FULL if self.full_verbs else CORE

    # --- 4. The link ----------------------------------------------------------------------------

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
            decoding = len(model.begun_in(st.DECODE))
            if not self._can_take(model, request.blocks + decoding + 1):
                return
            self._take(request, request.blocks)
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
            elif model.seg_left > 0:
                self._start_decode_step(model)
            elif self._settle(model):
                self._start_decode_step(model, model.settle_ns)

    def _start_prefill_chunk(self, model: Model) -> None:
        request = self._to_prefill(model)
        assert request is not None
        if request.state == st.QUEUED:
            self._admit(model, request)
        left = request.prefill_tokens - request.prefilled
        resident = model.landed == model.pieces
        tokens = min(st.CHUNK_TOKENS if resident else st.STREAM_CHUNK_TOKENS, left)
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

    def _start_decode_step(self, model: Model, added: int = 0) -> None:
        model.decode_due = False
        batch = model.begun_in(st.DECODE)
        self._start(st.DECODE_STEP, model, batch, len(batch), model.step_ns, added)

    def _start(
        self,
        kind: int,
        model: Model,
        batch: list[Request],
        tokens: int,
        duration: int,
        added: int = 0,
    ) -> None:
        link_bound = model.landed < model.pieces
        if not link_bound:
            step = model.step_ns
            if kind == st.PREFILL_CHUNK:
                table = self.decode_tables[model.profile]
                step = decode_ns(table, model.decode_scale, 1, 0)
            duration = int(duration + self._slow_share(model) * step + 0.5)
            duration += added
        end = self.now_ns + duration
        need, layers = model.target, model.pieces - model.target
        self.rr_last = model.index
        self.gpu = Iteration(
            kind, model, batch, tokens, duration, end, link_bound, need=need, layers=layers
        )
        if link_bound:
            self.link_bound = self.gpu

    def _slow_share(self, model: Model) -> float:
        """By which share of a decode step an iteration that starts now is longer than alone."""
        streaming, beside = self.link_bound, [0.0]
        if self.load_queue:
            beside.append(model.beside_load)
        if streaming is not None and not streaming.abandoned and streaming.layers > 0:
            beside.append(model.beside_stream)
        if self.save_queue or self.d2h is not None:
            beside.append(model.beside_save)
        return max(beside)

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
                self.asking, self.asked_ns = True, now
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
        soonest = max(self.now_ns + self.latency_ns, self.asked_ns + self.gap_ns)
        self.due_ns = min(self.due_ns, soonest)

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
            return need + (request.blocks + 1) * model.block_bytes
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
