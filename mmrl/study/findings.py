"""What the study says in words: every number in it is looked up in the tables."""

from typing import NamedTuple

import pandas as pd

from mmrl.profiles.published import HOSTS, fit_loads
from mmrl.study.sensitivity import RESULTS
from mmrl.study.tables import BATCH, BATCHES, CONTEXT, OUTPUTS, Study


class Contradiction(NamedTuple):
    """A published finding that our system does not share.

    Attributes:
        about: What it is about.
        published: The finding and its figures.
        ours: Our figures.
        why: What makes the difference.
    """

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
    bends = _at(study, "bends", platform)
    one, many = (bends[bends.batch == batch] for batch in (BATCHES[0], BATCHES[-1]))
    ranked = ranking(study)
    first = [
        ranked[ranked.result == result].sort_values("median").factor.iloc[-1] for result in RESULTS
    ]
    return [
        f"On {platform} a preemption adds {_range(mine.ours_s, 2)} s to a run where the published "
        f"system adds {_range(mine.published_s, 2)} s",
        f"The same weights, {_range(mine.ratio, 0)} times less: they stay in page-locked memory, "
        "and no fixed part comes on top.",
        f"With one sequence the link paces decoding below {_percents(one.knee)} of the layers; "
        f"with {BATCHES[-1]}, below {_percents(many.knee)}.",
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
    return [make(study, platform) for make in (_cost, _curve, _neighbours, _length)]


def _cost(study: Study, platform: str) -> Contradiction:
    table = study.tables["published"]
    mine = table[table.platform == platform]
    loads = fit_loads()
    load = next(case.platform.load for case in study.cases if case.platform.name == platform)
    rates = [loads[host].bytes_per_s / 1e9 for host in HOSTS]
    return Contradiction(
        "Cost of a preemption",
        f"{_range(mine.published_s, 2)} s for 3B to 14B on two hosts: "
        f"{loads[HOSTS[0]].fixed_s:.2f} s + GB / {rates[0]:.1f} and GB / {rates[1]:.1f}.",
        f"{_range(mine.ours_s, 2)} s for the same weights on {platform}: "
        f"{load.fixed_s * 1e3:.1f} ms + GB / {load.bytes_per_s / 1e9:.0f}.",
        "Their weights come from pageable memory into a model that is built anew. Ours stay in one "
        "page-locked arena; pages are mapped, one copy per layer runs at the link's rate. Without "
        f"the fixed part theirs would take {_range(mine.without_fixed_s, 2)} s, and page-locked on "
        f"their own link {_range(mine.page_locked_s, 2)} s.",
    )


def _curve(study: Study, platform: str) -> Contradiction:
    bends = _at(study, "bends", platform)
    one = bends[bends.batch == 1]
    return Contradiction(
        "Shape of the offload curve",
        "An 8B gains mostly above 90 % of its layers on the device, a 70B nearly linearly; the "
        "missing layers are computed by the CPU (no table was recovered).",
        f"The last tenth of the layers brings {_percents(one.gain_above_90)} of the gain with one "
        f"sequence, and {_percents(bends[bends.batch == BATCHES[-1]].gain_above_90)} with "
        f"{BATCHES[-1]}: above the knee a missing layer costs nothing.",
        "Streaming overlaps with computing, so the curve is flat down to its knee and then a "
        "hyperbola in the missing layers. More sequences move the knee down, because a layer is "
        "streamed once for all of them; on a CPU they cost more.",
    )


def _neighbours(study: Study, platform: str) -> Contradiction:
    table = _at(study, "residency", platform)
    rows = table[(table.batch == BATCH) & (table.layers == 0)]
    return Contradiction(
        "Who pays for partial residency",
        "One request at a time: neighbours were not studied.",
        f"A fully streamed model stretches the steps of a resident copy of itself by a factor of "
        f"{_range(rows.neighbour_factor, 2)} (batch {BATCH}, {CONTEXT:,} tokens); two resident "
        "ones, which alternate, by 2.",
        "A link-bound iteration holds the device only while it computes. While it waits for its "
        "bytes, iterations of resident models run.",
    )


def _length(study: Study, platform: str) -> Contradiction:
    table = _at(study, "outputs", platform)
    short, long = (table[table.output_tokens == n].throughput_50 for n in (OUTPUTS[0], OUTPUTS[-1]))
    share = [table[table.output_tokens == n].preemption_share for n in (OUTPUTS[0], OUTPUTS[-1])]
    return Contradiction(
        "Length of the output",
        "Longer outputs worsen the loss by offloading; a preemption costs the same whenever it "
        "comes.",
        f"Half resident, a model keeps {_percents(short)} of its throughput over {OUTPUTS[0]} "
        f"tokens and {_percents(long)} over {OUTPUTS[-1]:,}. A preemption at the end adds "
        f"{_percents(share[0])} to the shorter run and {_percents(share[1], 1)} to the longer.",
        "The stream takes the same time whatever the context, while the resident step that it is "
        "held against grows. The KV cache stays on the device and is not computed on by a CPU.",
    )


def _at(study: Study, table: str, platform: str) -> pd.DataFrame:
    rows = study.tables[table]
    return rows[rows.platform == platform]


def _range(values: "pd.Series[float]", digits: int) -> str:
    low, high = f"{values.min():.{digits}f}", f"{values.max():.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _percents(values: "pd.Series[float]", digits: int = 0) -> str:
    return f"{_range(100 * values, digits)} %"
