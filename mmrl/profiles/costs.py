"""The cost model: seconds of every iteration and transfer, from one profile and nothing else.

``CostModel`` answers for any batch, context, prompt and size. The compiled simulator reads the
same curves as two tables, through ``decode_ns`` and ``prefill_chunk_ns``, which give integer
nanoseconds; the plain Python reference calls those functions too, so both agree exactly.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.state import CHUNK_TOKENS
from mmrl.profiles.curves import DecodeCurve, PrefillCurve
from mmrl.profiles.schema import Array, DecodePoint, Overhead, Profile, TokenPoint

DECODE_BATCHES = 64  # last row of the decode table
CONTEXT_STEP_TOKENS = 1024  # mean context per sequence between two columns
CONTEXT_KNOTS = 33
PREFILL_STEP_TOKENS = 128
PREFILL_KNOTS = 257

P = TypeVar("P", DecodePoint, TokenPoint)


@jit
def decode_ns(table: Array, scale: float, batch: int, total_context_tokens: int) -> int:
    """Return the time of one decode step in ns, at least 1.

    Args:
        table: ``CostModel.decode_table()``, seconds, ``float64[65, 33]``.
        scale: Factor on the time, 1 as profiled.
        batch: Sequences that decode, 1 to ``DECODE_BATCHES``.
        total_context_tokens: KV tokens of all these sequences together.
    """
    position = total_context_tokens / (batch * CONTEXT_STEP_TOKENS)
    knot = min(int(position), CONTEXT_KNOTS - 2)
    low = table[batch, knot]
    seconds = low + (table[batch, knot + 1] - low) * (position - knot)
    return max(1, int(seconds * scale * 1e9 + 0.5))


@jit
def _prefill_s(table: Array, tokens: int) -> float:
    """Return the time of a whole prompt in seconds: linear between knots, then a parabola.

    Beyond the table the second difference stays what it was at the end: a prompt's operations are
    quadratic in its tokens, for attention, and its time is linear in them.
    """
    if tokens > (PREFILL_KNOTS - 1) * PREFILL_STEP_TOKENS:
        beyond = tokens / PREFILL_STEP_TOKENS - (PREFILL_KNOTS - 1)
        last: float = table[PREFILL_KNOTS - 1]
        rise: float = last - table[PREFILL_KNOTS - 2]
        bend: float = max(0.0, rise - (table[PREFILL_KNOTS - 2] - table[PREFILL_KNOTS - 3]))
        return last + rise * beyond + bend * beyond * (beyond + 1) / 2
    knot = min(tokens // PREFILL_STEP_TOKENS, PREFILL_KNOTS - 2)
    low: float = table[knot]
    high: float = table[knot + 1]
    return low + (high - low) * (tokens / PREFILL_STEP_TOKENS - knot)


@jit
def prefill_chunk_ns(table: Array, scale: float, start_tokens: int, tokens: int) -> int:
    """Return the time of a prefill chunk in ns, at least 1.

    The chunk costs what it adds to the prompt before it, and never less than a prompt of its own
    length: ``max(F(n), F(s + n) - F(s))``.

    Args:
        table: ``CostModel.prefill_table()``, seconds, ``float64[257]``.
        scale: Factor on the time, 1 as profiled.
        start_tokens: Tokens of the prompt already in the KV cache.
        tokens: Tokens of the chunk.
    """
    added = _prefill_s(table, start_tokens + tokens) - _prefill_s(table, start_tokens)
    seconds = max(_prefill_s(table, tokens), added)
    return max(1, int(seconds * scale * 1e9 + 0.5))


@jit
def prefill_alone_ns(table: Array, scale: float, prompt: int) -> int:
    """Return the time of a resident model's prefill of ``prompt`` tokens in ns, chunk by chunk."""
    total, start = 0, 0
    while start < prompt:
        tokens = min(CHUNK_TOKENS, prompt - start)
        total += prefill_chunk_ns(table, scale, start, tokens)
        start += tokens
    return total


@dataclass(frozen=True)
class HeldOut:
    """A measured point predicted from the others of its table."""

    table: str
    point: str
    measured_s: float
    predicted_s: float
    extrapolated: bool

    @property
    def error(self) -> float:
        """Relative error of the prediction, signed."""
        return self.predicted_s / self.measured_s - 1


