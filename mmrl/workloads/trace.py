"""`Trace`: requests in order of arrival, the one form in which every workload reaches a node."""

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mmrl.errors import InputError
from mmrl.files import atomic_write

CSV_COLUMNS = ("arrival_s", "model", "prompt_tokens", "output_tokens", "class")
INTERACTIVE, BATCH = "interactive", "batch"

ARRAY_TYPES = {
    "arrival_ns": np.int64,
    "model": np.int32,
    "prompt_tokens": np.int32,
    "output_tokens": np.int32,
    "batch_work": np.bool_,
}


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests to a fleet, sorted by arrival.

    Attributes:
        arrival_ns: int64[R], from 0 to below `duration_s`, never falling.
        model: int32[R], index into `model_names`.
        prompt_tokens: int32[R], at least 1.
        output_tokens: int32[R], at least 1.
        batch_work: bool[R]; True for batch work, which has no TPOT target.
        model_names: The fleet (or, as read from a file, the services).
        duration_s: Length of the observed time.
        notes: What was done to make this trace, in order.

    Raises:
        InputError: The above does not hold.
    """

    arrival_ns: NDArray[np.int64]
    model: NDArray[np.int32]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    batch_work: NDArray[np.bool_]
    model_names: tuple[str, ...]
    duration_s: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every invariant of the class.

        Raises:
            InputError: One does not hold; the message names the field and the first request.
        """
        for field, dtype in ARRAY_TYPES.items():
            array = getattr(self, field)
            if array.dtype != dtype or array.shape != (len(self),):
                raise InputError(
                    f"trace field {field} is {array.dtype}{list(array.shape)}, "
                    f"not {np.dtype(dtype)}[{len(self)}]"
                )
        if not 0 < self.duration_s < np.inf:
            raise InputError(f"trace duration_s is {self.duration_s}, not a positive number")
        if not self.model_names or len(set(self.model_names)) < len(self.model_names):
            raise InputError(f"trace model names are not unique: {', '.join(self.model_names)}")
        for name in self.model_names:
            if not name or name != name.strip() or not name.isprintable():
                raise InputError(f"{name!r} is not a model name", "use plain printable text")
        self._refuse("arrival_ns is before the request ahead", np.diff(self.arrival_ns) < 0, 1)
        self._refuse("arrival_ns is negative", self.arrival_ns < 0)
        late = self.arrival_ns >= math.ceil(self.duration_s * 1e9)  # exact, unlike floats
        self._refuse(f"arrival_ns is after the end ({self.duration_s} s)", late)
        stranger = (self.model < 0) | (self.model >= len(self.model_names))
        self._refuse(f"model is not one of the {len(self.model_names)}", stranger)
        self._refuse("prompt_tokens is below 1", self.prompt_tokens < 1)
        self._refuse("output_tokens is below 1", self.output_tokens < 1)

    def _refuse(self, what: str, bad: NDArray[np.bool_], offset: int = 0) -> None:
        if bad.any():
            raise InputError(f"trace request {int(bad.argmax()) + offset}: {what}")

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @property
    def rate_per_s(self) -> float:
        """Requests per second over the whole duration, all models together."""
        return len(self) / self.duration_s

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64[M], the requests of each model."""
        return np.bincount(self.model, minlength=len(self.model_names)).astype(np.int64)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """int64[R], prompt and output of each request together."""
        return self.prompt_tokens.astype(np.int64) + self.output_tokens

    def select(self, kept: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Self:
        """Return the requests of a mask, index array or range, with everything else as it is."""
        return replace(self, **{field: getattr(self, field)[kept] for field in ARRAY_TYPES})

    def with_note(self, note: str) -> Self:
        """Return the same trace with one more note."""
        return replace(self, notes=(*self.notes, note))

    def without_longer(self, most_tokens: int | NDArray[np.int64]) -> Self:
        """Leave out the requests that have more tokens, prompt and output, than they may.

        Args:
            most_tokens: For all requests, or int64[M] for those of each model.

        Raises:
            InputError: None would be left.
        """
        most = np.broadcast_to(most_tokens, len(self.model_names))
        kept = self.tokens <= most[self.model]
        if kept.all():
            return self
        limit = " to ".join(f"{bound:,}" for bound in sorted({int(most.min()), int(most.max())}))
        left = int((~kept).sum())
        note = f"left out {left:,} of {len(self):,} requests: over the limit of {limit} tokens"
        if left == len(self):
            raise InputError(f"no request is within the limit of {limit} tokens")
        return self.select(kept).with_note(note)

    def slice(self, start_s: float, end_s: float) -> Self:
        """Return the requests that arrive in [start_s, end_s), with start_s as the new zero.

        Raises:
            InputError: The window is empty or reaches outside the trace.
        """
        if not 0 <= start_s < end_s <= self.duration_s:
            raise InputError(
                f"window {start_s:g} to {end_s:g} s is not within the trace",
                f"it lasts {self.duration_s:g} s",
            )
        start_ns = round(start_s * 1e9)
        duration_s = end_s - start_s
        end_ns = start_ns + math.ceil(duration_s * 1e9)
        first, last = np.searchsorted(self.arrival_ns, (start_ns, end_ns))
        part = self.select(slice(first, last))
        note = f"window {start_s:g} to {end_s:g} s: {len(part):,} of {len(self):,} requests kept"
        return replace(
            part,
            arrival_ns=part.arrival_ns - start_ns,
            duration_s=duration_s,
            notes=(*self.notes, note),
        )

    def to_csv(self, path: str | Path) -> None:
        """Write our own CSV: a comment line with fleet, duration and notes, then the requests.

        Raises:
            InputError: Nothing can be written at path.
        """
        about = {"models": self.model_names, "duration_s": self.duration_s, "notes": self.notes}
        with atomic_write(path) as file:
            file.write(f"# {json.dumps(about)}\n")
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(CSV_COLUMNS)
            for arrival_ns, model, prompt, output, batch in zip(
                *(getattr(self, field).tolist() for field in ARRAY_TYPES), strict=True
            ):
                arrival_s = f"{arrival_ns // 10**9}.{arrival_ns % 10**9:09d}"
                kind = BATCH if batch else INTERACTIVE
                rows.writerow((arrival_s, self.model_names[model], prompt, output, kind))


def short_name(name: str) -> str:
    """Return name as it fits in a line; functions and services go by long hashes."""
    return name if len(name) <= 32 else f"{name[:12]}..."
