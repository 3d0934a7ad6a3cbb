"""From raw measurements to a profile and a platform.

A point is the median of its repeats. Transfers are fitted as a fixed part and a rate. Where a
larger job measured shorter than a smaller one, it takes the smaller one's time, as the cost model
would do, and the profile's notes say by how much.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from mmrl.deploy.checkpoint import Checkpoint
from mmrl.deploy.hardware import data_sheet, device_name, driver_and_link, library_versions
from mmrl.deploy.profiler.computing import host_layer_s
from mmrl.deploy.profiler.raw import Raw
from mmrl.deploy.profiler.timing import SPREAD, median, spread
from mmrl.errors import MmrlError
from mmrl.profiles.costs import CostModel
from mmrl.profiles.derive import derive_profile, estimate_workspace_bytes
from mmrl.profiles.schema import (
    DecodePoint,
    Limits,
    LinkRates,
    Overhead,
    Platform,
    Profile,
    Provenance,
    Slowdown,
    TokenPoint,
    Transfer,
)

DIGITS = 6  # more than any of these measurements has
LARGEST_HOST_KV = 64 * 10**9
BUDGETS_GB = (24.0, 48.0, 80.0)
LEAST_SHARE, MOST_SHARE = 0.97, 1.25  # of a copy alone, that a streamed layer takes
TABLES = {
    "decode": ("decode", "more_decode"),
    "prefill": ("prefill",),
    "streamed_layer_s": ("stream",),
    "load": ("load",),
    "kv": ("kv",),
    "host_layer_s": ("host",),
    "slowdown": ("slowdown",),
    "overhead": ("overhead",),
}


@dataclass(frozen=True)
class Machine:
    """What profiles need to know of where they were measured.

    Attributes:
        name: Of the platform.
        device: That was measured.
        raw: Its own measurements.
    """

    name: str
    device: torch.device
    raw: Raw


def fit_transfer(moved: Sequence[tuple[float, float]]) -> Transfer:
    """Fit ``fixed + bytes / rate`` to (bytes, seconds), both parts >= 0.

    Least squares of the relative error, so that short transfers count as much as long ones.
    """
    size, time = np.array(moved, np.float64).T
    design = np.stack([np.ones_like(size), size / 1e9], axis=1) / time[:, None]
    fixed_s, s_per_gb = nnls(design, np.ones_like(time))[0].tolist()
    if s_per_gb == 0:  # times that do not grow with the bytes: all of it is fixed
        s_per_gb = float(np.min(time / size)) * 1e9
    return Transfer(fixed_s=_round(fixed_s), bytes_per_s=_round(1e9 / s_per_gb))


def fit_stream(
    points: Iterable[dict[str, Any]], copies_s: Sequence[float]
) -> tuple[float, tuple[TokenPoint, ...]]:
    """Fit a fixed part per iteration and seconds per streamed layer for each batch.

    Args:
        points: Of streamed steps: ``batch``, ``missing_layers``, ``times_s``.
        copies_s: How long single layers were on the link.

    Returns:
        Seconds per iteration, and seconds of a layer by tokens: near those of a copy. Where
        launching paces the step and not the link, the fixed part takes the difference.
    """
    rows = [(p["batch"], p["missing_layers"], median(p["times_s"])) for p in points if p["times_s"]]
    batches = sorted({batch for batch, _, _ in rows})
    design = np.zeros((len(rows), 1 + len(batches)))
    for i, (batch, missing, time) in enumerate(rows):
        design[i, 0] = 1 / time
        design[i, 1 + batches.index(batch)] = missing / time
    fixed_s, *layers = nnls(design, np.ones(len(rows)))[0].tolist()
    if copies_s:
        copy_s = median(copies_s)
        layers = np.clip(layers, LEAST_SHARE * copy_s, MOST_SHARE * copy_s)
        of = dict(zip(batches, layers, strict=True))
        fixed_s = max(0.0, median([time - missing * of[batch] for batch, missing, time in rows]))
    times = np.maximum.accumulate(layers).tolist()
    return _round(fixed_s), tuple(
        TokenPoint(tokens=batch, time_s=_round(time))
        for batch, time in zip(batches, times, strict=True)
    )


def make_profile(raw: Raw, checkpoint: Checkpoint, machine: Machine) -> Profile:
    """Make the profile of a model from its measurements.

    Raises:
        MmrlError: A section without which there is no profile has failed.
    """
    failed = {name: why for name, why in raw.errors().items() if name in _NEEDED}
    failed |= {name: "not measured" for name in _NEEDED if not raw.has(name) and name not in failed}
    if failed:
        what = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise MmrlError(f"{raw.path}: no profile without {what}", "run the same command again")
    shape = checkpoint.architecture()
    load = fit_transfer([(p["bytes"], median(p["times_s"])) for p in raw.points("load")])
    save, restore = (_kv(raw, way) for way in ("save", "restore"))
    fixed_s, streamed = fit_stream(raw.points("stream"), raw.value("stream", "layer_copies_s", []))
    stream = Transfer(
        fixed_s=fixed_s, bytes_per_s=_round(checkpoint.layer_bytes / streamed[0].time_s)
    )
    notes = [_source_note(checkpoint)]
    decode, prefill = _decode(raw, notes), _prefill(raw, notes)
    platform = make_platform(machine, load, stream, save, restore)
    if not decode or not prefill:
        derived = derive_profile(raw.path.stem, shape, platform)
        decode, prefill = decode or derived.decode, prefill or derived.prefill
        notes.append("the model fits only streamed: decode and prefill are DERIVED from its shape")
    host_layers, host_model = _host(raw)
    notes += _notes(raw, streamed, fixed_s, checkpoint.layers, host_model)
    graphs, *activations = (raw.value("memory", k, 0) for k in ("graphs", "compute", "stream"))
    if not graphs:
        notes.append("workspace_bytes: an estimate")
    profile = Profile.model_construct(
        platform=machine.name,
        model=raw.path.stem,
        kind="measured",
        architecture=shape,
        parameters=checkpoint.parameters,
        layer_bytes=checkpoint.layer_bytes,
        base_bytes=checkpoint.base_bytes,
        kv_bytes_per_token=checkpoint.kv_bytes_per_token,
        workspace_bytes=sum(activations) or estimate_workspace_bytes(shape),
        graphs_bytes=graphs,
        usable_bytes=platform.usable_bytes,
        limits=platform.limits,
        decode=decode,
        prefill=prefill,
        streamed_layer_s=streamed,
        host_layer_s=host_layers,
        load=load,
        stream=stream,
        kv_save=save,
        kv_restore=restore,
        host_model_s=host_model,
        slowdown=_slowdown(raw),
        overhead=None,
        disk=_disk(raw) or platform.disk,
        provenance=_provenance(machine, raw, tuple(notes)),
    )
    if data_sheet(machine.device) is None:
        profile = profile.model_copy(update={"limits": _raised(profile)})
    profile = profile.model_copy(update={"overhead": _overhead(raw, CostModel(profile))})
    return Profile.model_validate(profile.model_dump())


_NEEDED = ("decode", "prefill", "load", "stream", "kv")


def make_platform(
    machine: Machine, load: Transfer, stream: Transfer, kv_save: Transfer, kv_restore: Transfer
) -> Platform:
    """Make the platform of a machine, given transfers that stand for its models'."""
    raw, device = machine.raw, machine.device
    link = {p["kind"]: p["bytes"] / median(p["times_s"]) for p in raw.points("link")}
    rates = {field.removesuffix("_bytes_per_s"): field for field in LinkRates.model_fields}
    usable = int(raw.value("memory", "usable_bytes"))
    fitting = tuple(budget for budget in BUDGETS_GB if budget * 1e9 <= usable)
    by_copy, by_product = _ceilings(raw)
    limits = data_sheet(device) or Limits(memory_bytes_per_s=by_copy, compute_flop_per_s=by_product)
    known = "data sheet" if data_sheet(device) else "what a copy and a matrix product reached"
    available = int(raw.value("memory", "host_available_bytes"))
    return Platform(
        name=machine.name,
        description=f"{device_name(device)}, {driver_and_link(device)[1]}",
        kind="measured",
        memory_bytes=int(raw.value("memory", "memory_bytes", usable)),
        usable_bytes=usable,
        host_kv_bytes=min(LARGEST_HOST_KV, available // 2),
        budgets_gb=fitting or (int(usable / 1e7) / 100 or usable / 1e9,),
        link_bytes_per_s=_round(link["h2d"]),
        limits=limits,
        load=load,
        stream=stream,
        kv_save=kv_save,
        kv_restore=kv_restore,
        link_rates=LinkRates(**{rates[kind]: _round(rate) for kind, rate in link.items()}),
        disk=_disk(raw),
        provenance=_provenance(
            machine,
            raw,
            (
                "load, stream, kv_save, kv_restore: medians of the models measured here",
                f"limits: {known}; a copy on the device reached {by_copy / 1e12:.3g} TB/s, a "
                f"matrix product {by_product / 1e12:.3g} TFLOP/s",
                "usable_bytes: what was free after the context, less a margin; host_kv_bytes: half "
                f"of what the host has free, at most {LARGEST_HOST_KV / 1e9:g} GB",
            ),
        ),
    )


def combine(machine: Machine, profiles: Sequence[Profile]) -> Platform:
    """Make the platform of a machine from the profiles measured on it."""

    def middle(field: str) -> Transfer:
        all_of = [getattr(profile, field) for profile in profiles]
        return Transfer(
            fixed_s=_round(median([t.fixed_s for t in all_of])),
            bytes_per_s=_round(median([t.bytes_per_s for t in all_of])),
        )

    platform = make_platform(
        machine, *(middle(field) for field in ("load", "stream", "kv_save", "kv_restore"))
    )
    limits = Limits(
        memory_bytes_per_s=max(p.limits.memory_bytes_per_s for p in profiles),
        compute_flop_per_s=max(p.limits.compute_flop_per_s for p in profiles),
    )
    return platform.model_copy(update={"limits": limits})


def _decode(raw: Raw, notes: list[str]) -> tuple[DecodePoint, ...]:
    times = {
        (p["batch"], p["context_tokens"]): median(p["times_s"])
        for p in raw.points(*TABLES["decode"])
    }
    found: dict[tuple[int, int], float] = {}
    lifted = 0.0
    for batch, context in sorted(times):
        smaller = [t for (b, c), t in found.items() if b <= batch and c <= context]
        time = max([times[batch, context], *smaller])
        lifted = max(lifted, time / times[batch, context] - 1)
        found[batch, context] = time
    _note_lift(notes, "decode", lifted)
    return tuple(
        DecodePoint(batch=b, context_tokens=c, time_s=_round(t)) for (b, c), t in found.items()
    )


def _prefill(raw: Raw, notes: list[str]) -> tuple[TokenPoint, ...]:
    times = {p["tokens"]: median(p["times_s"]) for p in raw.points(*TABLES["prefill"])}
    tokens = sorted(times)
    measured = np.array([times[n] for n in tokens])
    rising = np.maximum.accumulate(measured) if tokens else measured
    _note_lift(notes, "prefill", float(np.max(rising / measured - 1, initial=0.0)))
    return tuple(
        TokenPoint(tokens=n, time_s=_round(t)) for n, t in zip(tokens, rising.tolist(), strict=True)
    )


def _kv(raw: Raw, way: str) -> Transfer:
    found = [p for p in raw.points("kv") if p["way"] == way]
    plain = [p for p in found if not p["scattered"]] or found
    return fit_transfer([(p["bytes"], median(p["times_s"])) for p in plain])


def _host(raw: Raw) -> tuple[tuple[TokenPoint, ...], tuple[TokenPoint, ...]]:
    """Return seconds of one layer and of the whole model on the host."""
    points = raw.points("host")
    layers = int(raw.value("host", "layers", 1))
    per_layer = [host_layer_s(point, layers) for point in points]
    whole = [median(point["times_s"]) for point in points]
    return tuple(  # type: ignore[return-value]
        tuple(
            TokenPoint(tokens=point["tokens"], time_s=_round(time))
            for point, time in zip(points, np.maximum.accumulate(times).tolist(), strict=True)
        )
        if points
        else ()
        for times in (per_layer, whole)
    )


def _slowdown(raw: Raw) -> Slowdown | None:
    times = [(p["beside"], median(p["times_s"])) for p in raw.points("slowdown") if p["times_s"]]
    factors = {
        busy: took / ((before + after) / 2)
        for (_, before), (busy, took), (alone, after) in zip(
            times, times[1:], times[2:], strict=False
        )
        if alone == "nothing"
    }
    if not {"load", "save", "stream"} <= set(factors):
        return None
    return Slowdown(
        beside_load=_round(factors["load"]),
        beside_save=_round(factors["save"]),
        beside_stream=_round(factors["stream"]),
    )


def _overhead(raw: Raw, costs: CostModel) -> Overhead | None:
    """Return what things took in the loop beyond their price, none where it was less."""
    found = {p["what"]: p for p in raw.points("overhead") if p["times_s"]}
    if not {"decode", "prefill", "save", "restore"} <= set(found):
        return None
    step, chunk = found["decode"], found["prefill"]
    alone = {
        "decode": costs.decode_s(step["batch"], step["context_tokens"]),
        "prefill": costs.prefill_s(chunk["tokens"]),
        "save": costs.kv_save_s(found["save"]["bytes"]),
        "restore": costs.kv_restore_s(found["restore"]["bytes"]),
    }
    took = {what: median(point["times_s"]) for what, point in found.items()}
    added = {what: max(0.0, took[what] - alone[what]) for what in alone}
    settle_s = piece_s = None
    if "settle" in found:
        settle_s = _round(max(0.0, took["settle"] - took["decode"]))
    if "piece" in found:  # some take much longer, and together they make a load
        layer_s = found["piece"]["bytes"] / costs.profile.load.bytes_per_s
        piece_s = _round(max(0.0, fmean(found["piece"]["times_s"]) - layer_s))
    return Overhead(
        decode_s=_round(added["decode"]),
        prefill_s=_round(added["prefill"]),
        kv_s=_round((added["save"] + added["restore"]) / 2),
        settle_s=settle_s,
        piece_s=piece_s,
    )


def _disk(raw: Raw) -> Transfer | None:
    points = raw.points("disk")
    if not points:
        return None
    return Transfer(
        fixed_s=0.0, bytes_per_s=_round(points[0]["bytes"] / median(points[0]["times_s"]))
    )


def _ceilings(raw: Raw) -> tuple[float, float]:
    """Return bytes and operations per second that a copy and a product reached at best."""
    points = {p["kind"]: p for p in raw.points("rates")}
    memory, product = points["memory"], points["product"]
    return memory["bytes"] / min(memory["times_s"]), product["flop"] / min(product["times_s"])


def _raised(profile: Profile) -> Limits:
    """Raise measured ceilings to what the points themselves have reached."""
    over = [
        float(profile.decode_bound_s(p.batch, p.batch * p.context_tokens)) / p.time_s
        for p in profile.decode
    ]
    over += [float(profile.prefill_bound_s(p.tokens)) / p.time_s for p in profile.prefill]
    factor = max(1.0, *over)
    return Limits(
        memory_bytes_per_s=_round(profile.limits.memory_bytes_per_s * factor),
        compute_flop_per_s=_round(profile.limits.compute_flop_per_s * factor),
    )


def _source_note(checkpoint: Checkpoint) -> str:
    kind = "random weights of this shape" if checkpoint.path is None else "the checkpoint's weights"
    return f"{kind}, {str(checkpoint.dtype).removeprefix('torch.')}"


def _note_lift(notes: list[str], table: str, lifted: float) -> None:
    if lifted:
        notes.append(
            f"{table}: times that fell with the size were raised to the smaller's, by at most "
            f"{lifted:.1%}"
        )


def _notes(
    raw: Raw,
    streamed: tuple[TokenPoint, ...],
    fixed_s: float,
    layers: int,
    host_model: tuple[TokenPoint, ...],
) -> list[str]:
    """Say how the fits went, what was left out, and what did not come to rest."""
    errors = [
        abs(_streamed_s(p, streamed, fixed_s) / median(p["times_s"]) - 1)
        for p in raw.points("stream")
    ]
    notes = [
        "decode: CUDA graph where there is a GPU, on the compute worker; KV random and in place",
        "prefill: chunks of 2,048 tokens, one after the other; the first replays a graph",
        f"stream: fixed part and layers fitted to whole steps, within {max(errors):.1%}",
        "slowdown: beside a second instance of the same model",
    ]
    if host_model:
        notes.append(f"host: {raw.value('host', 'threads')} threads, all {layers} layers")
    restless = [table for table, worst in spreads(raw).items() if worst >= SPREAD]
    if restless:
        notes.append(f"did not come to rest within {SPREAD:.0%}: {', '.join(restless)}")
    notes += [f"left out: {one}" for one in raw.left_out()]
    return notes + [f"failed: {name}: {why}" for name, why in raw.errors().items()]


def _streamed_s(point: dict[str, Any], streamed: tuple[TokenPoint, ...], fixed_s: float) -> float:
    layer = next(at.time_s for at in streamed if at.tokens == point["batch"])
    return fixed_s + float(point["missing_layers"]) * layer


def spreads(raw: Raw) -> dict[str, float]:
    """Return the largest spread of a median in each table."""
    found = {}
    for table, sections in TABLES.items():
        times = [p["times_s"] for p in raw.points(*sections) if len(p["times_s"]) > 1]
        if times:
            found[table] = max(spread(one) for one in times)
    return found


def _provenance(machine: Machine, raw: Raw, notes: tuple[str, ...]) -> Provenance:
    driver, link = driver_and_link(machine.device)
    repeats = {}
    for table, sections in TABLES.items():
        counts = [len(p["times_s"]) for p in raw.points(*sections) if p["times_s"]]
        if counts:
            repeats[table] = min(counts)
    return Provenance(
        source=f"raw/{raw.path.name}",
        command=raw.command,
        gpu=device_name(machine.device),
        link=link,
        date=raw.date or datetime.now(UTC).date().isoformat(),
        driver=driver,
        libraries=library_versions(),
        repeats=repeats,
        spread_relative={table: round(value, 4) for table, value in spreads(raw).items()},
        notes=notes,
    )


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