class CostModel:
    """Seconds of a model's iterations and transfers on a platform.

    A price is what the node needs: the time by itself, and what the loop adds to it
    (``profile.overhead``); but what comes once a segment, or once a piece of a load, a node adds.

    Args:
        profile: The measured or derived profile; ``profile.kind`` tells which.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._decode_curve = DecodeCurve(profile, profile.decode)
        self._prefill_curve = PrefillCurve(profile, profile.prefill)
        self._overhead = profile.overhead or Overhead(decode_s=0, prefill_s=0, kv_s=0)

    def _decode(self, batch: npt.ArrayLike, context_tokens: npt.ArrayLike) -> Array:
        return self._decode_curve(batch, context_tokens) + self._overhead.decode_s

    def _prefill(self, tokens: npt.ArrayLike) -> Array:
        return self._prefill_curve(tokens) + self._overhead.prefill_s

    def decode_s(self, batch: int, context_tokens_per_sequence: float) -> float:
        """Return the time of one decode step of ``batch`` resident sequences."""
        return float(self._decode(batch, context_tokens_per_sequence))

    def prefill_s(self, tokens: int) -> float:
        """Return the time to prefill a whole prompt from empty."""
        return float(self._prefill(tokens))

    def chunk_s(self, start_tokens: int, tokens: int) -> float:
        """Return the time of a prefill chunk after ``start_tokens`` (see ``prefill_chunk_ns``)."""
        added = self.prefill_s(start_tokens + tokens) - self.prefill_s(start_tokens)
        return max(self.prefill_s(tokens), added)

    def stream_layer_s(self, tokens: int = 1) -> float:
        """Return link seconds of one streamed layer in an iteration over ``tokens`` tokens.

        The fixed part, ``profile.stream.fixed_s``, comes once per iteration on top.
        """
        return _interpolate(self.profile.streamed_layer_s, tokens)

    def host_layer_s(self, tokens: int = 1) -> float | None:
        """Return the time of one layer computed on the host, None where not measured."""
        points = self.profile.host_layer_s
        return _interpolate(points, tokens) if points else None

    def load_s(self, n_bytes: float) -> float:
        """Return the time to load ``n_bytes`` of weights in one go."""
        return self.profile.load.seconds(n_bytes)

    def kv_save_s(self, n_bytes: float) -> float:
        """Return the time to move ``n_bytes`` of KV cache to the host."""
        return self.profile.kv_save.seconds(n_bytes) + self._overhead.kv_s

    def kv_restore_s(self, n_bytes: float) -> float:
        """Return the time to move ``n_bytes`` of KV cache back to the device."""
        return self.profile.kv_restore.seconds(n_bytes) + self._overhead.kv_s

    def isolated_latency_s(
        self, prompt_tokens: npt.ArrayLike, output_tokens: npt.ArrayLike
    ) -> Array:
        """Return the latency of requests that are alone on the resident model.

        The prefill yields the first token, and a decode step at batch 1 each further one.

        Args:
            prompt_tokens: Tokens of the prompts, any shape.
            output_tokens: Tokens generated, at least 1, same shape.

        Returns:
            Seconds, in that shape (a 0-d array for two numbers).
        """
        prompt = np.asarray(prompt_tokens, np.int64)
        last = prompt + np.asarray(output_tokens, np.int64) - 1
        # sums[c] is the time of the steps whose KV cache holds 1 .. c tokens afterwards
        sums = np.cumsum(self._decode(1, np.arange(int(np.max(last, initial=0)) + 1)))
        return self._prefill(prompt) + sums[last] - sums[prompt]

    @cached_property
    def _decode_table(self) -> Array:
        batch = np.arange(1, DECODE_BATCHES + 1)[:, None]
        context = np.arange(CONTEXT_KNOTS)[None, :] * CONTEXT_STEP_TOKENS
        return np.vstack([np.zeros((1, CONTEXT_KNOTS)), self._decode(batch, context)])

    def decode_table(self) -> Array:
        """Return seconds at batch ``b`` and mean context ``k * CONTEXT_STEP_TOKENS``.

        Returns:
            ``float64[DECODE_BATCHES + 1, CONTEXT_KNOTS]``, a fresh copy; row 0 is 0.
        """
        return self._decode_table.copy()

    def prefill_table(self) -> Array:
        """Return seconds for prompts of ``j * PREFILL_STEP_TOKENS``; entry 0 is the launch floor.

        Returns:
            ``float64[PREFILL_KNOTS]``, a fresh array.
        """
        return self._prefill(np.arange(PREFILL_KNOTS) * PREFILL_STEP_TOKENS)

    def leave_one_out(self) -> list[HeldOut]:
        """Predict each decode and prefill point from the others of its table.

        Tables with fewer than three points say nothing and are left out, and so are prefill
        points that share one time: pooled at the launch floor, they would predict themselves.
        """
        profile = self.profile
        held: list[HeldOut] = []
        for i, point in enumerate(profile.decode if len(profile.decode) > 2 else ()):
            others = _without(profile.decode, i)
            predicted = float(DecodeCurve(profile, others)(point.batch, point.context_tokens))
            load = point.batch * point.context_tokens
            loads = [other.batch * other.context_tokens for other in others]
            name = f"batch {point.batch} x {point.context_tokens} tokens"
            outside = not min(loads) <= load <= max(loads)
            held.append(HeldOut("decode", name, point.time_s, predicted, outside))
        for i, at in enumerate(profile.prefill if len(profile.prefill) > 2 else ()):
            rest = _without(profile.prefill, i)
            if at.time_s in {other.time_s for other in rest}:
                continue
            predicted = float(PrefillCurve(profile, rest)(at.tokens))
            outside = i in (0, len(profile.prefill) - 1)
            held.append(HeldOut("prefill", f"{at.tokens} tokens", at.time_s, predicted, outside))
        return held


def _without(points: tuple[P, ...], index: int) -> tuple[P, ...]:
    return points[:index] + points[index + 1 :]


def _interpolate(points: tuple[TokenPoint, ...], tokens: int) -> float:
    """Return the time at ``tokens``: linear between points, constant outside them."""
    return float(np.interp(tokens, [p.tokens for p in points], [p.time_s for p in points]))
