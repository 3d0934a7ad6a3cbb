"""Turn the raw H200 measurements into the profiles that mmrl ships.

    python benchmarks/convert_h200_probe.py FOLDER [--out mmrl/profiles/data/h200]

FOLDER holds h200_probe_1.json to h200_probe_3.json. Every number is either copied from a
measurement, fitted to several, or an estimate that the profile's notes call one. Not used,
because they are wrong or measure something else: basic.decode_ms (allocator growth of a cache
that is concatenated), the streamed rows at 1.0 (the same), offload_stock_accelerate (weights came
from the GPU), link_bound_ms of probe 2 (stale layer size).
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression, nnls

from mmrl.profiles.derive import estimate_workspace_bytes
from mmrl.profiles.schema import (
    Architecture,
    DecodePoint,
    Limits,
    Platform,
    Profile,
    Provenance,
    TokenPoint,
    Transfer,
    save,
)

Probe = dict[str, Any]

DECODE_POINTS = {"b1c512": (1, 512), "b8c1024": (8, 1024), "b32c1024": (32, 1024)}
STREAM_BATCHES = {"b1": 1, "b8": 8, "b32": 32}
HOST_BATCHES = {"b1": 1, "b8": 8}
LINK_BOUND = 1.1  # a streamed step within this factor of its link bound is paced by the link
USABLE_SHARE = 0.96  # of the device memory: the rest is the driver's and the libraries'
LIMITS = Limits(memory_bytes_per_s=4.8e12, compute_flop_per_s=989e12)  # H200 SXM, dense bf16
HOST_KV_BYTES = 64_000_000_000
OUT = Path(__file__).parents[1] / "mmrl" / "profiles" / "data" / "h200"


def qwen(hidden: int, inner: int, layers: int, heads: int, kv: int, tied: bool) -> Architecture:
    return Architecture(
        layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        attention_heads=heads,
        kv_heads=kv,
        head_dim=hidden // heads,
        vocabulary=151936,
        tied_embeddings=tied,
        qkv_bias=True,
    )


ARCHITECTURES = {
    "qwen2.5-0.5b": qwen(896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": qwen(1536, 8960, 28, 12, 2, True),
    "llama3.2-3b": Architecture(
        layers=28,
        hidden_size=3072,
        intermediate_size=8192,
        attention_heads=24,
        kv_heads=8,
        head_dim=128,
        vocabulary=128256,
        tied_embeddings=True,
    ),
    "qwen2.5-7b": qwen(3584, 18944, 28, 28, 4, False),
    "qwen2.5-14b": qwen(5120, 13824, 48, 40, 8, False),
}


def convert(folder: Path) -> dict[str, Platform | Profile]:
    """Return the records of the H200 by file name."""
    probe, probe2, probe3 = (
        json.loads((folder / f"h200_probe_{i}.json").read_text()) for i in (1, 2, 3)
    )
    stream = _fit_stream(probe)
    profiles = {name: _profile(name, probe, probe2, probe3, stream) for name in ARCHITECTURES}
    platform = Platform(
        name="h200",
        description="One NVIDIA H200 on PCIe 5 x16, 16 CPU cores",
        kind="measured",
        memory_bytes=probe["link"]["mem"],
        usable_bytes=_usable(probe),
        host_kv_bytes=HOST_KV_BYTES,
        budgets_gb=(24, 48, 80),
        link_bytes_per_s=probe["link"]["1024MiB"]["h2d_pinned"] * 1e9,
        limits=LIMITS,
        load=_median([profile.load for profile in profiles.values()]),
        stream=stream,
        kv_save=_median([profile.kv_save for profile in profiles.values()]),
        kv_restore=_median([profile.kv_restore for profile in profiles.values()]),
        provenance=_provenance(
            probe,
            (
                "load, kv_save, kv_restore: median of the five models",
                "usable_bytes: estimate, 96 % of the memory; host_kv_bytes: a choice",
                "limits: data sheet; a copy on the device reached "
                f"{probe['link']['d2d_rw'] / 1e3:.2f} TB/s",
                "decode of a resident model beside another's stream: 3 % slower",
            ),
        ),
    )
    return {"platform.json": platform} | {f"{n}.json": p for n, p in profiles.items()}


def _profile(name: str, probe: Probe, probe2: Probe, probe3: Probe, stream: Transfer) -> Profile:
    shape, basic, reload = ARCHITECTURES[name], probe[f"{name}.basic"], probe[f"{name}.reload"]
    kv = probe[f"{name}.kv"]
    _check_shape(name, shape, basic, kv)
    prefill, prefill_spread = _prefill(basic["prefill_ms"], kv)
    streamed, streamed_note = _streamed(probe, name, stream)
    spread = {"prefill": prefill_spread}
    if name == "llama3.2-3b":  # the step at batch 8, context 1024 was measured in all three probes
        spread["decode"] = _spread(
            [
                probe[f"{name}.cuda_graph"]["b8c1024"]["graph_ms"],
                probe2["contention"]["step_alone_ms"],
                probe3["beside"]["B_alone_ms"],
            ]
        )
    graph = probe[f"{name}.cuda_graph"]
    return Profile(
        platform="h200",
        model=name,
        kind="measured",
        architecture=shape,
        parameters=basic["params"],
        layer_bytes=basic["layer_bytes"],
        base_bytes=basic["weight_bytes"] - basic["layers"] * basic["layer_bytes"],
        kv_bytes_per_token=kv["1024"]["bytes"] // 1024,
        workspace_bytes=estimate_workspace_bytes(shape),
        usable_bytes=_usable(probe),
        limits=LIMITS,
        decode=tuple(
            DecodePoint(batch=b, context_tokens=c, time_s=_s(graph[key]["graph_ms"]))
            for key, (b, c) in DECODE_POINTS.items()
        ),
        prefill=prefill,
        streamed_layer_s=streamed,
        host_layer_s=_host(probe[f"{name}.offload_cpu_compute"], shape.layers),
        load=_load(probe, reload, probe3["remap"], shape.layers),
        stream=stream,
        kv_save=_fit_transfer([(kv[n]["bytes"], kv[n]["save_ms"] / 1e3) for n in kv]),
        kv_restore=_fit_transfer([(kv[n]["bytes"], kv[n]["restore_ms"] / 1e3) for n in kv]),
        provenance=_provenance(
            probe,
            (
                "random weights of the published shape, bf16, sdpa attention",
                "decode: CUDA graph over a static cache that is read to its full length",
                "prefill: eager; the smaller of two measurements of a size, points at the launch "
                "floor pooled",
                streamed_note,
                "load: pages mapped, then copied into fresh pages (copy rate of this model's "
                "reload x that of the 3B into fresh pages over its reload)",
                "host_layer_s: all layers on the CPU, copies between devices included"
                if "0.0" in probe[f"{name}.offload_cpu_compute"]
                else "host_layer_s: not measured with all layers on the CPU",
                "workspace_bytes: estimate (activations of a chunk of 2,048 tokens, logits of 64 "
                "sequences); usable_bytes: estimate, 96 % of the memory",
            ),
            repeats={"decode": 10, "prefill": 3, "streamed_layer_s": 4, "load": 3, "kv": 3},
            spread=spread,
        ),
    )


def _check_shape(name: str, shape: Architecture, basic: Probe, kv: Probe) -> None:
    """Stop where the published shape and the measured bytes disagree."""
    computed = (shape.layers, shape.parameters, shape.layer_parameters * 2)
    if computed != (basic["layers"], basic["params"], basic["layer_bytes"]):
        raise SystemExit(f"{name}: shape makes {computed}, measured {basic}")
    if any(kv[n]["bytes"] != int(n) * shape.kv_bytes_per_token for n in kv):
        raise SystemExit(f"{name}: shape makes {shape.kv_bytes_per_token} KV bytes per token")


def _prefill(alone_ms: Probe, kv: Probe) -> tuple[tuple[TokenPoint, ...], float]:
    """Return the points and the largest spread of a size that was measured twice.

    Whatever disturbs a step makes it longer, so the smaller of two measurements is kept. Times
    that fall with the tokens are noise at the launch floor and are pooled.
    """
    sizes: dict[int, list[float]] = {}
    for key, value in alone_ms.items():
        if key.startswith("b1n"):
            sizes.setdefault(int(key[3:]), []).append(value)
    for n in kv:
        sizes.setdefault(int(n), []).append(kv[n]["recompute_ms"])
    tokens = sorted(sizes)
    pooled = isotonic_regression([min(sizes[n]) for n in tokens]).x
    points = tuple(
        TokenPoint(tokens=n, time_s=_s(t)) for n, t in zip(tokens, pooled.tolist(), strict=True)
    )
    return points, max(_spread(values) for values in sizes.values())


def _fit_stream(probe: Probe) -> Transfer:
    """Fit fixed part and rate to whole steps of the models whose streamed step the link paces."""
    moved = []
    for name, shape in ARCHITECTURES.items():
        row = probe[f"{name}.offload_streamed"]["0.0"]
        if row["b1"] <= LINK_BOUND * row["bound_ms"]:
            moved.append((shape.layers * shape.layer_parameters * 2, row["b1"] / 1e3))
    return _fit_transfer(moved)


def _streamed(probe: Probe, name: str, stream: Transfer) -> tuple[tuple[TokenPoint, ...], str]:
    shape, row = ARCHITECTURES[name], probe[f"{name}.offload_streamed"]["0.0"]
    if row["b1"] > LINK_BOUND * row["bound_ms"]:
        time_s = _round(shape.layer_parameters * 2 / stream.bytes_per_s)
        return (
            (TokenPoint(tokens=1, time_s=time_s),),
            f"streamed_layer_s: from the fitted rate; the measured step ({row['b1']:.1f} ms) was "
            "paced by eager launches, not by the link",
        )
    per_layer = [(row[key] / 1e3 - stream.fixed_s) / shape.layers for key in STREAM_BATCHES]
    pooled = isotonic_regression(per_layer).x.tolist()
    points = tuple(
        TokenPoint(tokens=n, time_s=_round(t))
        for n, t in zip(STREAM_BATCHES.values(), pooled, strict=True)
    )
    return points, "streamed_layer_s: a step that streams every layer, less the fixed part"


def _host(rows: Probe, layers: int) -> tuple[TokenPoint, ...]:
    if "0.0" not in rows:
        return ()
    return tuple(
        TokenPoint(tokens=n, time_s=_s(rows["0.0"][key] / layers))
        for key, n in HOST_BATCHES.items()
    )


def _load(probe: Probe, reload: Probe, remap: Probe, layers: int) -> Transfer:
    into_fresh_pages = remap["copy_GBps"] / probe["llama3.2-3b.reload"]["h2d_GBps"]
    return Transfer(
        fixed_s=_round(remap["map_first_ms"] / 1e3 * layers / remap["layers"]),
        bytes_per_s=_round(reload["h2d_GBps"] * 1e9 * into_fresh_pages),
    )


def _fit_transfer(moved: list[tuple[int, float]]) -> Transfer:
    """Least squares of the relative error of ``fixed + bytes / rate``, both >= 0."""
    size, time = np.array(moved).T
    design = np.stack([np.ones_like(size), size / 1e9], axis=1) / time[:, None]
    fixed_s, s_per_gb = nnls(design, np.ones_like(time))[0].tolist()
    return Transfer(fixed_s=_round(fixed_s), bytes_per_s=_round(1e9 / s_per_gb))


def _median(transfers: list[Transfer]) -> Transfer:
    return Transfer(
        fixed_s=median(t.fixed_s for t in transfers),
        bytes_per_s=median(t.bytes_per_s for t in transfers),
    )


def _provenance(
    probe: Probe,
    notes: tuple[str, ...],
    repeats: dict[str, int] | None = None,
    spread: dict[str, float] | None = None,
) -> Provenance:
    return Provenance(
        source="h200_probe_1.json, h200_probe_2.json, h200_probe_3.json",
        command="python benchmarks/convert_h200_probe.py FOLDER",
        gpu=probe["link"]["gpu"],
        link="PCIe 5 x16, page-locked host memory",
        libraries={key: probe[key] for key in ("torch", "transformers", "accelerate")},
        repeats=repeats or {},
        spread_relative=spread or {},
        notes=("date and driver were not recorded", *notes),
    )


def _usable(probe: Probe) -> int:
    return int(probe["link"]["mem"] * USABLE_SHARE)


def _spread(values: list[float]) -> float:
    return _round(max(values) / min(values) - 1)


def _s(milliseconds: float) -> float:
    return _round(milliseconds / 1e3)


def _round(value: float) -> float:
    """Six digits: more than any of these measurements has."""
    return float(f"{value:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder with h200_probe_*.json")
    parser.add_argument("--out", type=Path, default=OUT, help="where the profiles go")
    arguments = parser.parse_args()
    for name, record in convert(arguments.folder).items():
        save(arguments.out / name, record)
        print(arguments.out / name)


if __name__ == "__main__":
    main()
