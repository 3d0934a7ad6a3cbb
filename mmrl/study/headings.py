"""The headings of the page: each is the finding of its section, with numbers from the tables.

They speak of one platform, the one that the published figures are held against.
"""

import math

import pandas as pd

from mmrl.profiles.costs import DECODE_BATCHES
from mmrl.study.findings import at, ours, percents, ranking, span
from mmrl.study.sensitivity import RESULTS
from mmrl.study.tables import BATCH, CONTEXTS, Study

HALF, MOST = 0.5, "throughput_75"


def headings(study: Study) -> dict[str, str]:
    """Return the heading of each section; empty for one that is left out, without numbers."""
    platform = ours(study)
    makers = {
        "residency": _residency,
        "beside": _beside,
        "host": _host,
        "hooks": _hooks,
        "preemption": _preemption,
        "published": _published,
        "length": _length,
        "link": _link,
        "rates": _rates,
        "cold": _cold,
        "pays": _pays,
        "hidden": _hidden,
    }
    found = {name: make(study, platform) for name, make in makers.items()}
    found["scheduler"] = _scheduler(study)
    return found


def _residency(study: Study, platform: str) -> str:
    rows = at(study, "bends", platform)
    one = rows[rows.batch == 1]
    return (
        f"With no layer on the device a model keeps {percents(one.throughput_streamed)} of its "
        f"speed on {platform}; the last tenth of the layers brings {percents(one.gain_above_90)} "
        "of the gain"
    )


def _beside(study: Study, platform: str) -> str:
    rows = at(study, "residency", platform)
    half = rows[(rows.batch == BATCH) & (rows.residency >= HALF)].groupby("model").first()
    kept = half.throughput_beside_load / half.throughput
    text = f"A load beside it leaves a half-resident model {percents(kept)} of its speed"
    slow = at(study, "neighbours", platform)
    if slow.empty:
        return text
    factors = pd.concat([slow.beside_load, slow.beside_stream])
    return f"{text}; a resident one takes {span(factors, 2)} times as long for a step"


def _host(study: Study, platform: str) -> str:
    rows = at(study, "host", platform)
    if rows.empty:
        return ""
    first = rows.groupby("model", sort=False).first()
    host = first[first.crossing_tokens.isna() | (first.crossing_tokens > first.tokens)]
    if host.empty:
        return "Streaming a whole model beats computing it on the host, from the first token on"
    names = [
        f"{model} ({'as far as measured' if math.isnan(tokens) else f'up to {tokens:.0f} tokens'})"
        for model, tokens in host.crossing_tokens.items()
    ]
    others = len(first) - len(host)
    rest = f"; the other {others} are faster streamed from the first token on" if others else ""
    return f"The host computes {' and '.join(names)} faster than the link brings it{rest}"


def _hooks(study: Study, platform: str) -> str:
    rows = at(study, "hooks", platform)
    if rows.empty:
        return ""
    return f"Stock offloading takes {span(rows.ratio, 1)} times as long on the same GPU"


def _preemption(study: Study, platform: str) -> str:
    rows = at(study, "preemption", platform)
    alone = rows[rows.batch == 1]
    kv = (alone.kv_save_s + alone.kv_restore_s) / alone.total_s
    return (
        f"The weights' way back is {percents(alone.reload_s / alone.total_s)} of a preemption on "
        f"{platform}, the KV cache {percents(kv)}"
    )


def _published(study: Study, platform: str) -> str:
    rows = at(study, "published", platform)
    return (
        f"The published system adds {span(rows.published_s, 2)} s for the weights that {platform} "
        f"brings back in {span(rows.ours_s, 2)} s: {span(rows.ratio, 0)} times as much"
    )


def _length(study: Study, platform: str) -> str:
    rows = at(study, "context", platform)
    rows = rows[rows.batch == BATCH].set_index("model")
    short, long = (rows[rows.context_tokens == tokens] for tokens in (CONTEXTS[0], CONTEXTS[-1]))
    return (
        f"From {CONTEXTS[0]} to {CONTEXTS[-1]:,} tokens a preemption takes "
        f"{span(long.total_s / short.total_s, 1)} times as long, while a model with 75 % of its "
        f"layers keeps {percents(long[MOST])} of its speed after {percents(short[MOST])}"
    )


def _link(study: Study, platform: str) -> str:
    rows = at(study, "link", platform)
    rows = rows[rows.batch == BATCH].set_index("model")
    now, twice = (rows[rows.link == name] for name in ("PCIe 5", "PCIe 6"))
    faster = twice[MOST] / now[MOST]
    return (
        f"On PCIe 6 instead of 5 a model with 75 % of its layers decodes {span(faster, 1)} times "
        f"as fast, and a preemption on {platform} takes "
        f"{percents(twice.total_s / now.total_s)} of the time"
    )


def _rates(study: Study, platform: str) -> str:
    rows = at(study, "rates", platform)
    if rows.empty:
        return ""
    down = rows[(rows.way == "to the device") & (rows.beside == "alone")].set_index("memory")
    locked, slow = (float(down.gb_per_s[memory]) for memory in ("page-locked", "pageable"))
    both = rows[rows.beside != "alone"].gb_per_s.sum()
    return (
        f"Page-locked memory fills the link at {locked:.0f} GB/s, {locked / slow:.0f} times as "
        f"fast as pageable; both ways at once it carries {both:.0f} GB/s"
    )


def _cold(study: Study, platform: str) -> str:
    rows = at(study, "cold", platform)
    if rows.empty:
        return ""
    return (
        f"From disk a model takes {span(rows.disk_s / rows.page_locked_s, 0)} times as long as "
        f"from page-locked memory, from pageable {span(rows.pageable_s / rows.page_locked_s, 0)}"
    )


def _scheduler(study: Study) -> str:
    ranked = ranking(study)
    first = [ranked[ranked.result == result].sort_values("median").iloc[-1] for result in RESULTS]
    words = [f"{row.result} depends most on {row.factor} ({row['median']:.1f})" for row in first]
    return f"Per cent for per cent, {words[0]}, {words[1]}"


def _pays(study: Study, platform: str) -> str:
    rows = at(study, "pays", platform)
    steps = rows.steps_vs_streaming.dropna()
    if steps.empty:
        return "Streaming costs nothing here: swapping never beats it"
    return (
        f"Swapping beats streaming the other model after {steps.min():,} to {steps.max():,} steps "
        f"on {platform}, after {int(steps.median()):,} in the median pair"
    )


def _hidden(study: Study, platform: str) -> str:
    rows = at(study, "batches", platform)
    hidden = rows.batch_at_75.notna().sum()
    return (
        f"{DECODE_BATCHES} sequences hide the stream of a quarter of the layers for {hidden} of "
        f"{len(rows)} models on {platform}"
    )
