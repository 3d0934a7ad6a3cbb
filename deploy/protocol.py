"""What the front of a server and the engine say to each other.

Plain values that can cross a process boundary: requests in, token events out, snapshots of the
node for pages and metrics. Nothing here imports torch.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from mmrl.errors import MmrlError


class Finish(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # the model said so (end-of-sequence token), or a stop string came
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generate:
    """One request to a model.

    Attributes:
        model: Name of the model in the fleet.
        prompt: Token ids, at least one.
        max_tokens: Most tokens to generate; prompt and these fit the model's context.
        min_tokens: No end-of-sequence token before so many.
        ignore_eos: Generate exactly ``max_tokens``.
        sampling: How tokens are chosen.
    """

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of a request, and how it ended if it has.

    Attributes:
        tokens: Token ids; empty where a request ends without a further one. An end-of-sequence
            token is not among them.
        finish: Why it ended, or None while it goes on.
        error: What went wrong, for `Finish.ERROR`.
    """

    tokens: tuple[int, ...]
    finish: Finish | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model, as the front needs to know it.

    Attributes:
        name: What clients call it.
        path: Local folder with its tokenizer.
        max_context: Most tokens of prompt and output together.
        vocabulary: How many token ids it has rows for; its tokenizer may know more.
        ttft_s: Target of the first token.
        tpot_s: Target per further token; 0 for none.
        weight_bytes: All weights.
    """

    name: str
    path: str
    max_context: int
    vocabulary: int
    ttft_s: float
    tpot_s: float
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model of a running node. Counters count from the start of the engine."""

    name: str
    pieces: int  # base weights and layers
    landed: int
    target: int
    weight_bytes: int  # all weights
    resident_bytes: int
    kv_bytes: int
    queued: int
    running: int  # sequences that prefill or decode
    suspended: int  # sequences whose KV cache is saved or on the link
    oldest_wait_s: float
    ttft_s: float  # targets
    tpot_s: float
    paused: bool
    focus: bool
    pinned: bool
    quarantined: bool
    loads: int
    outs: int
    idle_evictions: int
    preempted: int
    kv_dropped: int
    load_bytes: int
    stream_bytes: int
    kv_save_bytes: int
    kv_restore_bytes: int
    prefill_tokens: int
    decode_tokens: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision that the node applied, with a reason that a person can read.

    Attributes:
        number: Counts decisions since the start of the engine.
        time_s: Wall clock, seconds since the epoch.
        model: Name of the model.
        verb: See ``mmrl.node.actions.VERBS``.
        by: ``policy``, ``champion`` (fallback, or after a revert), ``operator`` or ``node``.
        reason: For example ``makes room for phi (3 wait, the oldest 1.2 s of 2 s) · itself: idle
            for 4.0 s``.
        latency_s: How long the decision took.
    """

    number: int
    time_s: float
    model: str
    verb: str
    by: str
    reason: str
    latency_s: float


@dataclass(frozen=True, slots=True)
class NodeState:
    """A picture of the node, some times a second."""

    time_s: float  # wall clock, seconds since the epoch
    started_s: float  # start of the engine
    device: str
    policy: str  # name of the policy that decides now
    champion: str  # name of the rule that decides where the policy does not
    reverted: bool  # the champion decides instead of the policy
    draining: bool
    budget_bytes: int
    reserve_bytes: int
    free_bytes: int
    host_kv_bytes: int
    host_kv_limit_bytes: int
    h2d_busy_s: float
    d2h_busy_s: float
    compute_s: float
    decisions_asked: int
    illegal_actions: int
    fallbacks: dict[str, int]  # deadline, not_finite, illegal, error -> how often
    decision_latencies_s: tuple[float, ...]  # of the decisions since the previous picture
    overhead_s: float  # between the end of an iteration and the start of one that could follow
    models: tuple[ModelState, ...]
    decisions: tuple[Decision, ...]  # the last ones, at most 100, oldest first


class Unavailable(MmrlError):
    """The engine does not take this request now.

    Attributes:
        retry_after_s: When to try again.
    """

    def __init__(self, message: str, remedy: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, remedy)
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable):
    """The queue of the model is full."""


class Draining(Unavailable):
    """The server is going down."""


class EngineDown(Unavailable):
    """The engine process has died and is being restarted."""


class Quarantined(Unavailable):
    """The model failed repeatedly and takes no requests until it is released."""


class Engine(Protocol):
    """The engine as the front sees it; everything runs on the front's event loop."""

    @property
    def models(self) -> dict[str, ModelInfo]:
        """Return the fleet by name; empty until the engine is ready."""

    @property
    def ready(self) -> bool:
        """Return whether the engine serves."""

    @property
    def state(self) -> NodeState | None:
        """Return the last picture of the node; None before the first."""

    def generate(self, request: Generate) -> AsyncGenerator[Tokens, None]:
        """Run a request; the last item has ``finish``. Closing the iterator cancels it.

        Raises:
            InputError: The model is unknown or the request does not fit it.
            Unavailable: One of its kinds.
        """

    async def command(self, name: str, subject: str | None = None) -> dict[str, Any]:
        """Do what an operator asks.

        ``pin``, ``unpin``, ``preload`` and ``release`` (from quarantine) a model; ``revert``: the
        champion decides; ``restore``: the policy decides again; ``policy``: another one decides.

        Raises:
            InputError: It is unknown, or not possible.
        """

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those that run; return whether all ended."""
