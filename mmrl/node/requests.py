"""The requests of each model: its queue, its sequences that have begun, and preemption.

Section 5 of ``docs/semantics.md``, compiled, over the arrays of ``mmrl.node.state``.
"""

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.memory import could_take_blocks, count_use, drop_from, take_blocks
from mmrl.node.state import (
    BATCH_LIMIT,
    BLOCK_TOKENS,
    DECODE,
    DONE,
    JOINING,
    MISS_NONE,
    MISS_TPOT,
    MISS_TTFT,
    NEVER,
    PREFILL,
    QUEUED,
    RESTORING,
    SAVED,
    SAVING,
    Nodes,
    Record,
)


@jit
def ceil_div(a: int, b: int) -> int:
    """Return ``a / b`` rounded up, for positive integers."""
    return (a + b - 1) // b


@jit
def insert_sorted(places: npt.NDArray[np.int32], length: int, value: int) -> int:
    """Insert ``value`` into the ascending ``places[:length]``; return the new length."""
    k = length
    while k > 0 and places[k - 1] > value:
        places[k] = places[k - 1]
        k -= 1
    places[k] = value
    return length + 1


@jit
def can_meet_ttft(s: Record, request: Record) -> bool:
    """Return whether a waiting request can still meet its TTFT target, or has met it."""
    return bool(request.first_ns >= 0 or s.now_ns <= request.arrival_ns + request.ttft_ns)


@jit
def find_head(s: Record, r: Nodes, m: int) -> int:
    """Return the position in the queue of model ``m`` of the next request to serve, or -1.

    The scan is remembered until the queue changes or the request found can no longer meet its
    target.
    """
    if s.queue_len[m] == 0:
        return -1
    if s.head[m] >= 0 and s.now_ns <= s.head_until_ns[m]:
        return int(s.head[m])
    s.head[m] = 0
    s.head_until_ns[m] = NEVER
    for k in range(s.queue_len[m]):
        request = r[s.queue[m, k]]
        if can_meet_ttft(s, request):
            s.head[m] = k
            if request.first_ns < 0:
                s.head_until_ns[m] = request.arrival_ns + request.ttft_ns
            break
    return int(s.head[m])


@jit
def head_request(s: Record, r: Nodes, m: int) -> int:
    """Return the request at the head of the queue of model ``m``, or -1."""
    position = find_head(s, r, m)
    if position < 0:
        return -1
    return int(s.queue[m, position])


@jit
def enqueue(s: Record, r: Nodes, m: int, i: int) -> None:
    """Put request ``i`` into the queue of its model, in order of arrival."""
    at_end = s.queue_len[m] == 0 or s.queue[m, s.queue_len[m] - 1] < i
    head = s.head[m]
    s.queue_len[m] = insert_sorted(s.queue[m], s.queue_len[m], i)
    r[i].state = QUEUED
    if not at_end or head < 0 or not can_meet_ttft(s, r[s.queue[m, head]]):
        s.head[m] = -1


@jit
def admission_blocks(r: Nodes, i: int) -> int:
    """Return the KV blocks that request ``i`` takes at its admission."""
    return ceil_div(r[i].prompt + r[i].generated, BLOCK_TOKENS) + 1


@jit
def can_admit(s: Record, r: Nodes, m: int) -> bool:
    """Return whether the head of the queue of model ``m`` could be admitted now."""
    if s.queue_len[m] == 0 or s.begun_len[m] >= BATCH_LIMIT or s.saved[m] > 0:
        return False
    return could_take_blocks(s, m, admission_blocks(r, head_request(s, r, m)))


@jit
def admit(s: Record, r: Nodes, m: int) -> None:
    """Move the head of the queue of model ``m`` into prefill; ``can_admit`` holds."""
    i = head_request(s, r, m)
    blocks = admission_blocks(r, i)
    take_blocks(s, m, blocks)
    count_use(s, m)
    s.queue_len[m] = drop_from(s.queue[m], s.queue_len[m], i)
    s.head[m] = -1
    s.begun_len[m] = insert_sorted(s.begun[m], s.begun_len[m], i)
    r[i].state = PREFILL
    r[i].blocks = blocks
    r[i].prefilled = 0
    s.prefilling[m] = i


@jit
def flush_steps(s: Record, r: Nodes, m: int) -> None:
    """Write the decode steps of the current segment into the sequences of model ``m``."""
    if s.seg_steps[m] > 0:
        for k in range(s.begun_len[m]):
            request = r[s.begun[m, k]]
            if request.state == DECODE:
                request.generated += s.seg_steps[m]
        s.seg_finish[m] -= s.seg_steps[m]
        s.seg_steps[m] = 0


@jit
def change_batch(s: Record, r: Nodes, m: int, change: int) -> None:
    """Let a sequence join (+1) or leave (-1) the decode batch: its segment ends."""
    flush_steps(s, r, m)
    s.seg_left[m] = 0
    s.decoding[m] += change


@jit
def join_restored(s: Record, r: Nodes, m: int) -> None:
    """Let the restored sequences of model ``m`` into its decode batch (no step is in flight)."""
    for k in range(s.begun_len[m]):
        request = r[s.begun[m, k]]
        if request.state == JOINING:
            change_batch(s, r, m, 1)
            request.state = DECODE
    s.joining[m] = 0


@jit
def kv_tokens(request: Record) -> int:
    """Return the tokens in the KV cache of a decoding sequence (steps flushed)."""
    return int(request.prompt + request.generated - 1)


