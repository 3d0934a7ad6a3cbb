"""What rules ask of a node, compiled: who lacks weights, what would fit, what is at stake."""

from mmrl.node.actions import (
    LEVEL_0,
    LEVEL_100,
    OUT,
    encode,
    fits,
    legal,
    level_pieces,
    missing_bytes,
    room_bytes,
    waiting_kv_bytes,
)
from mmrl.node.jit import jit
from mmrl.node.memory import has_work, is_idle, weight_bytes
from mmrl.node.observe import batch_step_ns
from mmrl.node.state import DECODE, NEVER, CostTable, Nodes, Record
from mmrl.profiles.costs import prefill_alone_ns

ASSUMED_OUTPUT_TOKENS = 200.0  # of a model of which no request has ended yet


@jit
def load_verb(s: Record, r: Nodes, m: int) -> int:
    """Return the level at which to load model ``m``: all of it, or what an empty device holds.

    Under the core verbs a model is loaded whole; with levels, one that can never fit beside the KV
    of its next request gets the highest level that can.
    """
    if not s.full_verbs:
        return LEVEL_100
    room = s.budget_bytes - s.reserve_bytes - waiting_kv_bytes(s, r, m)
    verb = LEVEL_100
    while verb > LEVEL_0 and weight_bytes(s, m, level_pieces(s, m, verb)) > room:
        verb -= 1
    return verb


@jit
def lacks(s: Record, m: int) -> bool:
    """Return whether model ``m`` is out, somebody waits for it, and it may still be loaded now."""
    return bool(s.target[m] == 0 and has_work(s, m) and not s.acted[m] & 1)


@jit
def fits_without_evicting(s: Record, r: Nodes, m: int, pieces: int) -> bool:
    """Return whether ``pieces`` pieces of model ``m`` fit beside all models that hold weights."""
    return bool(pieces <= s.granted[m] or missing_bytes(s, r, m, pieces) <= room_bytes(s, r, m))


@jit
def first_arrival_ns(s: Record, r: Nodes, m: int) -> int:
    """Return when the oldest request in the system of model ``m`` arrived, or NEVER."""
    oldest = int(NEVER)
    if s.queue_len[m] > 0:
        oldest = r[s.queue[m, 0]].arrival_ns
    if s.begun_len[m] > 0:
        oldest = min(oldest, r[s.begun[m, 0]].arrival_ns)
    return oldest


@jit
def longest_unused(s: Record) -> int:
    """Return the idle model that was used least recently, or -1."""
    victim = -1
    for m in range(s.n_models):
        if is_idle(s, m) and (victim < 0 or s.used_ns[m] < s.used_ns[victim]):
            victim = m
    return victim


@jit
def longest_waiting(s: Record, r: Nodes) -> int:
    """Return the model that lacks weights with the oldest request, or -1."""
    chosen = -1
    oldest = int(NEVER)
    for m in range(s.n_models):
        if lacks(s, m) and first_arrival_ns(s, r, m) < oldest:
            oldest = first_arrival_ns(s, r, m)
            chosen = m
    return chosen


@jit
def load_if_legal(s: Record, r: Nodes, m: int) -> int:
    """Return the action that loads model ``m``, idle models being evicted; WAIT if not legal."""
    verb = load_verb(s, r, m)
    return encode(s.full_verbs, m, verb) if legal(s, r, m, verb) else 0


@jit
def out_if_legal(s: Record, r: Nodes, m: int) -> int:
    """Return the action that puts model ``m`` out; WAIT if not legal."""
    return encode(s.full_verbs, m, OUT) if legal(s, r, m, OUT) else 0


@jit
def make_room_or_load(s: Record, r: Nodes, m: int, victim: int) -> int:
    """Return the next action of bringing in model ``m`` by putting out idle models one by one.

    Args:
        s: The node.
        r: Its requests.
        m: The model that lacks weights.
        victim: The idle model to put out next, or -1 where none may go.
    """
    pieces = level_pieces(s, m, load_verb(s, r, m))
    if fits_without_evicting(s, r, m, pieces):
        return load_if_legal(s, r, m)
    if victim < 0 or not fits(s, r, m, pieces):
        return 0
    return out_if_legal(s, r, victim)


@jit
def freed_bytes(s: Record, m: int) -> int:
    """Return what putting out model ``m`` gives back, less what it is already about to give."""
    weights = weight_bytes(s, m, min(s.granted[m], s.target[m]))
    return int(weights + (s.kv_blocks[m] - s.saving_blocks[m]) * s.block_bytes[m])


@jit
def residency_ns(s: Record, m: int) -> int:
    """Return for how long model ``m`` has held all it is to hold; -1 while it loads or is out."""
    if s.target[m] == 0 or s.landed[m] < s.target[m] or s.loaded_ns[m] < 0:
        return -1
    return int(s.now_ns - s.loaded_ns[m])


@jit
def prefill_ns(s: Record, m: int, tokens: int, prefill_tables: CostTable) -> int:
    """Return the compute time of a prefill of ``tokens`` tokens of model ``m``, resident."""
    return prefill_alone_ns(prefill_tables[s.profile[m]], s.prefill_scale[m], tokens)


@jit
def mean_output(s: Record, m: int) -> float:
    """Return the mean output tokens of the requests of model ``m`` that have ended."""
    if s.outputs_done[m] == 0:
        return ASSUMED_OUTPUT_TOKENS
    return float(s.outputs_tokens[m] / s.outputs_done[m])


@jit
def generated_tokens(s: Record, request: Record) -> int:
    """Return the tokens that a request has generated, steps of the present segment included."""
    if request.state == DECODE:
        return int(request.generated + s.seg_steps[request.model])
    return int(request.generated)


@jit
def service_ns(s: Record, r: Nodes, m: int, decode_tables: CostTable) -> float:
    """Return how long the requests of model ``m`` are expected to decode, once it is loaded."""
    return float(mean_output(s, m) * batch_step_ns(s, r, m, decode_tables))
