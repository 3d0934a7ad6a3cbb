"""Monotone curves through measured points: decode over batch x context, prefill over tokens.

Both follow the shape that the hardware gives (a decode step grows with the KV tokens it reads, a
prefill with its operations), pass through every measured point, never fall when the job grows,
and outside the points go on at the last slope, never faster than the physical bound.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mmrl.profiles.schema import Array, DecodePoint, Profile, TokenPoint


class DecodeCurve:
    """Seconds of one decode step, for any batch and context per sequence.

    Where at least two batches were measured at several contexts each, every batch is a row that
    is linear in context between its points, and time is linear in the batch between rows. At a
    context where only other batches were measured, a row goes on as it would alone (a batch
    measured once takes the rise of the nearest full row, in proportion to its size), but stays
    between the times of smaller and of larger jobs. Fewer points cannot tell batch from context:
    time is then linear, between points, in the KV tokens of the whole batch, which is very nearly
    how it was seen to grow.
    """

    def __init__(self, profile: Profile, points: tuple[DecodePoint, ...]) -> None:
        self._profile = profile
        rows: dict[int, tuple[Array, Array]] = {}
        for batch in sorted({p.batch for p in points}):
            rows[batch] = _curve([(p.context_tokens, p.time_s) for p in points if p.batch == batch])
        full = [batch for batch, (context, _) in rows.items() if len(context) > 1]
        self._rows = rows if len(full) > 1 else {}
        for batch in self._rows.keys() - set(full):
            nearest = min(full, key=lambda other: abs(other - batch))
            context, time = rows[nearest]
            (at,), (measured,) = rows[batch]
            rise = (time - _extended(at, context, time)) * batch / nearest
            rows[batch] = _curve([(at, measured), *zip(context, measured + rise, strict=True)])
        if self._rows:
            self._rows = _completed(rows, points)
        self._chain = _curve([(p.batch * p.context_tokens, p.time_s) for p in points])

    def __call__(self, batch: npt.ArrayLike, context_tokens: npt.ArrayLike) -> Array:
        """Return seconds for batch (>= 1) and mean context per sequence, broadcast together."""
        batch, context = np.broadcast_arrays(
            np.asarray(batch, np.float64), np.asarray(context_tokens, np.float64)
        )
        if self._rows:
            result = self._between_rows(batch, context)
        else:
            result = _extended(batch * context, *self._chain)
        return np.maximum(result, self._profile.decode_bound_s(batch, batch * context))

    def _between_rows(self, batch: Array, context: Array) -> Array:
        batches = list(self._rows)
        times = np.stack([_extended(context, *row) for row in self._rows.values()])
        times = np.maximum.accumulate(times, axis=0)
        result: Array = times[0]
        for i in range(len(batches) - 1):
            low = -np.inf if i == 0 else 0
            high = np.inf if i == len(batches) - 2 else 1
            share = (batch - batches[i]) / (batches[i + 1] - batches[i])
            result = result + np.clip(share, low, high) * (times[i + 1] - times[i])
        return result


def _completed(
    rows: dict[int, tuple[Array, Array]], points: tuple[DecodePoint, ...]
) -> dict[int, tuple[Array, Array]]:
    """Return the rows at all contexts that were measured, between the points around each.

    Nothing that was not measured is then above a larger job that was, or below a smaller one.
    """
    measured = {(p.batch, p.context_tokens): p.time_s for p in points}
    contexts = np.array(sorted({p.context_tokens for p in points}), dtype=np.float64)
    completed = {}
    for batch, row in rows.items():
        times = _extended(contexts, *row)
        for i, context in enumerate(contexts.tolist()):
            if (batch, context) in measured:
                continue
            smaller = [t for (b, c), t in measured.items() if b <= batch and c <= context]
            larger = [t for (b, c), t in measured.items() if b >= batch and c >= context]
            times[i] = max([min([times[i], *larger]), *smaller])
        completed[batch] = contexts, np.maximum.accumulate(times)
    return completed


def _curve(points: Iterable[tuple[float, float]]) -> tuple[Array, Array]:
    """Return rising positions and times that do not fall; times of equal positions are averaged."""
    x, y = np.array(sorted(points), dtype=np.float64).T
    position, group = np.unique(x, return_inverse=True)
    time = np.bincount(group, y) / np.bincount(group)
    return position, np.maximum.accumulate(time)


def _extended(x: npt.ArrayLike, position: Array, time: Array) -> Array:
    """Interpolate linearly; outside, go on at the slope of the first or the last piece."""
    x = np.asarray(x, np.float64)
    if len(position) == 1:
        return np.full_like(x, time[0])
    slope = np.diff(time) / np.diff(position)
    before = np.minimum(x - position[0], 0) * slope[0]
    beyond = np.maximum(x - position[-1], 0) * slope[-1]
    result: Array = np.interp(x, position, time) + before + beyond
    return result


class PrefillCurve:
    """Seconds to prefill a whole prompt from empty, for any number of tokens.

    Piecewise linear in the operations of the prompt, so that attention's quadratic part is in
    the shape. Prompts below the smallest measured one take its time: the launch floor. Between
    the floor and the first point above it the time is that point's, in proportion to operations,
    until it meets the floor (launching kernels and computing overlap).
    """

    def __init__(self, profile: Profile, points: tuple[TokenPoint, ...]) -> None:
        self._profile = profile
        self._work = self._operations([p.tokens for p in points])
        self._time = np.maximum.accumulate([p.time_s for p in points])
        self._rise = int(np.searchsorted(self._time, self._time[0], side="right"))

    def compute_s(self, tokens: npt.ArrayLike) -> Array:
        """Return the computing alone, without the launch floor (0 where only that was seen)."""
        work = self._operations(tokens)
        if self._rise == len(self._work):
            return np.zeros_like(work)
        first, last = self._work[self._rise], self._work[-1]
        result: Array = np.interp(work, self._work[self._rise :], self._time[self._rise :])
        result = np.where(work < first, self._time[self._rise] * work / first, result)
        beyond: Array = np.maximum(work - last, 0) * self._last_slope()
        return result + beyond

    def __call__(self, tokens: npt.ArrayLike) -> Array:
        """Return seconds for prompts of ``tokens`` (0 gives the launch floor)."""
        work = self._operations(tokens)
        chord = np.interp(work, self._work, self._time)
        hinge = np.maximum(self._time[0], self.compute_s(tokens))
        inside = self._rise < len(self._work)
        first = self._work[self._rise] if inside else np.inf
        result: Array = np.where(work < first, np.minimum(chord, hinge), hinge)
        return np.maximum(result, self._profile.prefill_bound_s(tokens))

    def _operations(self, tokens: npt.ArrayLike) -> Array:
        flop: Array = self._profile.architecture.prefill_flop(np.asarray(tokens, np.float64))
        return flop

    def _last_slope(self) -> float:
        """Seconds per operation beyond the last point: the last rise, or its mean if alone."""
        if self._rise == len(self._work) - 1:
            return float(self._time[-1] / self._work[-1])
        rise = np.diff(self._time[self._rise :]) / np.diff(self._work[self._rise :])
        return float(rise[-1])
