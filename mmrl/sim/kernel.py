"""The compiled simulator: time, the device, and the instants of a node.

Sections 6 and 7 of ``docs/semantics.md`` over the arrays of ``mmrl.node.state``; section 4 is
``mmrl.sim.link``. What makes it fast without changing any instant that matters: runs of decode
steps of the resident models are advanced in whole round-robin cycles (``run_cycles``).
"""

import numpy as np
import numpy.typing as npt

from mmrl.node.actions import (
    WAIT,
    abandon_link_bound,
    apply,
    put_out,
    settle_memory,
    some_verb_legal,
)
from mmrl.node.jit import jit, jit_arrays
from mmrl.node.memory import has_work, take_blocks
from mmrl.node.observe import RATE_LONG_S, RATE_SHORT_S
from mmrl.node.requests import (
    admit,
    can_admit,
    can_meet_ttft,
    ceil_div,
    change_batch,
    change_urgency,
    count_misses,
    enqueue,
    find_head,
    finish,
    flush_steps,
    head_request,
    kv_tokens,
    preempt,
)
from mmrl.node.state import (
    BLOCK_TOKENS,
    CHUNK_TOKENS,
    DECODE,
    DECODE_STEP,
    DISPATCH_EDF,
    DISPATCH_LAS,
    IDLE,
    LINK_IDLE,
    LINK_STREAM,
    MISS_REFUSED,
    NEVER,
    PREFILL_CHUNK,
    QUEUE_LIMIT,
    REFUSED,
    SEGMENT_STEPS,
    STREAM_CHUNK_TOKENS,
    UNARRIVED,
    CostTable,
    Nodes,
    Record,
)
from mmrl.profiles.costs import decode_ns, prefill_chunk_ns
from mmrl.sim.link import (
    ask_decision,
    catch_up,
    end_d2h,
    end_h2d,
    link_event_ns,
    links_pending,
    slowed_ns,
    start_links,
)


@jit
def start(s: Record, r: Nodes) -> None:
    """Set the dynamic state of a node whose constants are filled: empty, at time 0."""
    s.timer_ns = s.interval_ns
    s.decided_ns = -s.gap_ns
    s.due_ns = NEVER
    s.focus = -1
    s.gpu_end_ns = NEVER
    s.h2d_end_ns = NEVER
    s.d2h_end_ns = NEVER
    s.d2h_request = -1
    s.h2d_turn = LINK_STREAM
    s.rr_last = -1
    s.next_miss_ns = NEVER
    for m in range(s.n_models):
        s.prefilling[m] = -1
        s.head[m] = -1
        s.rate_ns[m] = -1
        s.used_ns[m] = -1
        s.loaded_ns[m] = -1
    for i in range(s.n_requests):
        r[i].first_ns = -1
        r[i].finish_ns = -1
        r[i].state = UNARRIVED


# --- the device ---------------------------------------------------------------------------------


@jit
def has_prefill(s: Record, r: Nodes, m: int) -> bool:
    """Return whether model ``m`` has a prefill to compute: one begun, or a head to admit."""
    return bool(s.prefilling[m] >= 0 or can_admit(s, r, m))


@jit
def decodes_next(s: Record, m: int) -> bool:
    """Return whether a decode step of model ``m`` goes before its next prefill chunk."""
    return bool(s.decode_due[m] == 1 and s.decoding[m] > 0)


@jit
def runnable(s: Record, m: int) -> bool:
    """Return whether model ``m`` could run an iteration now if it had work."""
    if s.target[m] == 0 or s.landed[m] == 0 or s.paused[m] == 1:
        return False
    if s.lb_kind == IDLE:
        return bool(s.landed[m] == s.pieces[m] or s.granted[m] >= s.target[m])
    # A live link-bound iteration may end some time after its last bytes.
    return bool(s.landed[m] == s.pieces[m] and s.lb_model != m)


@jit
def least_generated(s: Record, r: Nodes, m: int) -> int:
    """Return the smallest number of tokens generated among the decoding sequences."""
    least = 2**31
    for k in range(s.begun_len[m]):
        request = r[s.begun[m, k]]
        if request.state == DECODE:
            least = min(least, request.generated)
    return int(least + s.seg_steps[m])


