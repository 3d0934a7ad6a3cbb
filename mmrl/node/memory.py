"""Device memory: what is free, promised and about to be released; grants, KV blocks and eviction.

Section 3 of ``docs/semantics.md``, compiled, over the arrays of ``mmrl.node.state``.
"""

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.state import (
    DECODE,
    IDLE,
    LINK_LOAD,
    PREFILL,
    Nodes,
    Record,
)


@jit
def weight_bytes(s: Record, m: int, pieces: int) -> int:
    """Return the bytes of the first ``pieces`` pieces of model ``m`` (0 pieces = out)."""
    if pieces <= 0:
        return 0
    return int(s.base_bytes[m] + (pieces - 1) * s.layer_bytes[m])


@jit
def free_bytes(s: Record) -> int:
    """Return the bytes of the budget that nothing holds; never negative."""
    free = s.budget_bytes - s.reserve_bytes
    for m in range(s.n_models):
        free -= weight_bytes(s, m, s.granted[m]) + s.kv_blocks[m] * s.block_bytes[m]
    return int(free)


@jit
def promised_to(s: Record, m: int) -> int:
    """Return the bytes that model ``m`` waits for in the grant queue."""
    if s.target[m] <= s.granted[m]:
        return 0
    return weight_bytes(s, m, s.target[m]) - weight_bytes(s, m, s.granted[m])


@jit
def promised_bytes(s: Record) -> int:
    """Return the bytes that the models of the grant queue wait for."""
    total = 0
    for k in range(s.grant_len):
        total += promised_to(s, s.grant_queue[k])
    return total


@jit
def releasing_from(s: Record, r: Nodes, m: int) -> int:
    """Return the bytes of model ``m`` whose release is committed but has not happened yet."""
    total = s.saving_blocks[m] * s.block_bytes[m]
    if s.granted[m] > s.target[m]:
        total += weight_bytes(s, m, s.granted[m]) - weight_bytes(s, m, s.target[m])
    if s.target[m] == 0 and (s.decoding[m] > 0 or s.prefilling[m] >= 0):
        for k in range(s.begun_len[m]):
            request = r[s.begun[m, k]]
            if request.state == DECODE or request.state == PREFILL:
                total += request.blocks * s.block_bytes[m]
    return int(total)


@jit
def releasing_bytes(s: Record, r: Nodes) -> int:
    """Return the bytes whose release is committed but has not happened yet."""
    total = 0
    for m in range(s.n_models):
        total += releasing_from(s, r, m)
    return total


@jit
def computes(s: Record, m: int) -> bool:
    """Return whether an iteration of model ``m`` occupies the device."""
    return bool(s.gpu_kind != IDLE and s.gpu_model == m)


@jit
def at_rest(s: Record, m: int) -> bool:
    """Return whether nothing of model ``m`` computes and no load piece of it is on the link."""
    return not computes(s, m) and not (s.h2d_kind == LINK_LOAD and s.h2d_model == m)


@jit
def has_work(s: Record, m: int) -> bool:
    """Return whether model ``m`` has requests queued or begun."""
    return bool(s.queue_len[m] > 0 or s.begun_len[m] > 0)


@jit
def lacks_weights(s: Record, m: int) -> bool:
    """Return whether model ``m`` is out and somebody waits for it."""
    return bool(s.target[m] == 0 and has_work(s, m))


@jit
def is_idle(s: Record, m: int) -> bool:
    """Return whether model ``m`` holds weights that nobody uses and may be evicted at once."""
    return bool(
        s.target[m] > 0
        and s.granted[m] == s.target[m]
        and s.landed[m] == s.target[m]
        and s.pinned[m] == 0
        and not has_work(s, m)
        and not computes(s, m)
    )


@jit
def idle_bytes(s: Record, m: int) -> int:
    """Return the bytes that evicting every idle model but ``m`` would free."""
    total = 0
    for k in range(s.n_models):
        if k != m and is_idle(s, k):
            total += weight_bytes(s, k, s.granted[k])
    return total


