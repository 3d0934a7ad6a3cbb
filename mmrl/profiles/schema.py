"""The profile file: one (platform, model) pair, its costs as measured points, its provenance.

Units stand in the field names (``_s``, ``_bytes``, ``_tokens``, ``_gb``); 1 GB is 1e9 bytes.
``kind`` tells a measurement from a derivation by rule. Reading a file checks everything that
can be checked without the hardware: signs, order, and that no point is faster than physics.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from mmrl.errors import InputError, first_error
from mmrl.files import write_json

SCHEMA_VERSION: Literal[1] = 1
MEASUREMENT_TOLERANCE = 0.03  # a longer job may measure this much shorter before it is an error
SIZE_TOLERANCE = 0.05  # between stored bytes and the architecture's: padding, odd norms
REMEDY = "correct the field or measure again; docs/profiles.md describes each field"

Kind = Literal["measured", "derived"]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Array = npt.NDArray[np.float64]
Number = TypeVar("Number", float, Array)


class Record(BaseModel):
    """Base of all records: no unknown fields, no NaN or infinity, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Architecture(Record):
    """Shape of a dense decoder with grouped-query attention and a gated feed-forward network."""

    layers: Count
    hidden_size: Count
    intermediate_size: Count
    attention_heads: Count
    kv_heads: Count
    head_dim: Count
    vocabulary: Count
    tied_embeddings: bool
    qkv_bias: bool = False
    bytes_per_value: Count = 2

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: attention, feed-forward network, two norms."""
        query, kv = self.attention_heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * kv)
        bias = query + 2 * kv if self.qkv_bias else 0
        return (
            attention
            + bias
            + 3 * self.hidden_size * self.intermediate_size
            + (2 * self.hidden_size)
        )

    @property
    def base_parameters(self) -> int:
        """Parameters outside the layers: embeddings, final norm and, unless tied, the head."""
        tables = 1 if self.tied_embeddings else 2
        return tables * self.vocabulary * self.hidden_size + self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer_parameters + self.base_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value

    @property
    def read_bytes(self) -> int:
        """Weights that every decode step must read: the layers and the output head."""
        head = self.vocabulary * self.hidden_size
        return (self.layers * self.layer_parameters + head) * self.bytes_per_value

    def prefill_flop(self, tokens: Number) -> Number:
        """Operations of a prompt: 2 per layer parameter and token, and causal attention."""
        return tokens * 2 * self.layers * self.layer_parameters + self.attention_flop(tokens)

    def attention_flop(self, tokens: Number) -> Number:
        """Operations of a prompt's causal attention."""
        return 2 * self.layers * self.attention_heads * self.head_dim * tokens * tokens


class Transfer(Record):
    """Time of one transfer: ``fixed_s + bytes / bytes_per_s``."""

    fixed_s: float = Field(ge=0)
    bytes_per_s: float = Field(gt=0)

    def seconds(self, n_bytes: float) -> float:
        """Return the time to move n_bytes."""
        return self.fixed_s + n_bytes / self.bytes_per_s


class LinkRates(Record):
    """What the link reaches by kind of copy: large plain copies, the measure of all transfers.

    ``both_*`` are the two directions of page-locked copies that run at the same time; pageable host
    memory is what ``tensor.to(device)`` copies from and to.
    """

    h2d_bytes_per_s: float = Field(gt=0)
    d2h_bytes_per_s: float = Field(gt=0)
    both_h2d_bytes_per_s: float = Field(gt=0)
    both_d2h_bytes_per_s: float = Field(gt=0)
    pageable_h2d_bytes_per_s: float = Field(gt=0)
    pageable_d2h_bytes_per_s: float = Field(gt=0)


class Slowdown(Record):
    """Factors on a decode step of this resident model while something else moves or computes.

    A measured factor may be a little below 1: it is one median over another.
    """

    beside_load: float = Field(gt=0)
    beside_save: float = Field(gt=0)
    beside_stream: float = Field(gt=0)


class Overhead(Record):
    """What things take longer in the engine's loop, on a node that is busy, than by themselves.

    A decode step, a prefill chunk of a resident model, the move of a sequence's KV cache in either
    direction, and a piece of a load while others compute. ``settle_s`` comes on top for the first
    step of a segment: what it runs on is known only when the batch has settled, so that it cannot
    be launched behind the step before. Where it was not measured (None), ``decode_s`` is the mean
    of all steps; where ``piece_s`` was not, a load costs what it does on an idle node.
    """

    decode_s: float = Field(ge=0)
    prefill_s: float = Field(ge=0)
    kv_s: float = Field(ge=0)
    settle_s: float | None = Field(default=None, ge=0)
    piece_s: float | None = Field(default=None, ge=0)

    @model_serializer(mode="wrap")
    def _only_measured(self, dump: SerializerFunctionWrapHandler) -> dict[str, float]:
        """Leave out what was not measured, so that older profiles are written as they were."""
        return {field: value for field, value in dump(self).items() if value is not None}