@jit
def choose_model(s: Record, r: Nodes, ready: npt.NDArray[np.int8]) -> int:
    """Return the runnable model that gets the device, or -1.

    ``ready[m]`` is written: 0 not runnable, 1 only decodes, 2 has a prefill (and may decode first).
    """
    some = False
    for m in range(s.n_models):
        ready[m] = 0
        if runnable(s, m):
            if has_prefill(s, r, m):
                ready[m] = 2
                some = True
            elif s.decoding[m] > 0:
                ready[m] = 1
                some = True
    if not some:
        return -1
    if s.focus >= 0 and ready[s.focus] > 0:
        return int(s.focus)
    chosen = -1
    if s.dispatch == DISPATCH_EDF:
        earliest = NEVER
        for m in range(s.n_models):
            if ready[m] == 2 and not decodes_next(s, m):
                i = s.prefilling[m] if s.prefilling[m] >= 0 else head_request(s, r, m)
                deadline = r[i].arrival_ns + r[i].ttft_ns
                if can_meet_ttft(s, r[i]) and deadline < earliest:
                    earliest = deadline
                    chosen = m
        if chosen >= 0:
            return chosen
    least = 2**31
    for step in range(1, s.n_models + 1):
        m = (s.rr_last + step) % s.n_models
        if ready[m] > 0:
            if s.dispatch != DISPATCH_LAS:
                return int(m)
            prefills = ready[m] == 2 and not decodes_next(s, m)
            attained = 0 if prefills else least_generated(s, r, m)
            if chosen < 0 or attained < least:
                least = attained
                chosen = m
    return chosen


@jit
def settle_batch(s: Record, r: Nodes, m: int, decode_tables: CostTable) -> bool:
    """Give the decode batch its blocks for the next segment and price its step.

    Sequences are preempted, youngest first, when there are no blocks; False if none is left.
    """
    flush_steps(s, r, m)
    k = 0
    while k < s.begun_len[m]:
        i = s.begun[m, k]
        if r[i].state != DECODE:
            k += 1
            continue
        more = ceil_div(kv_tokens(r[i]) + SEGMENT_STEPS, BLOCK_TOKENS) - r[i].blocks
        if more <= 0 or take_blocks(s, m, more):
            r[i].blocks += max(0, more)
            k += 1
            continue
        last = s.begun_len[m] - 1
        while r[s.begun[m, last]].state != DECODE:
            last -= 1
        preempt(s, r, m, s.begun[m, last])
    if s.decoding[m] == 0:
        return False
    context = 0
    finish_steps = 2**31
    for k in range(s.begun_len[m]):
        request = r[s.begun[m, k]]
        if request.state == DECODE:
            context += kv_tokens(request)
            finish_steps = min(finish_steps, request.output - request.generated)
    s.seg_left[m] = SEGMENT_STEPS
    s.seg_finish[m] = finish_steps
    s.context_tokens[m] = context
    s.step_ns[m] = decode_ns(decode_tables[s.profile[m]], s.decode_scale[m], s.decoding[m], context)
    return True


