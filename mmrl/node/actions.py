"""Verbs on models: their numbers, when they are legal, and what they do at once.

Section 8 of ``docs/semantics.md``. One number is one action: 0 is WAIT, ``1 + m * V + v`` is verb
``v`` of the verb set's ``V`` on model ``m``.
"""

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.memory import (
    append_once,
    at_rest,
    computes,
    drop_from,
    evict,
    free_bytes,
    gdsf_victim,
    grant,
    grant_waiting,
    has_work,
    idle_bytes,
    is_idle,
    keep_load_queue,
    lacks_weights,
    promised_bytes,
    promised_to,
    release,
    releasing_bytes,
    releasing_from,
    weight_bytes,
)
from mmrl.node.requests import (
    admission_blocks,
    head_request,
    join_restored,
    restore_saved,
    suspend,
)
from mmrl.node.state import DECODE_STEP, IDLE, SAVED, Nodes, Record

VERBS = (
    "out",
    "level0",
    "level25",
    "level50",
    "level75",
    "level100",
    "pause",
    "resume",
    "focus",
)
OUT, LEVEL_0, LEVEL_25, LEVEL_50, LEVEL_75, LEVEL_100, PAUSE, RESUME, FOCUS = range(9)
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
WAIT = 0

CORE_VERBS = (OUT, LEVEL_100, PAUSE, RESUME)
FULL_VERBS = tuple(range(9))
VERB_SETS = {"core": CORE_VERBS, "full": FULL_VERBS}

_CORE = np.array(CORE_VERBS)
# Residency, run, focus: each group once per model and instant (bits of NODE.acted).
_GROUP_BIT = np.array([1, 1, 1, 1, 1, 1, 2, 2, 4], dtype=np.int8)


@jit
def verb_count(full_verbs: int) -> int:
    """Return V, the number of verbs in the verb set."""
    return 9 if full_verbs else 4


def verb_names(full_verbs: bool) -> tuple[str, ...]:
    """Return the names of the verbs of a verb set, in the order of the actions."""
    return tuple(VERBS[v] for v in VERB_SETS["full" if full_verbs else "core"])


@jit
def verb_at(full_verbs: int, place: int) -> int:
    """Return the verb (index into VERBS) at a place of the verb set."""
    return int(place if full_verbs else _CORE[place])


@jit
def encode(full_verbs: int, m: int, verb: int) -> int:
    """Return the action that is ``verb`` (index into VERBS) on model ``m``.

    The verb must be in the verb set.
    """
    if full_verbs:
        return 1 + m * 9 + verb
    place = 0
    while _CORE[place] != verb:
        place += 1
    return 1 + m * 4 + place


@jit
def decode(full_verbs: int, action: int) -> tuple[int, int]:
    """Return (model, verb index into VERBS) of an action other than WAIT."""
    count = verb_count(full_verbs)
    return (action - 1) // count, verb_at(full_verbs, (action - 1) % count)


