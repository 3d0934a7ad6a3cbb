"""What the front knows of one request: when its tokens came, and how it ended."""

import time
from dataclasses import dataclass, field
from typing import Any

from mmrl.deploy.protocol import ModelInfo

OUTCOMES = ("stop", "length", "cancelled", "refused", "invalid", "error")
MISSES = ("refused", "ttft", "tpot", "unfinished")


@dataclass(slots=True, eq=False)
class Record:
    """One request to a model, timed where the front sees it.

    Times are of ``time.perf_counter``; metrics are those of ``docs/glossary.md``.

    Attributes:
        info: The model.
        prompt_tokens: Length of the prompt.
        tokens: Tokens generated so far.
        started: When the request had been read.
        first: When its first token came.
        last: When its last token so far came.
        ended: When it ended.
        outcome: ``stop``, ``length``, ``cancelled`` (the client went), ``refused`` (queue full,
            draining, engine down, quarantined), ``invalid``, or ``error``.
        error: What went wrong, if anything did.
    """

    info: ModelInfo
    prompt_tokens: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    outcome: str = ""
    error: str = ""

    def take(self, tokens: int) -> None:
        """Count tokens that come now."""
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last
        self.tokens += tokens

    def end(self, outcome: str, error: str = "") -> None:
        """Note how it ended, now."""
        self.ended = time.perf_counter()
        self.outcome, self.error = outcome, error

    @property
    def finished(self) -> bool:
        """Return whether the client got all it asked for."""
        return self.outcome in ("stop", "length")

    @property
    def ttft_s(self) -> float | None:
        """Return the time to the first token."""
        return None if self.first is None else self.first - self.started

    @property
    def tpot_s(self) -> float | None:
        """Return the time per further token; None with fewer than two."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    @property
    def e2e_s(self) -> float:
        """Return the time to the end, or until now."""
        return (self.ended or time.perf_counter()) - self.started

    @property
    def late(self) -> bool:
        """Return whether its first token came after its target, or will."""
        waited_s = self.e2e_s if self.ttft_s is None else self.ttft_s
        return waited_s > self.info.ttft_s

    @property
    def miss(self) -> str | None:
        """Return which target it certainly missed: the earlier one counts, and only one.

        A request that could never be run misses none; one whose client went may still have
        missed a target before.
        """
        if self.outcome == "invalid":
            return None
        if self.outcome == "refused" and self.first is None:
            return "refused"
        if self.late:
            return "ttft"
        if self.info.tpot_s and self.tpot_s is not None and self.tpot_s > self.info.tpot_s:
            return "tpot"
        return None if self.finished or self.outcome == "cancelled" else "unfinished"

    @property
    def fields(self) -> dict[str, Any]:
        """Return what the log tells."""

        def rounded(value: float | None) -> float | None:
            return None if value is None else round(value, 6)

        fields = {
            "model": self.info.name,
            "outcome": self.outcome,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "ttft_s": rounded(self.ttft_s),
            "tpot_s": rounded(self.tpot_s),
            "e2e_s": rounded(self.e2e_s),
        }
        return {**fields, "error": self.error} if self.error else fields


class Watcher:
    """Is told of every request as it goes on."""

    def begun(self, record: Record) -> None:
        """Take a request that goes to the engine."""

    def first_token(self, record: Record) -> None:
        """Take a request whose first token has come."""

    def ended(self, record: Record) -> None:
        """Take a request that has ended."""
