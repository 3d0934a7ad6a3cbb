"""What reaches a node from outside besides arrivals: cancellations, ends of output, operators.

Section 11 of ``docs/semantics.md``, compiled. A simulated episode has none of these; a live node
does them through the same arrays.
"""

from mmrl.node.actions import (
    fits,
    make_room,
    set_target,
    settle_memory,
    step_in_flight,
)
from mmrl.node.jit import jit
from mmrl.node.memory import computes, drop_from
from mmrl.node.requests import change_batch, change_urgency, flush_steps, unqueue_begun
from mmrl.node.state import (
    CANCELLED,
    DECODE,
    IDLE,
    JOINING,
    LINK_IDLE,
    LINK_RESTORE,
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
def cancel(s: Record, r: Nodes, i: int) -> bool:
    """Take request ``i`` out of the node; False where an iteration or transfer still needs it.

    The caller then tries again after the next event. Memory is settled by the caller.
    """
    request = r[i]
    m = request.model
    state = request.state
    if state == QUEUED:
        s.queue_len[m] = drop_from(s.queue[m], s.queue_len[m], i)
        s.head[m] = -1
    else:
        if state == PREFILL:
            if computes(s, m) or (s.lb_kind != IDLE and s.lb_model == m):
                return False
            s.prefilling[m] = -1
        elif state == DECODE:
            if step_in_flight(s, m):
                return False
            change_batch(s, r, m, -1)
        elif state == SAVING:
            if s.d2h_request == i:
                return False
            s.save_len = drop_from(s.save_queue, s.save_len, i)
            s.saving_blocks[m] -= request.blocks
            s.host_kv_bytes -= request.blocks * s.block_bytes[m]
        elif state == SAVED:
            s.saved[m] -= 1
            s.host_kv_bytes -= request.blocks * s.block_bytes[m]
        elif state == RESTORING:
            if s.h2d_kind == LINK_RESTORE and s.h2d_request == i:
                return False
            s.restore_len = drop_from(s.restore_queue, s.restore_len, i)
            s.host_kv_bytes -= request.blocks * s.block_bytes[m]
        elif state == JOINING:
            s.joining[m] -= 1
        else:
            return True
        if state != SAVED:
            s.kv_blocks[m] -= request.blocks
        request.blocks = 0
        s.begun_len[m] = drop_from(s.begun[m], s.begun_len[m], i)
    request.state = CANCELLED
    request.finish_ns = s.now_ns
    s.in_system -= 1
    change_urgency(s, -1e9 / request.isolated_ns)
    return True


@jit
def end_at_next_token(s: Record, r: Nodes, i: int) -> None:
    """Make the token that the iteration in flight yields the last one of request ``i``."""
    request = r[i]
    m = request.model
    if request.state == DECODE:
        flush_steps(s, r, m)
        s.seg_finish[m] = min(s.seg_finish[m], 1)
    request.output = request.generated + 1


@jit
def fail_compute(s: Record) -> None:
    """End the iteration that computes with nothing produced."""
    s.gpu_kind = IDLE


@jit
def fail_link_bound(s: Record) -> None:
    """End the link-bound iteration in flight with nothing produced."""
    s.lb_kind = IDLE
    s.lb_layers = 0


@jit
def fail_piece(s: Record) -> None:
    """End the load piece on the link, which has not landed."""
    s.h2d_busy_ns += s.now_ns - s.h2d_start_ns
    s.h2d_kind = LINK_IDLE
    s.h2d_end_ns = NEVER


@jit
def fail_save(s: Record, r: Nodes) -> None:
    """End the save on the link, if any, which found no room on the host: the KV is dropped."""
    i = s.d2h_request
    if i < 0:
        return
    request = r[i]
    m = request.model
    s.d2h_busy_ns += s.now_ns - s.d2h_start_ns
    s.d2h_request = -1
    s.d2h_end_ns = NEVER
    s.saving_blocks[m] -= request.blocks
    s.host_kv_bytes -= request.blocks * s.block_bytes[m]
    s.kv_dropped[m] += 1
    unqueue_begun(s, r, m, i)


@jit
def preload(s: Record, r: Nodes, m: int) -> bool:
    """Load all of model ``m`` if it fits, idle models evicted as needed; False if it does not."""
    if s.target[m] == s.pieces[m]:
        return True
    if not fits(s, r, m, s.pieces[m]):
        return False
    make_room(s, r, m, s.pieces[m])
    set_target(s, m, s.pieces[m])
    settle_memory(s, r)
    return True
