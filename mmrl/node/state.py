"""The state of a node as one struct of arrays, filled by the simulator and by the live node.

``NODE`` holds one node: its numbers, its models (arrays over ``MAX_MODELS``) and its device.
``REQUEST`` holds one request. ``N`` nodes are ``recarray[N]`` of ``NODE`` and requests are
``recarray[N, R]`` of ``REQUEST``, so that ``nodes[i]`` and ``requests[i]`` are views that compiled
and plain Python code read with the same attribute syntax. What each field means and how it changes
is written in ``docs/semantics.md``; times are integer nanoseconds, sizes are bytes.
"""

import numpy as np
import numpy.typing as npt

MAX_MODELS = 16
BATCH_LIMIT = 64  # sequences of one model that have begun and are not done
QUEUE_LIMIT = 256  # waiting requests of one model; one more is refused
QUEUE_SLOTS = (
    QUEUE_LIMIT + BATCH_LIMIT
)  # sequences whose KV was dropped queue again above the limit
BLOCK_TOKENS = 16
SEGMENT_STEPS = BLOCK_TOKENS  # decode steps between two settlings of price and KV blocks
CHUNK_TOKENS = 2048
STREAM_CHUNK_TOKENS = 16_384  # of a link-bound prefill: its weights come once for all of them
NEVER = 2**62  # later than any instant of an episode

# States of a request.
(
    UNARRIVED,
    QUEUED,
    PREFILL,
    DECODE,
    SAVING,
    SAVED,
    RESTORING,
    JOINING,
    DONE,
    REFUSED,
    CANCELLED,
) = range(11)

# Why a request missed its targets.
MISS_NONE, MISS_TTFT, MISS_TPOT, MISS_REFUSED = range(4)

# Among models: who gets the device next.
DISPATCH_RR, DISPATCH_EDF, DISPATCH_LAS = range(3)
DISPATCHES = ("rr", "edf", "las")

# What is on the device or on the link.
IDLE, PREFILL_CHUNK, DECODE_STEP = range(3)
LINK_IDLE, LINK_RESTORE, LINK_STREAM, LINK_LOAD = range(4)

REQUEST = np.dtype(
    [
        ("arrival_ns", "i8"),
        ("ttft_ns", "i8"),  # target: first token within this time of the arrival
        ("tpot_ns", "i8"),  # target per output token after the first; 0 = none (batch work)
        ("isolated_ns", "i8"),  # latency of this request alone on a resident model
        ("first_ns", "i8"),  # instant of the first token, -1 before
        ("finish_ns", "i8"),  # instant of the last token or refusal, -1 before
        ("model", "i4"),
        ("prompt", "i4"),
        ("output", "i4"),  # tokens it will generate: known to no policy
        ("generated", "i4"),  # tokens generated, settled at segment ends (see seg_steps)
        ("prefilled", "i4"),  # tokens of the current prefill already computed
        ("blocks", "i4"),  # KV blocks held (on the device, or on the host when saved)
        ("preemptions", "i4"),
        ("state", "i1"),
        ("miss", "i1"),
    ],
    align=True,
)

_M = (MAX_MODELS,)

