"""What the study says in words: every number in it is looked up in the tables."""

from typing import NamedTuple

import pandas as pd

from mmrl.profiles import registry
from mmrl.profiles.published import HOSTS, PREEMPTIONS, fit_loads
from mmrl.study.sensitivity import RESULTS
from mmrl.study.tables import BATCH, BATCHES, CONTEXT, OUTPUTS, Study


class Contradiction(NamedTuple):
    """A published finding that our system does not share.

    Attributes:
        section: Of the page, by the name of its heading.
        about: What it is about.
        published: The finding and its figures.
        ours: Our figures.
        why: What makes the difference.
    """

    section: str
    about: str
    published: str
    ours: str
    why: str


def ours(study: Study) -> str:
    """Return the platform that the published figures are held against: a measured one, if any."""
    measured = [case.platform.name for case in study.cases if case.profile.kind == "measured"]
    own = [name for name in study.platforms if name not in HOSTS]
    return (measured or own or study.platforms)[0]


def lead(study: Study) -> list[str]:
    """Return the headline and the sentences below it."""
    platform = ours(study)
    table = study.tables["published"]
    mine = table[table.platform == platform]
    bends = at(study, "bends", platform)
    one, many = (bends[bends.batch == batch] for batch in (BATCHES[0], BATCHES[-1]))
    ranked = ranking(study)
    first = [
        ranked[ranked.result == result].sort_values("median").factor.iloc[-1] for result in RESULTS
    ]
    return [
        f"On {platform} a preemption adds {span(mine.ours_s, 2)} s to a run where the published "
        f"system adds {span(mine.published_s, 2)} s",
        f"The same weights, {span(mine.ratio, 0)} times less: they stay in page-locked memory, "
        "and no fixed part comes on top.",
        f"With one sequence the link paces decoding below {percents(one.knee)} of the layers; "
        f"with {BATCHES[-1]}, below {percents(many.knee)}.",
        f"Decode throughput depends most on {first[0]}, the cost of a preemption most on "
        f"{first[1]} (median over models and platforms).",
    ]


def ranking(study: Study) -> pd.DataFrame:
    """Return median and range of the sizes of elasticities, by result and factor."""
    table = study.tables["elasticity"].assign(size=lambda rows: rows.elasticity.abs())
    grouped = table.groupby(["result", "factor"], sort=False)["size"]
    return grouped.agg(median="median", low="min", high="max").reset_index()


def contradictions(study: Study) -> list[Contradiction]:
    """Return where our system differs from the published one, with both figures."""
    platform = ours(study)
    makers = _curve, _neighbours, _cost, _kv_share, _length, _link
    return [make(study, platform) for make in makers]


def _cost(study: Study, platform: str) -> Contradiction:
    table = study.tables["published"]
    mine = table[table.platform == platform]
    loads = fit_loads()
    load = next(case.platform.load for case in study.cases if case.platform.name == platform)
    rates = [loads[host].bytes_per_s / 1e9 for host in HOSTS]
    return Contradiction(
        "preemption",
        "Cost of a preemption",
        f"{span(mine.published_s, 2)} s for 3B to 14B on two hosts: "
        f"{loads[HOSTS[0]].fixed_s:.2f} s + GB / {rates[0]:.1f} and GB / {rates[1]:.1f}.",
        f"{span(mine.ours_s, 2)} s for the same weights on {platform}: "
        f"{load.fixed_s * 1e3:.1f} ms + GB / {load.bytes_per_s / 1e9:.0f}.",
        "Their weights come from pageable memory into a model that is built anew. Ours stay in one "
        "page-locked arena; pages are mapped, one copy per layer runs at the link's rate. Without "
        f"the fixed part theirs would take {span(mine.without_fixed_s, 2)} s, and page-locked on "
        f"their own link {span(mine.page_locked_s, 2)} s.",
    )


def _kv_share(study: Study, platform: str) -> Contradiction:
    table = at(study, "preemption", platform)
    alone = table[table.batch == 1]
    share = (alone.kv_save_s + alone.kv_restore_s) / alone.overhead_s
    return Contradiction(
        "preemption",
        "Share of the KV cache",
        f"{percents(pd.Series([p.kv_share for p in PREEMPTIONS]), 1)} of what a preemption adds.",
        f"{percents(share, 1)} of it with one sequence of {CONTEXT:,} tokens; more with each "
        "further one.",
        "The KV cache goes at the link's rate in both systems. Here the weights do, too, and no "
        "longer dwarf it: with many sequences a victim's KV cache counts beside its size.",
    )


