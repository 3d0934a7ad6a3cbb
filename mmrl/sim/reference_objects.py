"""The nouns of the reference simulator: a request, a model, an iteration, a transfer."""

import math
from dataclasses import dataclass, field

from mmrl.node import state as st


def blocks_for(tokens: int) -> int:
    """Return the KV blocks that hold ``tokens`` tokens of one sequence."""
    return -(-tokens // st.BLOCK_TOKENS)


@dataclass(eq=False)
class Request:
    """One request (section 5); the index is its place in order of arrival."""

    index: int
    arrival_ns: int
    ttft_ns: int
    tpot_ns: int
    isolated_ns: int
    model: int
    prompt: int
    output: int
    state: int = st.UNARRIVED
    generated: int = 0
    prefilled: int = 0
    blocks: int = 0  # on the device, or on the host when saved
    first_ns: int = -1
    finish_ns: int = -1
    preemptions: int = 0
    miss: int = st.MISS_NONE

    @property
    def deadline_ns(self) -> int:
        """The last instant at which a first token meets the TTFT target."""
        return self.arrival_ns + self.ttft_ns

    @property
    def prefill_tokens(self) -> int:
        """Tokens that its prefill computes, ``p``."""
        return self.prompt + self.generated

    @property
    def kv_tokens(self) -> int:
        """KV tokens once it decodes: those of all tokens but the last."""
        return self.prompt + self.generated - 1

    def can_meet_ttft(self, now_ns: int) -> bool:
        """Whether its first token is out or can still come in time."""
        return self.first_ns >= 0 or now_ns <= self.deadline_ns


@dataclass(eq=False)
class Model:
    """One model of the node: its constants, weights, requests and counters."""

    index: int
    profile: int
    pieces: int  # L + 1
    base_bytes: int
    layer_bytes: int
    block_bytes: int
    load_fixed_ns: int
    load_base_ns: int
    load_layer_ns: int
    stream_fixed_ns: int
    stream_layer_ns: int
    save_fixed_ns: int
    save_block_ns: float
    restore_fixed_ns: int
    restore_block_ns: float
    beside_load: float  # shares by which a decode step is longer
    beside_stream: float
    beside_save: float
    settle_ns: int  # by how much the first step of a segment is longer
    decode_scale: float
    prefill_scale: float
    # weights
    target: int = 0
    granted: int = 0
    landed: int = 0
    load_begun: bool = False  # load_fixed has been paid since the last grant
    loaded_ns: int = -1
    paused: bool = False
    # requests
    queue: list[Request] = field(default_factory=list)
    begun: list[Request] = field(default_factory=list)
    decode_due: bool = False
    seg_left: int = 0
    step_ns: int = 0
    kv_blocks: int = 0
    # eviction order
    gdsf_uses: float = 0.0
    gdsf_priority: float = 0.0
    # counters
    loads: int = 0
    load_bytes: int = 0
    stream_bytes: int = 0
    kv_save_bytes: int = 0
    kv_restore_bytes: int = 0
    outs: int = 0
    idle_evictions: int = 0
    unblocked: int = 0
    preempted: int = 0
    kv_dropped: int = 0
    abandoned: int = 0
    gpu_busy_ns: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0

    def weights(self, pieces: int) -> int:
        """Bytes of the first ``pieces`` pieces."""
        return self.base_bytes + (pieces - 1) * self.layer_bytes if pieces else 0

    def level(self, level: float) -> int:
        """Pieces of a level in 0..1."""
        return 1 + math.ceil(level * (self.pieces - 1))

    def begun_in(self, *states: int) -> list[Request]:
        """Its begun requests in one of these states, in order of arrival."""
        return [request for request in self.begun if request.state in states]

    @property
    def has_requests(self) -> bool:
        """Whether it has a request queued or begun."""
        return bool(self.queue or self.begun)

    @property
    def lacks_weights(self) -> bool:
        """Whether it is out and has requests queued or begun."""
        return self.target == 0 and self.has_requests


@dataclass(eq=False)
class Iteration:
    """One prefill chunk or decode step (section 6)."""

    kind: int  # PREFILL_CHUNK or DECODE_STEP
    model: Model
    batch: list[Request]  # the sequence in prefill, or those that decode when it starts
    tokens: int  # that it computes
    duration_ns: int
    end_ns: int  # of its compute
    link_bound: bool
    need: int  # link-bound: pieces that must have landed for it to end
    layers: int  # link-bound: layers still to be streamed
    fixed_paid: bool = False
    computed: bool = False
    abandoned: bool = False


@dataclass(eq=False)
class Transfer:
    """What is on one direction of the link (section 4)."""

    kind: int  # LINK_RESTORE, LINK_STREAM or LINK_LOAD; saves have their own direction
    model: Model
    duration_ns: int
    end_ns: int
    request: Request | None = None  # whose KV moves
    iteration: Iteration | None = None  # that the layer is streamed for
