"""Profiles by rule, for hardware and models that nobody has measured; always ``kind="derived"``.

``scale_profile`` carries a measured profile to another platform: the launch floor stays, what the
memory paces grows with the ratio of bandwidths, what arithmetic paces with the ratio of rates.
``derive_profile`` makes a profile from a model's shape alone: bytes over bandwidth, operations
over rate, a launch floor per layer. Its constants are fits to the five measured H200 profiles.
"""

from collections.abc import Callable

from mmrl.profiles.costs import CostModel
from mmrl.profiles.schema import (
    Architecture,
    DecodePoint,
    Platform,
    Profile,
    Provenance,
    TokenPoint,
)

# Fits to the measured H200 profiles (five models of 0.5 to 15 billion parameters).
MEMORY_EFFICIENCY = 0.86  # of the data sheet's bandwidth, reached by a copy on the device
DECODE_LAUNCH_S = 118e-6  # per layer, captured in a CUDA graph: .109 to .126 ms
ATTENTION_PASSES = 5.5  # times the KV expanded to all query heads moves per step: 5.3 to 5.8
PREFILL_LAUNCH_S = 0.68e-3  # per layer, eager: .66 to .73 ms
PREFILL_EFFICIENCY = 0.45  # of the data sheet's rate: .39 to .52 from 1.5 billion parameters up

DECODE_GRID = [(batch, context) for batch in (1, 8, 32, 64) for context in (512, 2048, 8192)]
PREFILL_GRID = (16, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
WORKSPACE_TOKENS = 2048  # one prefill chunk
WORKSPACE_BATCH = 64
LIBRARY_BYTES = 128 * 2**20  # matrix library workspaces and captured graphs


def estimate_workspace_bytes(architecture: Architecture) -> int:
    """Estimate device memory beside weights and KV: activations of a chunk, logits of a batch."""
    width = 2 * architecture.intermediate_size + 6 * architecture.hidden_size
    activations = WORKSPACE_TOKENS * width * architecture.bytes_per_value
    logits = WORKSPACE_BATCH * architecture.vocabulary * 2 * 4  # fp32, and a copy to sample from
    return activations + logits + LIBRARY_BYTES


def scale_profile(source: Profile, source_platform: Platform, target: Platform) -> Profile:
    """Derive a model's profile on another platform from its profile on a measured one.

    A decode step is a launch floor, which stays, and memory traffic, which takes longer by the
    ratio of bandwidths. A prefill is the longest of its launch floor, reading the weights, and
    computing, which takes longer by the ratio of rates. Transfers are the target platform's.
    """
    memory_ratio = source_platform.limits.memory_bytes_per_s / target.limits.memory_bytes_per_s
    flop_ratio = source_platform.limits.compute_flop_per_s / target.limits.compute_flop_per_s
    costs = CostModel(source)
    floor = max(0.0, costs.decode_s(1, 0) - _read_s(source.architecture, source_platform))

    def decode_s(batch: int, context: int) -> float:
        return floor + (costs.decode_s(batch, context) - floor) * memory_ratio

    def prefill_s(tokens: int) -> float:
        compute = costs.prefill_compute_s(tokens) * flop_ratio
        return max(costs.prefill_s(0), _read_s(source.architecture, target), compute)

    return _profile(
        source.model,
        source.architecture,
        target,
        [(point.batch, point.context_tokens) for point in source.decode],
        decode_s,
        prefill_s,
        source.workspace_bytes,
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
                f"prefill: launch floor kept, computing x {flop_ratio:.2f} (ratio of rates)",
                "transfers: the target platform's",
                *target.provenance.notes,
            ),
        ),
    )


def derive_profile(model: str, architecture: Architecture, platform: Platform) -> Profile:
    """Derive the profile of an unmeasured model from its shape and the platform's limits."""
    bandwidth = platform.limits.memory_bytes_per_s * MEMORY_EFFICIENCY
    rate = platform.limits.compute_flop_per_s * PREFILL_EFFICIENCY
    expanded = (  # bytes per context token, keys and values repeated for each query head
        2 * architecture.layers * architecture.attention_heads * architecture.head_dim
    ) * architecture.bytes_per_value

    def decode_s(batch: int, context: int) -> float:
        attention = batch * context * expanded * ATTENTION_PASSES / bandwidth
        flop = 2 * batch * architecture.read_bytes / architecture.bytes_per_value
        work = max(_read_s(architecture, platform), flop / rate)
        return architecture.layers * DECODE_LAUNCH_S + work + attention

    def prefill_s(tokens: int) -> float:
        compute = architecture.prefill_flop(float(tokens)) / rate
        launch = architecture.layers * PREFILL_LAUNCH_S
        return max(launch, _read_s(architecture, platform), compute)

    return _profile(
        model,
        architecture,
        platform,
        DECODE_GRID,
        decode_s,
        prefill_s,
        estimate_workspace_bytes(architecture),
        Provenance(
            source=f"shape of {model} and data sheet of {platform.provenance.gpu}",
            command="mmrl.profiles.derive.derive_profile",
            gpu=platform.provenance.gpu,
            link=platform.provenance.link,
            notes=(
                f"decode: {DECODE_LAUNCH_S * 1e6:g} us per layer, weights once, expanded KV "
                f"{ATTENTION_PASSES:g} times at {MEMORY_EFFICIENCY:.0%} of the bandwidth",
                f"prefill: operations at {PREFILL_EFFICIENCY:.0%} of the rate, not below "
                f"{PREFILL_LAUNCH_S * 1e3:g} ms per layer",
                "workspace_bytes: an estimate",
                *platform.provenance.notes,
            ),
        ),
    )


def _read_s(architecture: Architecture, platform: Platform) -> float:
    """Return the time to read all weights once at the bandwidth that is reached in practice."""
    return architecture.read_bytes / (platform.limits.memory_bytes_per_s * MEMORY_EFFICIENCY)


def _profile(
    model: str,
    architecture: Architecture,
    platform: Platform,
    decode_grid: list[tuple[int, int]],
    decode_s: Callable[[int, int], float],
    prefill_s: Callable[[int], float],
    workspace_bytes: int,
    provenance: Provenance,
) -> Profile:
    layer_bytes = architecture.layer_parameters * architecture.bytes_per_value
    return Profile(
        platform=platform.name,
        model=model,
        kind="derived",
        architecture=architecture,
        parameters=architecture.parameters,
        layer_bytes=layer_bytes,
        base_bytes=architecture.base_parameters * architecture.bytes_per_value,
        kv_bytes_per_token=architecture.kv_bytes_per_token,
        workspace_bytes=workspace_bytes,
        usable_bytes=platform.usable_bytes,
        limits=platform.limits,
        decode=tuple(
            DecodePoint(batch=b, context_tokens=c, time_s=decode_s(b, c)) for b, c in decode_grid
        ),
        prefill=tuple(TokenPoint(tokens=n, time_s=prefill_s(n)) for n in PREFILL_GRID),
        streamed_layer_s=(TokenPoint(tokens=1, time_s=layer_bytes / platform.stream.bytes_per_s),),
        load=platform.load,
        stream=platform.stream,
        kv_save=platform.kv_save,
        kv_restore=platform.kv_restore,
        provenance=provenance,
    )
