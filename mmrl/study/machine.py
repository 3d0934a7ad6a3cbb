"""Tables of what was measured of the machine itself: host computation, link, disk, neighbours.

Only measured profiles and platforms know these; derived ones have no rows. Beside them stand
figures of other software on the same hardware and of the published study.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from mmrl.profiles import published
from mmrl.profiles.schema import LinkRates, Platform, Transfer
from mmrl.study.formulas import Case, all_streamed_s, host_crossing_tokens

Row = dict[str, Any]
SHORT = 128  # tokens of context
COPIES = {  # field of the link's rates: from or to which memory, which way, what runs beside it
    "h2d": ("page-locked", "to the device", "alone"),
    "d2h": ("page-locked", "to the host", "alone"),
    "both_h2d": ("page-locked", "to the device", "both ways at once"),
    "both_d2h": ("page-locked", "to the host", "both ways at once"),
    "pageable_h2d": ("pageable", "to the device", "alone"),
    "pageable_d2h": ("pageable", "to the host", "alone"),
}


def _table(columns: Sequence[str], rows: Iterable[Row]) -> pd.DataFrame:
    """Return a table that has its columns even without a row."""
    return pd.DataFrame(list(rows), columns=list(columns))


def _platforms(cases: Sequence[Case]) -> list[Platform]:
    return list({case.platform.name: case.platform for case in cases}.values())


def host(cases: Sequence[Case]) -> pd.DataFrame:
    """Whole iterations computed on the host, and with all layers streamed, over tokens.

    From ``crossing_tokens`` on streaming is the faster one; empty where it is not as far as was
    measured.
    """
    columns = ("platform", "model", "tokens", "host_s", "streamed_s", "crossing_tokens")
    rows: list[Row] = []
    for case in cases:
        crossing = host_crossing_tokens(case.costs)
        for point in case.profile.host_model_s:
            rows.append(
                {"platform": case.platform.name, "model": case.profile.model}
                | {"tokens": point.tokens, "host_s": point.time_s}
                | {"streamed_s": all_streamed_s(case.costs, point.tokens)}
                | {"crossing_tokens": None if crossing == math.inf else crossing}
            )
    return _table(columns, rows).astype({"crossing_tokens": "float64"})


def link_rates(cases: Sequence[Case]) -> pd.DataFrame:
    """Rates of large copies; ``share`` is of page-locked copies to the device alone."""
    columns = ("platform", "memory", "way", "beside", "gb_per_s", "share")
    rows = []
    for platform in _platforms(cases):
        rates = platform.link_rates
        for kind, about in COPIES.items() if rates is not None else ():
            rows.append(
                {"platform": platform.name}
                | dict(zip(("memory", "way", "beside"), about, strict=True))
                | {"gb_per_s": _rate(rates, kind) / 1e9, "share": _rate(rates, kind, "h2d")}
            )
    return _table(columns, rows)


def _rate(rates: LinkRates | None, kind: str, over: str | None = None) -> float:
    """Return a rate in bytes per second, or as a share of another."""
    found: float = getattr(rates, f"{kind}_bytes_per_s")
    return found if over is None else found / _rate(rates, over)


def cold_loads(cases: Sequence[Case]) -> pd.DataFrame:
    """Seconds until a model is on the device: from disk, pageable and page-locked memory.

    From disk: read with nothing cached, then loaded; nothing of the two overlaps.
    """
    columns = ("platform", "model", "weight_bytes", "disk_s", "pageable_s", "page_locked_s")
    rows = []
    for case in cases:
        disk: Transfer | None = case.profile.disk or case.platform.disk
        rates, size = case.platform.link_rates, case.profile.weight_bytes
        if disk is None or rates is None:
            continue
        load_s = case.costs.load_s(size)
        rows.append(
            {
                "platform": case.platform.name,
                "model": case.profile.model,
                "weight_bytes": size,
                "disk_s": disk.seconds(size) + load_s,
                "pageable_s": size / rates.pageable_h2d_bytes_per_s,
                "page_locked_s": load_s,
            }
        )
    return _table(columns, rows)


def neighbours(cases: Sequence[Case]) -> pd.DataFrame:
    """Measured factors on a decode step while another instance loads, saves KV or streams."""
    columns = ("platform", "model", "beside_load", "beside_save", "beside_stream")
    return _table(
        columns,
        (
            {"platform": case.platform.name, "model": case.profile.model}
            | case.profile.slowdown.model_dump()
            for case in cases
            if case.profile.slowdown is not None
        ),
    )


def kv_beside_published(cases: Sequence[Case]) -> pd.DataFrame:
    """The published KV transfers, and ours of as many bytes: medians of a platform's models."""
    columns = ("platform", "model", "mib")
    times = ("published_out_s", "out_s", "published_in_s", "in_s")
    return _table(
        (*columns, *times),
        (
            {
                "platform": platform.name,
                "model": name,
                "mib": model.kv_mib,
                "published_out_s": model.kv_out_s,
                "out_s": platform.kv_save.seconds(model.kv_mib * published.MIB),
                "published_in_s": model.kv_in_s,
                "in_s": platform.kv_restore.seconds(model.kv_mib * published.MIB),
            }
            for platform in _platforms(cases)
            if platform.name not in published.HOSTS
            for name, model in published.MODELS.items()
        ),
    )


def beside_hooks(cases: Sequence[Case]) -> pd.DataFrame:
    """A streamed decode step of one sequence by stock hooks on the same GPU, and ours.

    ``link_bound_s`` is what the missing layers take at the link's rate.
    """
    columns = ("platform", "model", "residency", "hooks_s", "ours_s", "link_bound_s", "ratio")
    rows = []
    for case in cases:
        profile = case.profile
        about = profile.kind, profile.provenance.gpu, profile.model
        if about != ("measured", published.HOOKS_GPU, published.HOOKS_MODEL):
            continue
        for share, hooks_s in published.HOOKS_STEP_S.items():
            held = math.ceil(case.layers * share)  # as a level of a node
            ours_s = case.step_s(held, 1, SHORT)
            bytes_missing = (case.layers - held) * profile.layer_bytes
            rows.append(
                {"platform": case.platform.name, "model": profile.model, "residency": share}
                | {"hooks_s": hooks_s, "ours_s": ours_s, "ratio": hooks_s / ours_s}
                | {"link_bound_s": bytes_missing / case.platform.link_bytes_per_s}
            )
    return _table(columns, rows)