@jit
def start_iteration(
    s: Record, r: Nodes, m: int, decode_tables: CostTable, prefill_tables: CostTable
) -> bool:
    """Start the next iteration of a runnable model; False if its batch dissolved instead."""
    link_bound = s.landed[m] < s.pieces[m]
    decodes = decodes_next(s, m) or not has_prefill(s, r, m)
    tokens = 0
    added = 0
    if decodes:
        if s.seg_left[m] == 0:
            if not settle_batch(s, r, m, decode_tables):
                return False
            added = s.settle_ns[m]
        s.decode_due[m] = 0
        duration = step_ns = s.step_ns[m]
    else:
        if s.prefilling[m] < 0:
            admit(s, r, m)
        request = r[s.prefilling[m]]
        tokens = request.prompt + request.generated - request.prefilled
        tokens = min(STREAM_CHUNK_TOKENS if link_bound else CHUNK_TOKENS, tokens)
        duration = prefill_chunk_ns(
            prefill_tables[s.profile[m]], s.prefill_scale[m], request.prefilled, tokens
        )
        step_ns = decode_ns(decode_tables[s.profile[m]], s.decode_scale[m], 1, 0)
    if not link_bound:
        duration = slowed_ns(s, m, duration, step_ns) + added
    s.gpu_kind = DECODE_STEP if decodes else PREFILL_CHUNK
    s.gpu_model = m
    s.gpu_tokens = tokens
    s.gpu_start_ns = s.now_ns
    s.gpu_end_ns = s.now_ns + duration
    s.gpu_link_bound = link_bound
    s.rr_last = m
    if link_bound:
        s.lb_kind = s.gpu_kind
        s.lb_model = m
        s.lb_tokens = tokens
        s.lb_computed = 0
        s.lb_abandoned = 0
        s.lb_need = s.target[m]
        s.lb_layers = s.pieces[m] - s.target[m]
        s.lb_fixed_paid = 0
        s.lb_id += 1
    return True


@jit
def finish_iteration(s: Record, r: Nodes, kind: int, m: int, tokens: int) -> None:
    """Give the tokens of an iteration that has ended to its sequences."""
    s.used_ns[m] = s.now_ns
    if kind == DECODE_STEP:
        s.decode_tokens[m] += s.decoding[m]
        s.seg_steps[m] += 1
        s.seg_left[m] -= 1
        if s.seg_steps[m] < s.seg_finish[m]:
            return
        flush_steps(s, r, m)
        k = 0
        while k < s.begun_len[m]:
            i = s.begun[m, k]
            if r[i].state == DECODE and r[i].generated >= r[i].output:
                change_batch(s, r, m, -1)
                finish(s, r, m, i)
            else:
                k += 1
        ask_decision(s)
        return
    i = s.prefilling[m]
    request = r[i]
    request.prefilled += tokens
    s.prefill_tokens[m] += tokens
    s.decode_due[m] = 1
    if request.prefilled < request.prompt + request.generated:
        return
    s.prefilling[m] = -1
    request.generated += 1
    if request.first_ns < 0:
        request.first_ns = s.now_ns
        if request.tpot_ns > 0:
            s.next_miss_ns = min(s.next_miss_ns, s.now_ns + request.tpot_ns * (request.output - 1))
    if request.generated >= request.output:
        finish(s, r, m, i)
        ask_decision(s)
    else:
        change_batch(s, r, m, 1)
        request.state = DECODE


@jit
def end_compute(s: Record, r: Nodes) -> None:
    """End the iteration that computes; a link-bound one goes on to wait for its bytes."""
    kind = s.gpu_kind
    m = s.gpu_model
    s.gpu_busy_ns[m] += s.gpu_end_ns - s.gpu_start_ns
    s.gpu_kind = IDLE
    s.gpu_end_ns = NEVER
    if not s.gpu_link_bound:
        finish_iteration(s, r, kind, m, s.gpu_tokens)
        return
    s.lb_computed = 1
    if s.lb_abandoned:
        abandon_link_bound(s, m)


@jit
def end_link_bound(s: Record, r: Nodes) -> None:
    """End the link-bound iteration in flight if its compute and its bytes are done."""
    if (
        s.lb_kind != IDLE
        and s.lb_computed
        and s.lb_layers == 0
        and s.landed[s.lb_model] >= s.lb_need
    ):
        kind = s.lb_kind
        s.lb_kind = IDLE
        finish_iteration(s, r, kind, s.lb_model, s.lb_tokens)