class Limits(Record):
    """What the device cannot exceed (data sheet): bounds for every extrapolation."""

    memory_bytes_per_s: float = Field(gt=0)
    compute_flop_per_s: float = Field(gt=0)

    def decode_bound_s(
        self, shape: Architecture, batch: npt.ArrayLike, kv_bytes: npt.ArrayLike
    ) -> Array:
        """Return the time below which no decode step can fall.

        Weights and KV are read once at the memory's full rate, or two operations are done for
        each of those weights and each sequence, whichever takes longer.
        """
        read = shape.read_bytes
        flop = 2 * np.asarray(batch, np.float64) * (read / shape.bytes_per_value)
        by_memory = (read + np.asarray(kv_bytes, np.float64)) / self.memory_bytes_per_s
        return np.maximum(by_memory, flop / self.compute_flop_per_s)

    def prefill_bound_s(self, shape: Architecture, tokens: npt.ArrayLike) -> Array:
        """Return the time below which no prefill can fall: its operations at the full rate."""
        return shape.prefill_flop(np.asarray(tokens, np.float64)) / self.compute_flop_per_s


class DecodePoint(Record):
    """One decode step of ``batch`` sequences that each hold ``context_tokens``."""

    batch: Count
    context_tokens: Count
    time_s: Seconds


class TokenPoint(Record):
    """Something that takes ``time_s`` for ``tokens`` tokens."""

    tokens: Count
    time_s: Seconds


class Provenance(Record):
    """Where the numbers come from; ``repeats`` and ``spread_relative`` are by table.

    A point is the median of its repeats. The spread is the largest in the table: half the 95 %
    interval of a median, relative to it. ``date`` and ``driver`` are None where not recorded.
    """

    source: str
    command: str
    gpu: str
    link: str
    date: str | None = None
    driver: str | None = None
    libraries: dict[str, str] = {}
    repeats: dict[str, Count] = {}
    spread_relative: dict[str, Annotated[float, Field(ge=0)]] = {}
    notes: tuple[str, ...] = ()


class Platform(Record):
    """A host with one device: memory, link, and the bounds of its hardware."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    description: str
    kind: Kind
    derived_from: str | None = None
    memory_bytes: Count
    usable_bytes: Count
    host_kv_bytes: Count
    budgets_gb: tuple[Annotated[float, Field(gt=0)], ...]
    link_bytes_per_s: float = Field(gt=0)
    limits: Limits
    load: Transfer
    stream: Transfer
    kv_save: Transfer
    kv_restore: Transfer
    link_rates: LinkRates | None = None
    disk: Transfer | None = None
    provenance: Provenance

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.usable_bytes > self.memory_bytes:
            raise ValueError("usable_bytes: more than memory_bytes")
        for budget in self.budgets_gb:
            if budget * 1e9 > self.usable_bytes:
                raise ValueError(f"budgets_gb: {budget:g} GB is more than usable_bytes")
        if (self.kind == "derived") != (self.derived_from is not None):
            raise ValueError("derived_from: needed for a derived platform and only there")
        return self


class Profile(Record):
    """Everything that the cost model knows about one model on one platform."""

    schema_version: Literal[1] = SCHEMA_VERSION
    platform: str
    model: str
    kind: Kind
    architecture: Architecture
    parameters: Count
    layer_bytes: Count
    base_bytes: Count
    kv_bytes_per_token: Count
    workspace_bytes: Count
    graphs_bytes: int = Field(default=0, ge=0)
    usable_bytes: Count
    limits: Limits
    decode: tuple[DecodePoint, ...] = Field(min_length=2)
    prefill: tuple[TokenPoint, ...] = Field(min_length=2)
    streamed_layer_s: tuple[TokenPoint, ...] = Field(min_length=1)
    host_layer_s: tuple[TokenPoint, ...] = ()
    load: Transfer
    stream: Transfer
    kv_save: Transfer
    kv_restore: Transfer
    host_model_s: tuple[TokenPoint, ...] = ()
    slowdown: Slowdown | None = None
    overhead: Overhead | None = None
    disk: Transfer | None = None
    provenance: Provenance

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.architecture.layers

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights: the base and every layer."""
        return self.base_bytes + self.layers * self.layer_bytes

    def decode_bound_s(self, batch: npt.ArrayLike, total_tokens: npt.ArrayLike) -> Array:
        """Return the time below which no decode step can fall, see `Limits`."""
        kv_bytes = np.asarray(total_tokens, np.float64) * self.kv_bytes_per_token
        return self.limits.decode_bound_s(self.architecture, batch, kv_bytes)

    def prefill_bound_s(self, tokens: npt.ArrayLike) -> Array:
        """Return the time below which no prefill can fall, see `Limits`."""
        return self.limits.prefill_bound_s(self.architecture, tokens)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_decode(self)
        for field in ("prefill", "streamed_layer_s", "host_layer_s", "host_model_s"):
            _check_rising(field, getattr(self, field))
        for i, point in enumerate(self.prefill):
            bound = float(self.prefill_bound_s(point.tokens))
            _check_bound(f"prefill.{i}.time_s", point.time_s, bound)
        shape = self.architecture
        _check_size("parameters", self.parameters, shape.parameters)
        _check_size("layer_bytes", self.layer_bytes, shape.layer_parameters * shape.bytes_per_value)
        _check_size("base_bytes", self.base_bytes, shape.base_parameters * shape.bytes_per_value)
        _check_size("kv_bytes_per_token", self.kv_bytes_per_token, shape.kv_bytes_per_token)
        return self