def _curve(study: Study, platform: str) -> Contradiction:
    bends = at(study, "bends", platform)
    one = bends[bends.batch == 1]
    return Contradiction(
        "residency",
        "Shape of the offload curve",
        "An 8B gains mostly above 90 % of its layers on the device, a 70B nearly linearly; the "
        "missing layers are computed by the CPU (no table was recovered).",
        f"The last tenth of the layers brings {percents(one.gain_above_90)} of the gain with one "
        f"sequence, and {percents(bends[bends.batch == BATCHES[-1]].gain_above_90)} with "
        f"{BATCHES[-1]}: above the knee a missing layer costs nothing.",
        "Streaming overlaps with computing, so the curve is flat down to its knee and then a "
        "hyperbola in the missing layers. More sequences move the knee down, because a layer is "
        "streamed once for all of them; on a CPU they cost more." + _launched(study, platform),
    )


def _launched(study: Study, platform: str) -> str:
    """Name the models whose streamed steps are paced by launching them, whatever is missing."""
    found = {
        case.profile.model: case.profile.stream.fixed_s * 1e3
        for case in study.cases
        if case.platform.name == platform
        and case.profile.stream.fixed_s > case.costs.decode_s(1, CONTEXT)
    }
    if not found:
        return ""
    times = span(pd.Series(list(found.values())), 0)
    return (
        f" Of {', '.join(found)} the first missing layer costs most: a streamed step is launched "
        f"kernel by kernel, {times} ms in all, where a resident one replays a graph."
    )


def _neighbours(study: Study, platform: str) -> Contradiction:
    table = at(study, "residency", platform)
    rows = table[(table.batch == BATCH) & (table.layers == 0)]
    return Contradiction(
        "residency",
        "Who pays for partial residency",
        "One request at a time: neighbours were not studied.",
        f"A fully streamed model stretches the steps of a resident copy of itself by a factor of "
        f"{span(rows.neighbour_factor, 2)} (batch {BATCH}, {CONTEXT:,} tokens); two resident "
        f"ones, which alternate, by 2.{_measured_neighbours(study, platform)}",
        "A link-bound iteration holds the device only while it computes. While it waits for its "
        "bytes, iterations of resident models run.",
    )


def _measured_neighbours(study: Study, platform: str) -> str:
    rows = at(study, "neighbours", platform)
    if rows.empty:
        return ""
    return (
        f" Measured, beside the stream of a second instance: {span(rows.beside_stream, 2)}; "
        f"beside its load: {span(rows.beside_load, 2)}."
    )


def _length(study: Study, platform: str) -> Contradiction:
    table = at(study, "outputs", platform)
    short, long = (table[table.output_tokens == n].throughput_50 for n in (OUTPUTS[0], OUTPUTS[-1]))
    share = [table[table.output_tokens == n].preemption_share for n in (OUTPUTS[0], OUTPUTS[-1])]
    return Contradiction(
        "length",
        "Length of the output",
        "Longer outputs worsen the loss by offloading; a preemption costs the same whenever it "
        "comes.",
        f"Half resident, a model keeps {percents(short)} of its throughput over {OUTPUTS[0]} "
        f"tokens and {percents(long)} over {OUTPUTS[-1]:,}. A preemption at the end adds "
        f"{percents(share[0])} to the shorter run and {percents(share[1], 1)} to the longer.",
        "The stream takes the same time whatever the context, while the resident step that it is "
        "held against grows. The KV cache stays on the device and is not computed on by a CPU.",
    )


def _link(study: Study, platform: str) -> Contradiction:
    def elasticity(name: str) -> str:
        rows = at(study, "elasticity", name)
        rows = rows[(rows.result == RESULTS[1]) & (rows.factor == "link rate")]
        return span(rows.elasticity, 2).replace("-", "−")

    loads = fit_loads()
    here = next(case.platform for case in study.cases if case.platform.name == platform)
    host = registry.get_platform(HOSTS[0])
    theirs = " and ".join(f"{loads[name].bytes_per_s / 1e9:.1f}" for name in HOSTS)
    known = [f"{elasticity(name)} on {name}" for name in HOSTS if name in study.platforms]
    return Contradiction(
        "link",
        "Whether the link matters to a preemption",
        f"Weights come back at {theirs} GB/s over a link of {host.link_bytes_per_s / 1e9:.0f} "
        "GB/s: a faster one would change little"
        + (f" (elasticity of the pause {', '.join(known)})." if known else "."),
        f"They come back at {here.load.bytes_per_s / 1e9:.0f} GB/s over a link of "
        f"{here.link_bytes_per_s / 1e9:.0f} GB/s on {platform}: elasticity {elasticity(platform)}.",
        "Building the model anew and copying from pageable memory pace theirs. Page-locked copies "
        "leave nothing but the link.",
    )


def at(study: Study, table: str, platform: str) -> pd.DataFrame:
    """Return the rows of a platform."""
    rows = study.tables[table]
    return rows[rows.platform == platform]


def span(values: "pd.Series[float]", digits: int) -> str:
    """Write the least and the largest value, one where they look the same."""
    low, high = f"{values.min():.{digits}f}", f"{values.max():.{digits}f}"
    return low if low == high else f"{low} to {high}"


def percents(shares: "pd.Series[float]", digits: int = 0) -> str:
    """Write the least and the largest share in per cent."""
    return f"{span(100 * shares, digits)} %"
