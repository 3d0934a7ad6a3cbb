"""Profiles by rule, for hardware and models that nobody has measured; always ``kind="derived"``.

``scale_profile`` carries a measured profile to another platform: launching stays, what the memory
paces grows with the ratio of bandwidths, what arithmetic paces with the ratio of rates.
``derive_profile`` makes a profile from a model's shape alone: bytes over bandwidth, operations
over rate, a launch floor per layer. The constants of both stand in ``data/rule.json``, which
``benchmarks/fit_derivation.py`` fits to the measured profiles (``mmrl.profiles.fit_rule``).
"""

import functools
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, ValidationError

from mmrl.errors import InputError, first_error
from mmrl.node.state import CHUNK_TOKENS
from mmrl.profiles.costs import CostModel
from mmrl.profiles.schema import (
    REMEDY,
    Architecture,
    DecodePoint,
    Limits,
    Platform,
    Profile,
    Provenance,
    Record,
    TokenPoint,
)

RULE_FILE = Path(__file__).parent / "data" / "rule.json"

DECODE_GRID = [(batch, context) for batch in (1, 8, 32, 64) for context in (512, 2048, 8192)]
PREFILL_GRID = (16, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
WORKSPACE_BATCH = 64
GRAPHS_LAYER_BYTES = 10 * 2**20  # 20 graphs of some 25 kernels a layer, seen on the H200
LIBRARY_BYTES = 128 * 2**20  # matrix library workspaces and captured graphs


class Rule(Record):
    """What the shape of a model and the limits of a device make of its iterations.

    A decode step takes ``layer_s`` for each layer and ``sequence_s`` for each sequence; reading the
    weights takes ``weight_passes`` times their bytes over the data sheet's bandwidth (or their
    operations at the prefill's rate, if that is longer), the KV cache ``kv_passes`` times its
    bytes and ``expanded_kv_passes`` times the bytes it would have with one KV head per query head.
    A prefill takes ``prefill_layer_s`` for each layer in its first chunk and ``chunk_layer_s`` in
    each further one, reads the weights ``prefill_weight_passes`` times for each chunk and the
    activations (`activation_bytes`) ``activation_passes`` times at the bandwidth, and does its
    operations at a share of the data sheet's rate.

    Attributes:
        fitted_to: The measured profiles, as platform/model.
        decode_error: Largest relative error on their decode points.
        prefill_error: The same on their prefill points.
    """

    layer_s: float = Field(ge=0)
    sequence_s: float = Field(ge=0)
    weight_passes: float = Field(ge=1)
    kv_passes: float = Field(ge=0)
    expanded_kv_passes: float = Field(ge=0)
    prefill_layer_s: float = Field(ge=0)
    chunk_layer_s: float = Field(ge=0)
    prefill_weight_passes: float = Field(ge=1)
    activation_passes: float = Field(ge=0)
    matrix_efficiency: float = Field(gt=0, le=1)
    attention_efficiency: float = Field(gt=0, le=1)
    fitted_to: tuple[str, ...]
    decode_error: float = Field(ge=0)
    prefill_error: float = Field(ge=0)

    def read_s(self, shape: Architecture, bytes_per_s: float) -> float:
        """Return the time to read all weights once, at the bandwidth of a data sheet."""
        return self.weight_passes * shape.read_bytes / bytes_per_s

    def decode_s(self, shape: Architecture, limits: Limits, batch: int, context: int) -> float:
        """Return the time of a decode step of ``batch`` sequences of ``context`` tokens."""
        flop = 2 * batch * shape.read_bytes / shape.bytes_per_value
        rate = limits.compute_flop_per_s * self.matrix_efficiency
        kv = shape.kv_bytes_per_token
        expanded = kv * shape.attention_heads / shape.kv_heads
        moved = batch * context * (self.kv_passes * kv + self.expanded_kv_passes * expanded)
        return (
            self.layer_s * shape.layers
            + self.sequence_s * batch
            + max(self.read_s(shape, limits.memory_bytes_per_s), flop / rate)
            + moved / limits.memory_bytes_per_s
        )

    def prefill_s(self, shape: Architecture, limits: Limits, tokens: int) -> float:
        """Return the time of a whole prompt."""
        chunks = max(1, -(-tokens // CHUNK_TOKENS))
        attention = shape.attention_flop(tokens)
        matrix = shape.prefill_flop(tokens) - attention
        work = matrix / self.matrix_efficiency + attention / self.attention_efficiency
        moved = self.prefill_weight_passes * chunks * shape.read_bytes
        moved += self.activation_passes * activation_bytes(shape, tokens)
        return (
            (self.prefill_layer_s + self.chunk_layer_s * (chunks - 1)) * shape.layers
            + moved / limits.memory_bytes_per_s
            + work / limits.compute_flop_per_s
        )


@functools.cache
def rule() -> Rule:
    """Return the shipped rule."""
    return Rule.model_validate_json(RULE_FILE.read_text(encoding="utf-8"))


def activation_bytes(architecture: Architecture, tokens: int) -> int:
    """Return the activations of so many tokens in all layers: both inner widths, six outer ones."""
    width = 2 * architecture.intermediate_size + 6 * architecture.hidden_size
    return architecture.layers * tokens * width * architecture.bytes_per_value


def estimate_workspace_bytes(architecture: Architecture) -> int:
    """Estimate device memory beside weights and KV: activations of a chunk, logits of a batch."""
    activations = activation_bytes(architecture, CHUNK_TOKENS) // architecture.layers
    logits = WORKSPACE_BATCH * architecture.vocabulary * 2 * 4  # fp32, and a copy to sample from
    return activations + logits + LIBRARY_BYTES


def estimate_graphs_bytes(architecture: Architecture) -> int:
    """Estimate device memory of captured graphs: so much for each layer."""
    return architecture.layers * GRAPHS_LAYER_BYTES


def scale_profile(source: Profile, source_platform: Platform, target: Platform) -> Profile:
    """Derive a model's profile on another platform from its profile on a measured one.

    A decode step is a launch floor, which stays, and memory traffic, which takes longer by the
    ratio of bandwidths. A prefill takes longer by what the rule of derivation says of both
    platforms: it knows what is launching, memory and arithmetic. Transfers are the target's.
    """
    memory_ratio = source_platform.limits.memory_bytes_per_s / target.limits.memory_bytes_per_s
    shape, costs, by = source.architecture, CostModel(source), rule()
    read_s = by.read_s(shape, source_platform.limits.memory_bytes_per_s)
    floor = max(0.0, costs.decode_s(1, 0) - read_s)

    def decode_s(batch: int, context: int) -> float:
        return floor + (costs.decode_s(batch, context) - floor) * memory_ratio

    def prefill_s(tokens: int) -> float:
        here = by.prefill_s(shape, source_platform.limits, tokens)
        return costs.prefill_s(tokens) * by.prefill_s(shape, target.limits, tokens) / here

    return compose_profile(
        source.model,
        shape,
        target,
        [(point.batch, point.context_tokens) for point in source.decode],
        decode_s,
        prefill_s,
        (source.workspace_bytes, source.graphs_bytes),
        Provenance(
            source=f"{source.kind} profile of {source.model} on {source.platform}",
            command="mmrl.profiles.derive.scale_profile",
            date=source.provenance.date,
            gpu=target.provenance.gpu,
            link=target.provenance.link,
            libraries=source.provenance.libraries,
            notes=(
                f"decode: launch floor {floor * 1e3:.2f} ms kept, the rest x {memory_ratio:.2f} "
                "(ratio of memory bandwidths)",
                "prefill: longer by as much as the rule of derivation says, for each length",
                "transfers: the target platform's",
                *target.provenance.notes,
            ),
        ),
    )


def derive_profile(model: str, architecture: Architecture, platform: Platform) -> Profile:
    """Derive the profile of an unmeasured model from its shape and the platform's limits."""
    by = rule()
    return compose_profile(
        model,
        architecture,
        platform,
        DECODE_GRID,
        lambda batch, context: by.decode_s(architecture, platform.limits, batch, context),
        lambda tokens: by.prefill_s(architecture, platform.limits, tokens),
        (estimate_workspace_bytes(architecture), estimate_graphs_bytes(architecture)),
        Provenance(
            source=f"shape of {model} and data sheet of {platform.provenance.gpu}",
            command="mmrl.profiles.derive.derive_profile",
            gpu=platform.provenance.gpu,
            link=platform.provenance.link,
            notes=(
                f"decode: {by.layer_s * 1e6:.0f} us per layer and {by.sequence_s * 1e6:.1f} us per "
                f"sequence, weights {by.weight_passes:.2f} times, KV {by.kv_passes:.1f} times and, "
                f"expanded to the query heads, {by.expanded_kv_passes:.1f} times, at the bandwidth",
                f"prefill: matrices at {by.matrix_efficiency:.0%} and attention at "
                f"{by.attention_efficiency:.0%} of the rate, weights "
                f"{by.prefill_weight_passes:.2f} and activations {by.activation_passes:.1f} times "
                f"at the bandwidth, {by.prefill_layer_s * 1e6:.0f} us per layer and "
                f"{by.chunk_layer_s * 1e6:.0f} us more in each further chunk of "
                f"{CHUNK_TOKENS:,} tokens",
                f"on the profiles it was fitted to, the rule is off by up to {by.decode_error:.0%} "
                f"(decode) and {by.prefill_error:.0%} (prefill)",
                "workspace_bytes, graphs_bytes: estimates",
                *platform.provenance.notes,
            ),
        ),
    )


def compose_profile(
    model: str,
    architecture: Architecture,
    platform: Platform,
    decode_grid: list[tuple[int, int]],
    decode_s: Callable[[int, int], float],
    prefill_s: Callable[[int], float],
    memory_bytes: tuple[int, int],
    provenance: Provenance,
) -> Profile:
    """Return the profile of a shape: sizes follow from it, transfers are the platform's.

    Whatever a rule says, a larger job never takes less time, and none less than the device allows.

    Args:
        model: Name of the model.
        architecture: Its shape.
        platform: Where it runs.
        decode_grid: (batch, context in tokens) of the decode points, in any order.
        decode_s: Seconds of a decode step, by batch and context.
        prefill_s: Seconds of a prefill, by tokens.
        memory_bytes: Workspace and graphs.
        provenance: Where the numbers come from.

    Raises:
        InputError: No profile comes of it; names model, platform and field.
    """
    kv_bytes, limits = architecture.kv_bytes_per_token, platform.limits
    decode: dict[tuple[int, int], float] = {}
    for batch, context in sorted(decode_grid):
        bound = float(limits.decode_bound_s(architecture, batch, batch * context * kv_bytes))
        smaller = [decode[b, c] for b, c in decode if b <= batch and c <= context]
        decode[batch, context] = max([decode_s(batch, context), bound, *smaller])
    prefill: dict[int, float] = {}
    for tokens in PREFILL_GRID:
        bound = float(limits.prefill_bound_s(architecture, tokens))
        prefill[tokens] = max([prefill_s(tokens), bound, *prefill.values()])

    layer_bytes = architecture.layer_parameters * architecture.bytes_per_value
    streamed_s = layer_bytes / platform.stream.bytes_per_s
    try:
        return Profile(
            platform=platform.name,
            model=model,
            kind="derived",
            architecture=architecture,
            parameters=architecture.parameters,
            layer_bytes=layer_bytes,
            base_bytes=architecture.base_parameters * architecture.bytes_per_value,
            kv_bytes_per_token=architecture.kv_bytes_per_token,
            workspace_bytes=memory_bytes[0],
            graphs_bytes=memory_bytes[1],
            usable_bytes=platform.usable_bytes,
            limits=platform.limits,
            decode=tuple(
                DecodePoint(batch=b, context_tokens=c, time_s=decode[b, c]) for b, c in decode_grid
            ),
            prefill=tuple(TokenPoint(tokens=n, time_s=time_s) for n, time_s in prefill.items()),
            streamed_layer_s=(TokenPoint(tokens=1, time_s=streamed_s),),
            load=platform.load,
            stream=platform.stream,
            kv_save=platform.kv_save,
            kv_restore=platform.kv_restore,
            provenance=provenance,
        )
    except ValidationError as error:
        where = f"{model} on {platform.name}"
        raise InputError(f"{where}: {first_error(error)}", REMEDY) from error
