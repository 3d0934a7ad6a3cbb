"""The link of a simulated node: transfers in both directions, one at a time each.

Section 4 of ``docs/semantics.md``. Load pieces that nobody waits for land when they are next looked
at (``link_event_ns``, ``catch_up``): the same instants matter as when each is looked at.
"""

from mmrl.node.jit import jit
from mmrl.node.memory import drop_from, keep_load_queue
from mmrl.node.state import (
    IDLE,
    JOINING,
    LINK_IDLE,
    LINK_LOAD,
    LINK_RESTORE,
    LINK_STREAM,
    NEVER,
    SAVED,
    Nodes,
    Record,
)


@jit
def ask_decision(s: Record) -> None:
    """Let the event of this instant ask for a decision."""
    s.due_ns = min(s.due_ns, max(s.now_ns + s.latency_ns, s.decided_ns + s.gap_ns))


@jit
def start_load_piece(s: Record, m: int, start_ns: int) -> None:
    """Put the next piece of model ``m`` on the link at ``start_ns``."""
    duration = s.load_base_ns[m] if s.landed[m] == 0 else s.load_layer_ns[m]
    if not s.load_begun[m]:
        s.load_begun[m] = 1
        duration += s.load_fixed_ns[m]
    s.h2d_kind = LINK_LOAD
    s.h2d_model = m
    s.h2d_turn = LINK_LOAD
    s.h2d_start_ns = start_ns
    s.h2d_end_ns = start_ns + duration


@jit
def start_h2d(s: Record, r: Nodes) -> None:
    """Start the next transfer host to device: restore, else stream and load in turn."""
    duration = 0
    if s.restore_len > 0:
        i = s.restore_queue[0]
        s.restore_len = drop_from(s.restore_queue, s.restore_len, i)
        m = r[i].model
        duration = s.restore_fixed_ns[m] + int(r[i].blocks * s.restore_block_ns[m] + 0.5)
        s.h2d_kind = LINK_RESTORE
        s.h2d_model = m
        s.h2d_request = i
    elif (
        s.lb_kind != IDLE
        and s.lb_layers > 0
        and s.stream_hold == 0
        and (s.load_len == 0 or s.h2d_turn == LINK_LOAD)
    ):
        m = s.lb_model
        duration = s.stream_layer_ns[m]
        if not s.lb_fixed_paid:
            s.lb_fixed_paid = 1
            duration += s.stream_fixed_ns[m]
        s.h2d_kind = LINK_STREAM
        s.h2d_model = m
        s.h2d_request = s.lb_id
        s.h2d_turn = LINK_STREAM
    elif s.load_len > 0:
        start_load_piece(s, s.load_queue[0], s.now_ns)
        return
    else:
        return
    s.h2d_start_ns = s.now_ns
    s.h2d_end_ns = s.now_ns + duration


@jit
def land_piece(s: Record) -> None:
    """Land the load piece on the link; the link is idle after."""
    m = s.h2d_model
    s.h2d_busy_ns += s.h2d_end_ns - s.h2d_start_ns
    s.load_bytes[m] += s.base_bytes[m] if s.landed[m] == 0 else s.layer_bytes[m]
    s.landed[m] += 1
    s.h2d_kind = LINK_IDLE
    s.h2d_end_ns = NEVER
    keep_load_queue(s, m)


@jit
def end_h2d(s: Record, r: Nodes) -> None:
    """End the transfer host to device."""
    m = s.h2d_model
    if s.h2d_kind == LINK_LOAD:
        land_piece(s)
        if s.landed[m] == s.target[m]:
            s.loads[m] += 1
            s.loaded_ns[m] = s.now_ns
            ask_decision(s)
        return
    s.h2d_busy_ns += s.h2d_end_ns - s.h2d_start_ns
    if s.h2d_kind == LINK_STREAM:
        s.stream_bytes[m] += s.layer_bytes[m]
        if s.lb_kind != IDLE and s.lb_model == m and s.lb_layers > 0 and s.h2d_request == s.lb_id:
            s.lb_layers -= 1
    else:
        i = s.h2d_request
        request = r[i]
        s.kv_restore_bytes[m] += request.blocks * s.block_bytes[m]
        if s.target[m] == 0:
            s.kv_blocks[m] -= request.blocks
            request.state = SAVED
            s.saved[m] += 1
        else:
            s.host_kv_bytes -= request.blocks * s.block_bytes[m]
            request.state = JOINING
            s.joining[m] += 1
        ask_decision(s)
    s.h2d_kind = LINK_IDLE
    s.h2d_end_ns = NEVER