@jit
def level_pieces(s: Record, m: int, verb: int) -> int:
    """Return the pieces of model ``m`` at a level verb: ``1 + ceil(level * L)``."""
    layers = s.pieces[m] - 1
    return int(1 + (layers * (verb - LEVEL_0) + 3) // 4)


@jit
def waiting_kv_bytes(s: Record, r: Nodes, m: int) -> int:
    """Return the KV bytes of the first request that model ``m`` would serve."""
    if s.saved[m] > 0:
        for k in range(s.begun_len[m]):
            if r[s.begun[m, k]].state == SAVED:
                return int((r[s.begun[m, k]].blocks + 1) * s.block_bytes[m])
    if s.queue_len[m] > 0:
        return int(admission_blocks(r, head_request(s, r, m)) * s.block_bytes[m])
    return 0


@jit
def missing_bytes(s: Record, r: Nodes, m: int, pieces: int) -> int:
    """Return what model ``m`` needs to hold ``pieces`` pieces and the KV of its next request."""
    need = weight_bytes(s, m, pieces) - weight_bytes(s, m, s.granted[m])
    return max(0, need) + waiting_kv_bytes(s, r, m)


@jit
def room_bytes(s: Record, r: Nodes, m: int) -> int:
    """Return what model ``m`` can have without evicting: free and releasing, less promised."""
    return (
        free_bytes(s)
        + releasing_bytes(s, r)
        - releasing_from(s, r, m)
        - promised_bytes(s)
        + promised_to(s, m)
    )


@jit
def fits(s: Record, r: Nodes, m: int, pieces: int) -> bool:
    """Return whether ``pieces`` pieces of model ``m`` fit, after evicting idle models."""
    if pieces <= s.granted[m]:
        return True
    return bool(missing_bytes(s, r, m, pieces) <= room_bytes(s, r, m) + idle_bytes(s, m))


@jit
def lacking_models(s: Record) -> int:
    """Return how many models lack weights."""
    count = 0
    for m in range(s.n_models):
        count += lacks_weights(s, m)
    return count


@jit
def _open(s: Record, m: int, verb: int, lacking: int) -> bool:
    """Return whether ``verb`` on model ``m`` is legal but for the question whether it fits."""
    if s.acted[m] & _GROUP_BIT[verb]:
        return False
    if verb == RESUME:
        return bool(s.paused[m] == 1)
    if s.pinned[m] == 1 and OUT <= verb <= LEVEL_75:
        return False
    if verb == OUT or verb == PAUSE:
        if s.target[m] == 0 or (verb == PAUSE and (s.paused[m] == 1 or not has_work(s, m))):
            return False
        return bool(s.full_verbs == 1 or lacking > lacks_weights(s, m))
    if verb == FOCUS:
        return bool(s.full_verbs == 1 and (has_work(s, m) or s.focus == m))
    if s.full_verbs == 1:
        return bool(level_pieces(s, m, verb) != s.target[m])
    return bool(verb == LEVEL_100 and s.target[m] == 0 and (s.prefetch == 1 or has_work(s, m)))


@jit
def legal(s: Record, r: Nodes, m: int, verb: int) -> bool:
    """Return whether ``verb`` (index into VERBS) on model ``m`` is legal now."""
    if m >= s.n_models or not _open(s, m, verb, lacking_models(s)):
        return False
    return not LEVEL_0 <= verb <= LEVEL_100 or fits(s, r, m, level_pieces(s, m, verb))


@jit
def legal_actions(s: Record, r: Nodes, mask: npt.NDArray[np.bool_]) -> None:
    """Write which actions are legal into ``mask``, bool[A]."""
    mask[:] = False
    mask[WAIT] = True
    count = verb_count(s.full_verbs)
    lacking = lacking_models(s)
    if s.full_verbs == 0 and s.prefetch == 0 and lacking == 0 and not s.paused.any():
        return
    idle = idle_bytes(s, -1)
    room = free_bytes(s) + releasing_bytes(s, r) - promised_bytes(s)
    for m in range(s.n_models):
        mine = -1
        for place in range(count):
            verb = verb_at(s.full_verbs, place)
            if not _open(s, m, verb, lacking):
                continue
            if LEVEL_0 <= verb <= LEVEL_100:
                pieces = level_pieces(s, m, verb)
                if pieces > s.granted[m]:
                    if mine < 0:
                        mine = room - releasing_from(s, r, m) + promised_to(s, m) + idle
                        if is_idle(s, m):
                            mine -= weight_bytes(s, m, s.granted[m])
                    if missing_bytes(s, r, m, pieces) > mine:
                        continue
            mask[1 + m * count + place] = True


@jit
def some_verb_legal(s: Record, r: Nodes) -> bool:
    """Return whether an action other than WAIT is legal."""
    lacking = lacking_models(s)
    if s.full_verbs == 0 and s.prefetch == 0 and lacking == 0 and not s.paused.any():
        return False
    for m in range(s.n_models):
        for place in range(verb_count(s.full_verbs)):
            verb = verb_at(s.full_verbs, place)
            if _open(s, m, verb, lacking) and (
                not LEVEL_0 <= verb <= LEVEL_100 or fits(s, r, m, level_pieces(s, m, verb))
            ):
                return True
    return False


@jit
def abandon_link_bound(s: Record, m: int) -> None:
    """Abandon the link-bound iteration in flight if it is of model ``m``."""
    if s.lb_kind == IDLE or s.lb_model != m:
        return
    s.lb_abandoned = 1
    s.lb_layers = 0
    if s.lb_computed:
        s.lb_kind = IDLE
        s.abandoned[m] += 1


@jit
def set_target(s: Record, m: int, pieces: int) -> None:
    """Set the target of model ``m`` and queue its grant or its load; surplus goes at rest."""
    abandon_link_bound(s, m)
    s.target[m] = pieces
    if pieces <= s.granted[m]:
        s.grant_len = drop_from(s.grant_queue, s.grant_len, m)
    elif s.grant_len == 0 and promised_to(s, m) <= free_bytes(s):
        grant(s, m)
    else:
        s.grant_len = append_once(s.grant_queue, s.grant_len, m)
    keep_load_queue(s, m)


@jit
def step_in_flight(s: Record, m: int) -> bool:
    """Return whether a decode step of model ``m`` computes or waits for its bytes."""
    return bool(
        (s.gpu_kind == DECODE_STEP and s.gpu_model == m)
        or (s.lb_kind == DECODE_STEP and s.lb_model == m)
    )


@jit
def settle_memory(s: Record, r: Nodes) -> None:
    """Do what memory allows at this instant: join, suspend, release, grant, restore (step 6)."""
    if s.focus >= 0 and not has_work(s, s.focus):
        s.focus = -1
    for m in range(s.n_models):
        if s.joining[m] > 0 and not step_in_flight(s, m):
            join_restored(s, r, m)
        # Mostly all that a model which is out has begun is saved, and nothing left to suspend.
        active = s.decoding[m] > 0 or s.prefilling[m] >= 0 or s.restore_len > 0
        if s.target[m] == 0 and active and not computes(s, m):
            suspend(s, r, m)
        if s.granted[m] > s.target[m] and at_rest(s, m):
            release(s, m)
    grant_waiting(s)
    for m in range(s.n_models):
        if s.saved[m] > 0 and s.paused[m] == 0 and s.granted[m] >= s.target[m] >= 1:
            restore_saved(s, r, m)


@jit
def make_room(s: Record, r: Nodes, m: int, pieces: int) -> None:
    """Evict idle models until ``pieces`` pieces of model ``m``, which fit, have their room."""
    if pieces > s.granted[m]:
        need = missing_bytes(s, r, m, pieces)
        while need > room_bytes(s, r, m):
            evict(s, gdsf_victim(s, m))


@jit
def put_out(s: Record, m: int) -> None:
    """Take the weights of model ``m`` away: suspension and release follow when it is at rest."""
    s.paused[m] = 0
    set_target(s, m, 0)


@jit
def apply(s: Record, r: Nodes, action: int) -> bool:
    """Apply a legal verb and settle memory; return False for WAIT and illegal actions (counted)."""
    if action == WAIT:
        return False
    m, verb = decode(s.full_verbs, action)
    if action < 0 or not legal(s, r, m, verb):
        s.illegal_actions += 1
        return False
    s.acted[m] |= _GROUP_BIT[verb]
    s.actions[verb] += 1
    if verb == OUT:
        s.outs[m] += 1
        put_out(s, m)
    elif verb == PAUSE:
        s.paused[m] = 1
    elif verb == RESUME:
        s.paused[m] = 0
    elif verb == FOCUS:
        s.focus = -1 if s.focus == m else m
    else:
        pieces = level_pieces(s, m, verb)
        make_room(s, r, m, pieces)
        set_target(s, m, pieces)
    settle_memory(s, r)
    return True