NODE = np.dtype(
    [
        # --- numbers of the platform and scenario -----------------------------------------------
        ("n_models", "i8"),
        ("n_requests", "i8"),
        ("horizon_ns", "i8"),
        ("interval_ns", "i8"),
        ("latency_ns", "i8"),  # from the event to the instant its decision is applied
        ("gap_ns", "i8"),  # the shortest time between two askings of the policy
        ("budget_bytes", "i8"),
        ("reserve_bytes", "i8"),  # workspace, graphs and, where the verb set has levels, slots
        ("host_kv_limit_bytes", "i8"),
        ("dispatch", "i8"),
        ("full_verbs", "i8"),  # 1: verb set "full", 0: "core"
        ("prefetch", "i8"),  # 1: core may load a model that nobody waits for
        ("miss_weight", "f8"),
        ("latency_weight", "f8"),
        # --- constants of each model ------------------------------------------------------------
        ("profile", "i8", _M),  # row of the cost tables
        ("pieces", "i8", _M),  # base weights + layers: L + 1
        ("base_bytes", "i8", _M),
        ("layer_bytes", "i8", _M),
        ("block_bytes", "i8", _M),
        ("load_fixed_ns", "i8", _M),
        ("load_base_ns", "i8", _M),
        ("load_layer_ns", "i8", _M),
        ("stream_fixed_ns", "i8", _M),
        ("stream_layer_ns", "i8", _M),
        ("save_fixed_ns", "i8", _M),
        ("save_block_ns", "f8", _M),
        ("restore_fixed_ns", "i8", _M),
        ("restore_block_ns", "f8", _M),
        ("beside_load", "f8", _M),  # share by which a decode step is longer while the link loads,
        ("beside_stream", "f8", _M),  # ... streams,
        ("beside_save", "f8", _M),  # ... or saves
        ("settle_ns", "i8", _M),  # by how much the first decode step of a segment is longer
        ("decode_scale", "f8", _M),  # cost jitter of the episode; 1 = as profiled
        ("prefill_scale", "f8", _M),
        # --- clock and decisions ----------------------------------------------------------------
        ("now_ns", "i8"),
        ("next_arrival", "i8"),  # index of the first request that has not arrived
        ("due_ns", "i8"),  # instant of the next decision asked for by an event, or NEVER
        ("timer_ns", "i8"),  # instant of the next decision asked for by the interval
        ("acted", "i1", _M),  # bit g: verb group g of this model was used at this instant
        ("decided_ns", "i8"),  # instant of the previous decision given to the policy
        ("done", "i1"),  # 1: terminated (drained), 2: truncated (horizon)
        # --- weights ----------------------------------------------------------------------------
        ("target", "i8", _M),  # pieces wanted; 0 = out
        ("granted", "i8", _M),  # pieces whose memory is taken
        ("landed", "i8", _M),  # pieces on the device
        ("load_begun", "i1", _M),  # the fixed part of the current load has been paid
        ("grant_queue", "i4", _M),  # models waiting for memory, first come first served
        ("grant_len", "i8"),
        ("load_queue", "i4", _M),  # models whose pieces go over the link, first come first served
        ("load_len", "i8"),
        ("loaded_ns", "i8", _M),  # instant the last load ended (start of the residency)
        ("paused", "i1", _M),
        ("pinned", "i1", _M),  # an operator keeps the model where it is (live nodes only)
        ("focus", "i8"),  # model whose iterations go first, or -1
        # --- requests of each model -------------------------------------------------------------
        ("queue", "i4", (MAX_MODELS, QUEUE_SLOTS)),  # QUEUED requests in order of arrival
        ("queue_len", "i8", _M),
        ("begun", "i4", (MAX_MODELS, BATCH_LIMIT)),  # PREFILL..JOINING in order of arrival
        ("begun_len", "i8", _M),
        ("decoding", "i8", _M),  # how many of begun are in DECODE
        ("saved", "i8", _M),  # how many are SAVED
        ("joining", "i8", _M),  # how many are JOINING
        ("prefilling", "i8", _M),  # request in PREFILL, or -1
        ("decode_due", "i1", _M),  # a decode step goes before the next prefill chunk
        ("head", "i8", _M),  # cache: position in queue of the next request served, -1 = unknown
        ("head_until_ns", "i8", _M),  # the cache holds until this instant
        # --- decode segments --------------------------------------------------------------------
        ("seg_left", "i8", _M),  # steps left before price and blocks are settled again
        ("seg_steps", "i8", _M),  # steps done since the settling, not yet in request.generated
        ("seg_finish", "i8", _M),  # steps after the settling at which the first sequence finishes
        ("step_ns", "i8", _M),  # price of a decode step in this segment
        ("context_tokens", "i8", _M),  # KV tokens of the decoding batch at the settling
        # --- memory -----------------------------------------------------------------------------
        ("kv_blocks", "i8", _M),  # KV blocks held on the device
        ("saving_blocks", "i8", _M),  # of these, blocks of SAVING sequences
        ("host_kv_bytes", "i8"),
        # --- device -----------------------------------------------------------------------------
        ("gpu_kind", "i8"),  # IDLE, PREFILL_CHUNK or DECODE_STEP
        ("gpu_model", "i8"),
        ("gpu_start_ns", "i8"),
        ("gpu_end_ns", "i8"),
        ("gpu_tokens", "i8"),  # tokens of the prefill chunk that computes
        ("gpu_link_bound", "i1"),  # the iteration that computes is the link-bound one
        ("rr_last", "i8"),
        # --- the link-bound iteration in flight -------------------------------------------------
        ("lb_kind", "i8"),  # IDLE when there is none
        ("lb_model", "i8"),
        ("lb_tokens", "i8"),
        ("lb_computed", "i1"),
        ("lb_abandoned", "i1"),
        ("lb_need", "i8"),  # pieces that must have landed for it to end
        ("lb_layers", "i8"),  # layers still to be streamed
        ("lb_fixed_paid", "i1"),
        ("stream_hold", "i1"),  # no streaming slot is free yet (live nodes only)
        ("lb_id", "i8"),  # counts link-bound iterations, so that a stale stream piece is known
        # --- link, host to device ---------------------------------------------------------------
        ("h2d_kind", "i8"),
        ("h2d_model", "i8"),
        ("h2d_request", "i8"),
        ("h2d_start_ns", "i8"),
        ("h2d_end_ns", "i8"),
        ("h2d_turn", "i8"),  # LINK_STREAM or LINK_LOAD: which of the two went last
        ("restore_queue", "i4", (MAX_MODELS * BATCH_LIMIT,)),
        ("restore_len", "i8"),
        # --- link, device to host ---------------------------------------------------------------
        ("d2h_request", "i8"),  # -1 when idle
        ("d2h_start_ns", "i8"),
        ("d2h_end_ns", "i8"),
        ("save_queue", "i4", (MAX_MODELS * BATCH_LIMIT,)),
        ("save_len", "i8"),
        # --- eviction order (GreedyDual-Size-Frequency) -----------------------------------------
        ("gdsf_clock", "f8"),
        ("gdsf_uses", "f8", _M),
        ("gdsf_priority", "f8", _M),
        # --- reward -----------------------------------------------------------------------------
        ("in_system", "i8"),  # requests that have arrived and are neither done nor refused
        ("urgency", "f8"),  # sum of 1/isolated latency (1/s) over requests in the system
        ("urgency_since_ns", "i8"),
        ("latency_area", "f8"),  # its integral over time since the last decision
        ("misses", "i8"),  # misses that became certain since the last decision
        ("next_miss_ns", "i8"),  # no further miss becomes certain before this instant
        # --- what is known of the traffic -------------------------------------------------------
        ("rate_short", "f8", _M),  # arrivals/s, exponential average, not corrected for its start
        ("rate_long", "f8", _M),
        ("rate_ns", "i8", _M),  # instant of the last arrival, -1 before the first
        ("used_ns", "i8", _M),  # instant of the last iteration
        ("outputs_done", "i8", _M),  # requests done, and the tokens they generated
        ("outputs_tokens", "i8", _M),
        # --- counters since the reset -----------------------------------------------------------
        ("decisions", "i8"),
        ("illegal_actions", "i8"),
        ("actions", "i8", (9,)),  # verbs applied, in the order of mmrl.node.actions.VERBS
        ("loads", "i8", _M),
        ("load_bytes", "i8", _M),
        ("stream_bytes", "i8", _M),
        ("kv_save_bytes", "i8", _M),
        ("kv_restore_bytes", "i8", _M),
        ("outs", "i8", _M),  # times the policy put the model out
        ("idle_evictions", "i8", _M),
        ("unblocked", "i8", _M),  # times the node put the model out because nothing could move
        ("preempted", "i8", _M),  # sequences preempted
        ("kv_dropped", "i8", _M),  # sequences whose KV was dropped and recomputed
        ("abandoned", "i8", _M),  # link-bound iterations abandoned
        ("prefill_tokens", "i8", _M),
        ("decode_tokens", "i8", _M),
        ("gpu_busy_ns", "i8", _M),
        ("h2d_busy_ns", "i8"),
        ("d2h_busy_ns", "i8"),
    ],
    align=True,
)

Nodes = np.recarray
Record = np.record
CostTable = npt.NDArray[np.float64]


def new_nodes(count: int) -> "np.recarray":
    """Return ``count`` zeroed nodes, ``recarray[count]`` of ``NODE``."""
    return np.zeros(count, NODE).view(np.recarray)


def new_requests(count: int, capacity: int) -> "np.recarray":
    """Return zeroed request tables, ``recarray[count, capacity]`` of ``REQUEST``."""
    return np.zeros((count, capacity), REQUEST).view(np.recarray)