@jit
def run_cycles(s: Record, r: Nodes, ready: npt.NDArray[np.int8], until_ns: int) -> None:
    """Advance whole round-robin cycles of decode steps during which nothing else can happen.

    Applies when every runnable model only decodes, within its segment. Stops before a sequence
    finishes, a segment ends, a waiting head expires (which could change what can be admitted) and
    ``until_ns``, before which nothing changes on the link that would make steps slower or faster.
    """
    if s.dispatch == DISPATCH_LAS:
        return
    cycle = 0
    steps = SEGMENT_STEPS
    only = s.focus if s.focus >= 0 and ready[s.focus] > 0 else -1
    for m in range(s.n_models):
        if ready[m] == 0 or (only >= 0 and m != only):
            continue
        if ready[m] == 2 or s.landed[m] < s.pieces[m] or s.granted[m] > s.target[m]:
            return
        steps = min(steps, s.seg_left[m], s.seg_finish[m] - s.seg_steps[m] - 1)
        if steps <= 0:
            return
        cycle += slowed_ns(s, m, s.step_ns[m], s.step_ns[m])
    for m in range(s.n_models):
        if s.queue_len[m] > 0 and s.target[m] > 0:
            find_head(s, r, m)
            until_ns = min(until_ns, s.head_until_ns[m])
    cycles = min(steps, (until_ns - s.now_ns - 1) // cycle)
    if cycles <= 0:
        return
    ended = s.now_ns + (cycles - 1) * cycle
    for place in range(1, s.n_models + 1):
        m = (s.rr_last + place) % s.n_models
        if ready[m] == 0 or (only >= 0 and m != only):
            continue
        step_ns = slowed_ns(s, m, s.step_ns[m], s.step_ns[m])
        ended += step_ns
        s.used_ns[m] = ended
        s.decode_due[m] = 0
        s.seg_steps[m] += cycles
        s.seg_left[m] -= cycles
        s.decode_tokens[m] += cycles * s.decoding[m]
        s.gpu_busy_ns[m] += cycles * step_ns
    if only >= 0:
        s.rr_last = only
    s.now_ns = ended


# --- instants -----------------------------------------------------------------------------------


@jit
def other_event_ns(s: Record, r: Nodes) -> int:
    """Return the next instant but for the end of compute: transfers, arrival, decision."""
    instant = min(link_event_ns(s), s.d2h_end_ns, s.due_ns, s.timer_ns)
    if s.next_arrival < s.n_requests:
        instant = min(instant, r[s.next_arrival].arrival_ns)
    return int(instant)


@jit
def start_compute(
    s: Record,
    r: Nodes,
    ready: npt.NDArray[np.int8],
    decode_tables: CostTable,
    prefill_tables: CostTable,
    cycles: bool,
) -> None:
    """Give the idle device to a model, after the cycles in which nothing else happens."""
    while s.gpu_kind == IDLE:
        m = choose_model(s, r, ready)
        if m < 0:
            return
        if cycles and not links_pending(s):
            run_cycles(s, r, ready, min(other_event_ns(s, r), s.horizon_ns))
            catch_up(s, s.now_ns)
        start_iteration(s, r, m, decode_tables, prefill_tables)


@jit
def blocked_model(s: Record) -> int:
    """Return the model to put out because nothing on the node can move, or -1."""
    if (
        s.gpu_kind != IDLE
        or s.lb_kind != IDLE
        or s.h2d_kind != LINK_IDLE
        or s.d2h_request >= 0
        or s.due_ns != NEVER
    ):
        return -1
    victim = -1
    for m in range(s.n_models):
        if (
            s.target[m] >= 1
            and s.paused[m] == 0
            and s.pinned[m] == 0
            and has_work(s, m)
            and (victim < 0 or s.gdsf_priority[m] < s.gdsf_priority[victim])
        ):
            victim = m
    return victim


@jit
def start_work(
    s: Record,
    r: Nodes,
    ready: npt.NDArray[np.int8],
    decode_tables: CostTable,
    prefill_tables: CostTable,
    cycles: bool,
) -> None:
    """Start what can start at this instant (steps 9 and 10), unblocking the node if need be.

    ``cycles``: whether time may pass by whole cycles of decode steps; not on a live node.
    """
    start_compute(s, r, ready, decode_tables, prefill_tables, cycles)
    start_links(s, r)
    victim = blocked_model(s)
    while victim >= 0:
        s.unblocked[victim] += 1
        put_out(s, victim)
        settle_memory(s, r)
        start_compute(s, r, ready, decode_tables, prefill_tables, cycles)
        start_links(s, r)
        victim = blocked_model(s)


@jit
def decayed(rate: float, elapsed_ns: int, horizon_s: float) -> float:
    """Return an exponential average after ``elapsed_ns`` without arrivals."""
    return float(rate * np.exp(-elapsed_ns * 1e-9 / horizon_s))


@jit
def arrive(s: Record, r: Nodes) -> None:
    """Take in the requests that arrive at this instant."""
    while s.next_arrival < s.n_requests and r[s.next_arrival].arrival_ns <= s.now_ns:
        i = s.next_arrival
        s.next_arrival += 1
        request = r[i]
        m = request.model
        elapsed = s.now_ns - max(0, s.rate_ns[m])
        s.rate_short[m] = decayed(s.rate_short[m], elapsed, RATE_SHORT_S) + 1.0 / RATE_SHORT_S
        s.rate_long[m] = decayed(s.rate_long[m], elapsed, RATE_LONG_S) + 1.0 / RATE_LONG_S
        s.rate_ns[m] = s.now_ns
        if s.queue_len[m] >= QUEUE_LIMIT:
            request.state = REFUSED
            request.miss = MISS_REFUSED
            request.finish_ns = s.now_ns
            s.misses += 1
        else:
            s.in_system += 1
            change_urgency(s, 1e9 / request.isolated_ns)
            enqueue(s, r, m, i)
            s.next_miss_ns = min(s.next_miss_ns, request.arrival_ns + request.ttft_ns)
        ask_decision(s)


@jit
def settle_reward(s: Record, r: Nodes) -> None:
    """Bring the misses and the latency integral up to now."""
    count_misses(s, r)
    change_urgency(s, 0.0)


@jit
def next_decision(
    s: Record,
    r: Nodes,
    ready: npt.NDArray[np.int8],
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> None:
    """Let time pass to the next decision instant, or to the end of the episode (``s.done``)."""
    while True:
        start_work(s, r, ready, decode_tables, prefill_tables, True)
        instant = min(other_event_ns(s, r), s.gpu_end_ns)
        if instant >= s.horizon_ns:
            catch_up(s, s.horizon_ns)
            s.now_ns = s.horizon_ns
            s.done = 2
            return
        catch_up(s, instant)
        s.now_ns = instant
        if s.h2d_end_ns == instant:
            end_h2d(s, r)
        if s.d2h_end_ns == instant:
            end_d2h(s, r)
        if s.gpu_end_ns == instant:
            end_compute(s, r)
        end_link_bound(s, r)
        arrive(s, r)
        settle_memory(s, r)
        if s.in_system == 0 and s.next_arrival >= s.n_requests:
            s.done = 1
            return
        if min(s.due_ns, s.timer_ns) <= instant:
            s.due_ns = NEVER
            s.timer_ns = instant + s.interval_ns
            s.acted[:] = 0
            return


@jit_arrays
def advance(s: Record, r: Nodes, decode_tables: CostTable, prefill_tables: CostTable) -> None:
    """Let time pass to the next decision at which a verb is legal, or to the end of the episode."""
    ready = np.zeros(len(s.target), dtype=np.int8)
    next_decision(s, r, ready, decode_tables, prefill_tables)
    while not s.done and not some_verb_legal(s, r):
        next_decision(s, r, ready, decode_tables, prefill_tables)
    settle_reward(s, r)


@jit
def act(s: Record, r: Nodes, action: int) -> bool:
    """Begin a step with its action; return whether the next one is asked for at this instant."""
    s.misses = 0
    s.latency_area = 0.0
    s.decided_ns = s.now_ns
    s.decisions += 1
    return bool(action != WAIT and apply(s, r, action) and some_verb_legal(s, r))


@jit
def step(
    s: Record, r: Nodes, decode_tables: CostTable, prefill_tables: CostTable, action: int
) -> None:
    """Do one action. Time passes on WAIT, on an illegal action, and when no verb is legal after."""
    if not act(s, r, action):
        advance(s, r, decode_tables, prefill_tables)