@jit
def unqueue_begun(s: Record, r: Nodes, m: int, i: int) -> None:
    """Return a sequence that has begun to the queue, its device blocks freed."""
    s.kv_blocks[m] -= r[i].blocks
    r[i].blocks = 0
    r[i].prefilled = 0
    s.begun_len[m] = drop_from(s.begun[m], s.begun_len[m], i)
    enqueue(s, r, m, i)


@jit
def preempt(s: Record, r: Nodes, m: int, i: int) -> None:
    """Stop a decoding sequence: save its KV to the host, or drop it where the host is full."""
    change_batch(s, r, m, -1)
    request = r[i]
    blocks = ceil_div(kv_tokens(request), BLOCK_TOKENS)
    s.kv_blocks[m] -= request.blocks - blocks
    request.blocks = blocks
    request.preemptions += 1
    s.preempted[m] += 1
    host_bytes = blocks * s.block_bytes[m]
    if s.host_kv_bytes + host_bytes <= s.host_kv_limit_bytes:
        s.host_kv_bytes += host_bytes
        request.state = SAVING
        s.saving_blocks[m] += blocks
        s.save_queue[s.save_len] = i
        s.save_len += 1
    else:
        s.kv_dropped[m] += 1
        unqueue_begun(s, r, m, i)


@jit
def suspend(s: Record, r: Nodes, m: int) -> None:
    """Stop every sequence of model ``m``, which is out and of which nothing computes."""
    if s.prefilling[m] >= 0:
        i = s.prefilling[m]
        s.prefilling[m] = -1
        unqueue_begun(s, r, m, i)
    k = 0
    while k < s.begun_len[m]:
        i = s.begun[m, k]
        if r[i].state == DECODE:
            preempt(s, r, m, i)
        if k < s.begun_len[m] and s.begun[m, k] == i:
            k += 1
    kept = 0
    for k in range(s.restore_len):
        i = s.restore_queue[k]
        if r[i].model == m:
            s.kv_blocks[m] -= r[i].blocks
            r[i].state = SAVED
            s.saved[m] += 1
        else:
            s.restore_queue[kept] = i
            kept += 1
    s.restore_len = kept


@jit
def restore_saved(s: Record, r: Nodes, m: int) -> None:
    """Queue saved sequences of model ``m`` for their restore, in order, while blocks last.

    Each must leave a block for every sequence that would decode, itself included: without that, the
    next settling of the batch would preempt it again at once.
    """
    for k in range(s.begun_len[m]):
        request = r[s.begun[m, k]]
        if request.state == SAVED:
            if not could_take_blocks(s, m, request.blocks + s.decoding[m] + 1):
                return
            take_blocks(s, m, request.blocks)
            request.state = RESTORING
            s.saved[m] -= 1
            s.restore_queue[s.restore_len] = s.begun[m, k]
            s.restore_len += 1


@jit
def certain_miss(request: Record, now_ns: int) -> int:
    """Return why the request has certainly missed its targets by ``now_ns``, or MISS_NONE."""
    deadline = request.arrival_ns + request.ttft_ns
    if request.first_ns < 0:
        return MISS_TTFT if now_ns > deadline else MISS_NONE
    if request.first_ns > deadline:
        return MISS_TTFT
    end = request.finish_ns if request.finish_ns >= 0 else now_ns
    if request.tpot_ns > 0 and end > request.first_ns + request.tpot_ns * (request.output - 1):
        return MISS_TPOT
    return MISS_NONE


@jit
def miss_ns(request: Record) -> int:
    """Return the last instant at which the request has not certainly missed, or NEVER."""
    if request.first_ns < 0:
        return int(request.arrival_ns + request.ttft_ns)
    if request.tpot_ns > 0:
        return int(request.first_ns + request.tpot_ns * (request.output - 1))
    return NEVER


@jit
def count_misses(s: Record, r: Nodes) -> None:
    """Count the misses that have become certain among the requests in the system."""
    if s.now_ns <= s.next_miss_ns:
        return
    s.next_miss_ns = NEVER
    for m in range(s.n_models):
        for k in range(s.queue_len[m] + s.begun_len[m]):
            if k < s.queue_len[m]:
                request = r[s.queue[m, k]]
            else:
                request = r[s.begun[m, k - s.queue_len[m]]]
            if request.miss == MISS_NONE:
                request.miss = certain_miss(request, s.now_ns)
                if request.miss == MISS_NONE:
                    s.next_miss_ns = min(s.next_miss_ns, miss_ns(request))
                else:
                    s.misses += 1


@jit
def change_urgency(s: Record, change: float) -> None:
    """Add to the sum of 1/isolated latency of the requests in the system, integrating it."""
    s.latency_area += s.urgency * (s.now_ns - s.urgency_since_ns) * 1e-9
    s.urgency_since_ns = s.now_ns
    s.urgency = s.urgency + change if s.in_system > 0 else 0.0


@jit
def finish(s: Record, r: Nodes, m: int, i: int) -> None:
    """End a sequence that has all its tokens and free its blocks."""
    request = r[i]
    request.state = DONE
    request.finish_ns = s.now_ns
    s.kv_blocks[m] -= request.blocks
    request.blocks = 0
    s.begun_len[m] = drop_from(s.begun[m], s.begun_len[m], i)
    s.outputs_done[m] += 1
    s.outputs_tokens[m] += request.generated
    s.in_system -= 1
    change_urgency(s, -1e9 / request.isolated_ns)
    if request.miss == MISS_NONE:
        request.miss = certain_miss(request, s.now_ns)
        if request.miss != MISS_NONE:
            s.misses += 1