def _check_size(field: str, value: int, expected: int) -> None:
    if abs(value / expected - 1) > SIZE_TOLERANCE:
        raise ValueError(f"{field}: {value:,}, but the architecture's shape makes {expected:,}")


def _check_decode(profile: Profile) -> None:
    keys = [(point.batch, point.context_tokens) for point in profile.decode]
    for i, (batch, context) in enumerate(keys):
        if (batch, context) in keys[:i]:
            raise ValueError(f"decode.{i}: batch {batch} with context {context} stands twice")
    for i, point in enumerate(profile.decode):
        bound = profile.decode_bound_s(point.batch, point.batch * point.context_tokens)
        _check_bound(f"decode.{i}.time_s", point.time_s, float(bound))
        for smaller in profile.decode:
            if smaller.batch > point.batch or smaller.context_tokens > point.context_tokens:
                continue
            if point.time_s < smaller.time_s * (1 - MEASUREMENT_TOLERANCE):
                raise ValueError(
                    f"decode.{i}.time_s: {point.time_s:g} s, but the smaller batch "
                    f"{smaller.batch} with context {smaller.context_tokens} took "
                    f"{smaller.time_s:g} s"
                )


def _check_rising(field: str, points: Sequence[TokenPoint]) -> None:
    for i in range(1, len(points)):
        before, point = points[i - 1], points[i]
        if point.tokens <= before.tokens:
            raise ValueError(f"{field}.{i}.tokens: {point.tokens} after {before.tokens}; must rise")
        if point.time_s < before.time_s * (1 - MEASUREMENT_TOLERANCE):
            raise ValueError(
                f"{field}.{i}.time_s: {point.time_s:g} s for {point.tokens} tokens, but "
                f"{before.tokens} took {before.time_s:g} s; must not fall"
            )


def _check_bound(field: str, time_s: float, bound_s: float) -> None:
    if time_s < bound_s * (1 - MEASUREMENT_TOLERANCE):
        raise ValueError(
            f"{field}: {time_s:g} s is faster than the device's limits allow ({bound_s:.3g} s)"
        )


R = TypeVar("R", Platform, Profile)


def load_platform(path: Path) -> Platform:
    """Read a platform file.

    Raises:
        InputError: It cannot be read or a field is wrong; names the file and the field.
    """
    return _load(path, Platform)


def load_profile(path: Path) -> Profile:
    """Read a profile file.

    Raises:
        InputError: It cannot be read or a field is wrong; names the file and the field.
    """
    return _load(path, Profile)


def save(path: Path, record: Platform | Profile) -> None:
    """Write a platform or profile as JSON, whole or not at all."""
    write_json(path, record.model_dump(mode="json"))


def _load(path: Path, schema: type[R]) -> R:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot read {path}: {reason}", "name a profile file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file", "name a profile file (JSON)") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg})", "correct the line"
        ) from error
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error)}", REMEDY) from error
