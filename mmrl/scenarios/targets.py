"""Latency targets: when a request counts as served well.

All kinds are one formula with different numbers::

    TTFT <= max(min(max(ttft_s, prompt / prompt_tokens_per_s), ttft_max_s), factor x TTFT alone)
    TPOT <= max(tpot_s, factor x TPOT alone)

where *alone* is the same request on a resident model that serves nothing else. Batch work has
the TTFT target ``batch_ttft_s`` and no TPOT target.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmrl.node.jit import jit

Kind = Literal["sliding", "chat", "market", "relative"]
Seconds = Annotated[float, Field(gt=0, le=1e5)]

DEFAULTS: dict[str, dict[str, float]] = {
    "sliding": {"ttft_s": 0.5, "tpot_s": 0.25, "prompt_tokens_per_s": 512.0, "ttft_max_s": 8.0},
    "chat": {"ttft_s": 2.0, "tpot_s": 0.1},
    "market": {"ttft_s": 10.0, "tpot_s": 0.1},
    "relative": {"ttft_s": 1.0, "tpot_s": 0.04, "factor": 5.0},
}


class TargetNumbers(NamedTuple):
    """Targets in the form that compiled code reads; a part that does not apply is neutral."""

    ttft_ns: float
    ns_per_prompt_token: float
    ttft_max_ns: float
    tpot_ns: float
    factor: float
    batch_ttft_ns: float


class Targets(BaseModel):
    """Targets of a scenario: a kind's name, or a table with a kind and numbers of one's own.

    Attributes:
        kind: ``sliding`` (TTFT of 0.5 s to 8 s by the length of the prompt, TPOT 250 ms),
            ``chat`` (2 s, 100 ms), ``market`` (10 s, 100 ms) or ``relative`` (5 times what the
            request would take alone, but at least 1 s and 40 ms).
        ttft_s: Smallest TTFT target.
        tpot_s: Smallest TPOT target.
        prompt_tokens_per_s: The TTFT target grows by a second for so many prompt tokens; only
            ``sliding`` does so by itself.
        ttft_max_s: Where that growth ends.
        factor: Targets are at least so many times the latency alone; 0 for no such part.
        batch_ttft_s: TTFT target of batch work.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: Kind
    ttft_s: Seconds
    tpot_s: Seconds
    prompt_tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    ttft_max_s: Seconds | None = None
    factor: Annotated[float, Field(ge=0, le=1000)] = 0.0
    batch_ttft_s: Seconds = 60.0

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults(cls, value: Any) -> Any:
        table = {"kind": value} if isinstance(value, str) else value
        if not isinstance(table, dict):
            return table
        kind = table.get("kind")
        return {**(DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}), **table}

    @model_validator(mode="after")
    def _ordered(self) -> "Targets":
        if self.ttft_max_s is not None and self.ttft_max_s < self.ttft_s:
            raise ValueError(f"ttft_max_s: {self.ttft_max_s:g} s is below ttft_s")
        return self

    @property
    def numbers(self) -> TargetNumbers:
        """The compiled form."""
        slope = 0.0 if self.prompt_tokens_per_s is None else 1e9 / self.prompt_tokens_per_s
        return TargetNumbers(
            self.ttft_s * 1e9,
            slope,
            (1e5 if self.ttft_max_s is None else self.ttft_max_s) * 1e9,
            self.tpot_s * 1e9,
            self.factor,
            self.batch_ttft_s * 1e9,
        )

    def describe(self) -> str:
        """Say the targets in one line."""
        ttft = f"{self.ttft_s:g} s"
        if self.prompt_tokens_per_s is not None:
            end = "" if self.ttft_max_s is None else f", at most {self.ttft_max_s:g} s"
            ttft = f"max({ttft}, prompt/{self.prompt_tokens_per_s:g} s){end}"
        tpot = f"{self.tpot_s * 1e3:g} ms"
        alone = f"; at least {self.factor:g}x alone" if self.factor else ""
        return f"{self.kind}: TTFT {ttft}, TPOT {tpot}{alone}"


@jit
def targets_ns(
    numbers: TargetNumbers, prompt: int, prefill_ns: float, step_ns: float
) -> tuple[float, float]:
    """Return the (TTFT, TPOT) targets in ns of a request that is not batch work.

    Args:
        numbers: The targets.
        prompt: Its prompt length; of its output nothing may be used, a target tells no future.
        prefill_ns: Its TTFT alone.
        step_ns: Its TPOT alone.
    """
    ttft_ns = max(numbers.ttft_ns, min(prompt * numbers.ns_per_prompt_token, numbers.ttft_max_ns))
    return (
        max(ttft_ns, numbers.factor * prefill_ns),
        max(numbers.tpot_ns, numbers.factor * step_ns),
    )