@jit
def drop_from(queue: npt.NDArray[np.int32], length: int, value: int) -> int:
    """Remove ``value`` from ``queue[:length]`` keeping the order; return the new length."""
    kept = 0
    for k in range(length):
        if queue[k] != value:
            queue[kept] = queue[k]
            kept += 1
    return kept


@jit
def whole_load_ns(s: Record, m: int) -> int:
    """Return the time to load all pieces of model ``m`` over an idle link."""
    return int(s.load_fixed_ns[m] + s.load_base_ns[m] + (s.pieces[m] - 1) * s.load_layer_ns[m])


@jit
def load_seconds(s: Record, m: int) -> float:
    """Return the same in seconds."""
    return whole_load_ns(s, m) * 1e-9


@jit
def count_use(s: Record, m: int) -> None:
    """Count an admission and renew the GDSF priority of model ``m`` (Cherkasova 1998)."""
    s.gdsf_uses[m] += 1.0
    gigabytes = weight_bytes(s, m, s.pieces[m]) / 1e9
    s.gdsf_priority[m] = s.gdsf_clock + s.gdsf_uses[m] * load_seconds(s, m) / gigabytes


@jit
def gdsf_victim(s: Record, m: int) -> int:
    """Return the idle model but ``m`` with the lowest GDSF priority, or -1."""
    victim = -1
    for k in range(s.n_models):
        if (
            k != m
            and is_idle(s, k)
            and (victim < 0 or s.gdsf_priority[k] < s.gdsf_priority[victim])
        ):
            victim = k
    return victim


@jit
def evict(s: Record, victim: int) -> None:
    """Free the weights of an idle model at once."""
    s.gdsf_clock = s.gdsf_priority[victim]
    s.target[victim] = 0
    s.granted[victim] = 0
    s.landed[victim] = 0
    s.idle_evictions[victim] += 1


@jit
def take_blocks(s: Record, m: int, blocks: int) -> bool:
    """Take KV blocks for model ``m``, evicting idle models if that suffices; False if it cannot."""
    need = blocks * s.block_bytes[m]
    room = free_bytes(s) - promised_bytes(s)
    if need > room:
        if need > room + idle_bytes(s, m):
            return False
        while need > room:
            evict(s, gdsf_victim(s, m))
            room = free_bytes(s) - promised_bytes(s)
    s.kv_blocks[m] += blocks
    return True


@jit
def could_take_blocks(s: Record, m: int, blocks: int) -> bool:
    """Return whether ``take_blocks`` would succeed now."""
    need = blocks * s.block_bytes[m]
    room = free_bytes(s) - promised_bytes(s)
    return bool(need <= room or need <= room + idle_bytes(s, m))


@jit
def append_once(queue: npt.NDArray[np.int32], length: int, value: int) -> int:
    """Append ``value`` to ``queue[:length]`` unless it is in it; return the new length."""
    for k in range(length):
        if queue[k] == value:
            return length
    queue[length] = value
    return length + 1


@jit
def keep_load_queue(s: Record, m: int) -> None:
    """Put model ``m`` into the load queue or out of it: it is in while a piece is missing."""
    if s.landed[m] < min(s.target[m], s.granted[m]):
        s.load_len = append_once(s.load_queue, s.load_len, m)
    else:
        s.load_len = drop_from(s.load_queue, s.load_len, m)


@jit
def grant(s: Record, m: int) -> None:
    """Take the memory of the target of model ``m`` and queue its missing pieces for the link."""
    s.granted[m] = s.target[m]
    s.load_begun[m] = 0
    keep_load_queue(s, m)


@jit
def grant_waiting(s: Record) -> None:
    """Grant the heads of the grant queue as long as their bytes are free."""
    while s.grant_len > 0:
        m = s.grant_queue[0]
        if promised_to(s, m) > free_bytes(s):
            return
        s.grant_len = drop_from(s.grant_queue, s.grant_len, m)
        grant(s, m)


@jit
def release(s: Record, m: int) -> None:
    """Free the surplus pieces of model ``m``, which is at rest."""
    s.granted[m] = s.target[m]
    s.landed[m] = min(s.landed[m], s.target[m])