@jit
def start_d2h(s: Record, r: Nodes) -> None:
    """Start the next save, if there is one."""
    if s.save_len == 0:
        return
    i = s.save_queue[0]
    s.save_len = drop_from(s.save_queue, s.save_len, i)
    m = r[i].model
    duration = s.save_fixed_ns[m] + int(r[i].blocks * s.save_block_ns[m] + 0.5)
    s.d2h_request = i
    s.d2h_start_ns = s.now_ns
    s.d2h_end_ns = s.now_ns + duration


@jit
def end_d2h(s: Record, r: Nodes) -> None:
    """End a save: the sequence is on the host and its device blocks are free."""
    request = r[s.d2h_request]
    m = request.model
    s.kv_save_bytes[m] += request.blocks * s.block_bytes[m]
    s.kv_blocks[m] -= request.blocks
    s.saving_blocks[m] -= request.blocks
    s.saved[m] += 1
    s.d2h_busy_ns += s.d2h_end_ns - s.d2h_start_ns
    request.state = SAVED
    s.d2h_request = -1
    s.d2h_end_ns = NEVER
    ask_decision(s)


@jit
def quiet_pieces(s: Record) -> int:
    """Return how many load pieces after the one on the link can land before anything looks."""
    m = s.h2d_model
    if (
        s.h2d_kind != LINK_LOAD
        or s.landed[m] == 0
        or s.restore_len > 0
        or (s.lb_kind != IDLE and s.lb_layers > 0)
        or s.load_len == 0
        or s.load_queue[0] != m
        or s.granted[m] > s.target[m]
    ):
        return 0
    return int(max(0, min(s.target[m], s.granted[m]) - s.landed[m] - 1))


@jit
def link_event_ns(s: Record) -> int:
    """Return the next instant at which the end of a transfer host to device matters."""
    if s.h2d_kind == LINK_IDLE:
        return NEVER
    return int(s.h2d_end_ns + quiet_pieces(s) * s.load_layer_ns[s.h2d_model])


@jit
def catch_up(s: Record, now_ns: int) -> None:
    """Land the pieces of the load on the link that ended before ``now_ns``."""
    while s.h2d_end_ns < now_ns:
        m = s.h2d_model
        ended = s.h2d_end_ns
        land_piece(s)
        start_load_piece(s, m, ended)


@jit
def links_pending(s: Record) -> bool:
    """Return whether a transfer waits for an idle direction of the link."""
    h2d = s.restore_len > 0 or s.load_len > 0 or (s.lb_kind != IDLE and s.lb_layers > 0)
    return bool((h2d and s.h2d_kind == LINK_IDLE) or (s.save_len > 0 and s.d2h_request < 0))


@jit
def slow_share(s: Record, m: int, loads: bool, streams: bool, saves: bool) -> float:
    """Return by which share a decode step of resident model ``m`` is longer beside all that."""
    share = 0.0
    if loads:
        share = max(share, s.beside_load[m])
    if streams:
        share = max(share, s.beside_stream[m])
    if saves:
        share = max(share, s.beside_save[m])
    return share


@jit
def slowed_ns(s: Record, m: int, duration_ns: int, step_ns: int) -> int:
    """Return the time of an iteration of resident model ``m`` that starts now.

    Args:
        s: The node.
        m: The model.
        duration_ns: Its price while the link rests.
        step_ns: That of the decode step of which the share is taken.
    """
    streams = s.lb_kind != IDLE and s.lb_layers > 0
    saves = s.save_len > 0 or s.d2h_request >= 0
    return int(duration_ns + slow_share(s, m, s.load_len > 0, streams, saves) * step_ns + 0.5)


@jit
def start_links(s: Record, r: Nodes) -> None:
    """Start a transfer on each idle direction of the link."""
    if s.h2d_kind == LINK_IDLE:
        start_h2d(s, r)
    if s.d2h_request < 0:
        start_d2h(s, r)
