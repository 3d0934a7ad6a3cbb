"""Published preemption figures (arXiv 2605.19593) and the load costs that they imply.

The study preempts a running model by saving its KV cache, unloading it and loading it again with
plain PyTorch, on two hosts with the same CPU and different GPUs. ``fit_loads`` turns its totals
into the loads of the derived platforms: one fixed part, which is the host's and its software's,
and a rate for each host. The weights are those of the real models' shapes, in bytes; the study
states 5.9, 15.6 and 28.3 GB, which are near their sizes in GiB.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from mmrl.profiles.schema import Architecture, Transfer

SOURCE = "arXiv 2605.19593, tables II and III, through two digests that agree"
HOSTS = ("study-rtx5000ada", "study-a6000")
RUN_TOKENS = 7000  # that a job generates, undisturbed
CHECKPOINT_TOKENS = 2550  # context at a preemption: the middle of its checkpoints, 100 to 5,000
MIB = 2**20  # its "MB": only so do they agree with the models' shapes


class PublishedModel(NamedTuple):
    """A model that the study preempts.

    Attributes:
        label: As the study's tables call it.
        architecture: Its published shape, 2 bytes per weight.
        kv_mib: KV cache at 5,000 tokens.
        kv_out_s: Seconds to save it, on the first host.
        kv_in_s: Seconds to restore it there.
    """

    label: str
    architecture: Architecture
    kv_mib: float
    kv_out_s: float
    kv_in_s: float


class PublishedPreemption(NamedTuple):
    """What a preemption added to a run, on average over checkpoints.

    Attributes:
        host: The derived platform of that host.
        model: Key of ``MODELS``.
        total_s: Seconds.
        kv_share: Share of it that moves the KV cache; the rest swaps weights.
        run_share: The total over the time of an undisturbed run.
    """

    host: str
    model: str
    total_s: float
    kv_share: float
    run_share: float

    @property
    def swap_s(self) -> float:
        """Seconds that swap weights."""
        return self.total_s * (1 - self.kv_share)

    @property
    def decode_tokens_per_s(self) -> float:
        """Rate of the undisturbed run that the shares imply."""
        return RUN_TOKENS * self.run_share / self.total_s


def _qwen(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, tied: bool, bias: bool
) -> Architecture:
    return Architecture(
        layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        attention_heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        vocabulary=151936,
        tied_embeddings=tied,
        qkv_bias=bias,
    )


MODELS = {
    "qwen2.5-3b": PublishedModel(
        "3B", _qwen(36, 2048, 11008, 16, 2, True, True), 178, 0.0180, 0.0144
    ),
    "qwen3-8b": PublishedModel(
        "8B", _qwen(36, 4096, 12288, 32, 8, False, False), 713, 0.0678, 0.0459
    ),
    "qwen2.5-14b": PublishedModel(
        "14B", _qwen(48, 5120, 13824, 40, 8, False, True), 951, 0.0867, 0.0625
    ),
}
PREEMPTIONS = (
    PublishedPreemption("study-rtx5000ada", "qwen2.5-3b", 2.98, 0.006, 0.0204),
    PublishedPreemption("study-rtx5000ada", "qwen3-8b", 5.16, 0.010, 0.0211),
    PublishedPreemption("study-rtx5000ada", "qwen2.5-14b", 7.31, 0.009, 0.0175),
    PublishedPreemption("study-a6000", "qwen2.5-3b", 2.62, 0.008, 0.0172),
    PublishedPreemption("study-a6000", "qwen3-8b", 4.06, 0.015, 0.0186),
    PublishedPreemption("study-a6000", "qwen2.5-14b", 5.73, 0.012, 0.0161),
)
# Of the second host the study gives ranges only, 9 to 10 GB/s out and 13 to 16 GB/s in.
SECOND_HOST_KV_BYTES_PER_S = (9.5e9, 14.5e9)
# Seconds of a decode step of one sequence by the hooks of accelerate 1.15, by the share of the
# layers that stay on the device; measured for this project with torch 2.11.
HOOKS_GPU, HOOKS_MODEL = "NVIDIA H200", "qwen2.5-7b"
HOOKS_STEP_S = {0.0: 1.705, 0.5: 0.890, 0.75: 0.502}


def weight_bytes(model: str) -> int:
    """Return the bytes of a published model's weights."""
    shape = MODELS[model].architecture
    return shape.parameters * shape.bytes_per_value


def fit_loads(models: Collection[str] = tuple(MODELS)) -> dict[str, Transfer]:
    """Fit the load of each host to the swaps of some models.

    ``swap = fixed_s + weight bytes / bytes_per_s`` with one ``fixed_s`` for both hosts, whose
    CPU and software are the same, and a rate for each; least squares of relative errors.

    Args:
        models: Keys of ``MODELS``, at least two.

    Returns:
        The load by host.
    """
    points = [p for p in PREEMPTIONS if p.model in models]
    rows = np.zeros((len(points), 1 + len(HOSTS)))
    for row, point in zip(rows, points, strict=True):
        row[0] = 1 / point.swap_s
        row[1 + HOSTS.index(point.host)] = weight_bytes(point.model) / point.swap_s
    fixed_s, *per_byte = np.linalg.lstsq(rows, np.ones(len(points)))[0]
    return {
        host: Transfer(fixed_s=float(fixed_s), bytes_per_s=float(1 / slope))
        for host, slope in zip(HOSTS, per_byte, strict=True)
    }


def fit_kv(models: Collection[str] = tuple(MODELS)) -> dict[str, tuple[Transfer, Transfer]]:
    """Fit the KV transfers (save, restore) of each host, least squares over some models.

    The study's times are of the first host; the second has its fixed parts and the rates stated.
    """
    chosen = [MODELS[name] for name in models]
    n_bytes = [model.kv_mib * MIB for model in chosen]
    first = tuple(
        _line(n_bytes, times)
        for times in ([m.kv_out_s for m in chosen], [m.kv_in_s for m in chosen])
    )
    second = tuple(
        Transfer(fixed_s=fitted.fixed_s, bytes_per_s=rate)
        for fitted, rate in zip(first, SECOND_HOST_KV_BYTES_PER_S, strict=True)
    )
    return {HOSTS[0]: (first[0], first[1]), HOSTS[1]: (second[0], second[1])}


def _line(n_bytes: list[float], seconds: list[float]) -> Transfer:
    slope, fixed_s = np.polyfit(n_bytes, seconds, 1)
    return Transfer(fixed_s=max(0.0, float(fixed_s)), bytes_per_s=float(1 / slope))


def predicted_total_s(host: str, model: str, fitted_on: Collection[str]) -> float:
    """Return the preemption total of a model on a host as the fit to some models predicts it."""
    save, restore = fit_kv(fitted_on)[host]
    kv = CHECKPOINT_TOKENS * MODELS[model].architecture.kv_bytes_per_token
    load = fit_loads(fitted_on)[host]
    return save.seconds(kv) + load.seconds(weight_bytes(model)) + restore.seconds(kv)


def held_out_errors() -> dict[tuple[str, str], float]:
    """Predict each model's totals from the other two; return relative errors by (host, model)."""
    return {
        (p.host, p.model): predicted_total_s(p.host, p.model, [m for m in MODELS if m != p.model])
        / p.total_s
        - 1
        for p in PREEMPTIONS
    }
