"""The tables of the study, as data frames with units in the column names.

Each function makes one table from cases (a model on a platform); `compute` makes all of them. The
first columns are always ``platform`` and ``model``. Shares of layers and of throughput run from 0
to 1; an empty cell was not measured or does not exist.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mmrl.profiles import published, registry
from mmrl.profiles.derive import derive_profile
from mmrl.profiles.schema import Platform
from mmrl.study import machine, sensitivity
from mmrl.study.formulas import Case, host_wins_below, preemption, with_link
from mmrl.study.node import simulated_preemption_s

BATCHES = (1, 8, 32)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
OUTPUTS = (50, 200, 500, 1000, 2000, 5000)  # those of the published sweep lie between
RESIDENCIES = (0.0, 0.25, 0.5, 0.75, 1.0)  # the levels of a node
LINKS_GB_PER_S = (8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)
# What a PCIe 5 x16 link was measured at, halved and doubled; the last is a data sheet's.
NAMED_LINKS = {
    "PCIe 3": 13.8,
    "PCIe 4": 27.6,
    "PCIe 5": 55.1,
    "PCIe 6": 110.0,
    "NVLink-C2C": 450.0,
}
BATCH, CONTEXT, PROMPT = sensitivity.BATCH, sensitivity.CONTEXT, 128
ABOVE = 0.9  # "above 90 % of the layers", where the published 8B gains most

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """All tables, and what they were made from.

    Attributes:
        cases: The models on their platforms.
        tables: Data frames by name; they are written as files of those names.
    """

    cases: Sequence[Case]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def platforms(self) -> list[str]:
        """Names of the platforms, in order."""
        return list(dict.fromkeys(case.platform.name for case in self.cases))

    @property
    def models(self) -> list[str]:
        """Names of the models, the smallest first."""
        sizes = {case.profile.model: case.profile.weight_bytes for case in self.cases}
        return sorted(sizes, key=lambda model: (sizes[model], model))


def gather(platforms: Iterable[str | Path], models: Iterable[str]) -> list[Case]:
    """Read the profiles of models on platforms.

    Args:
        platforms: Names or folders; all that are shipped where there is none.
        models: Names; all of each platform where there is none.

    Raises:
        InputError: A platform or a model is unknown, or a file is wrong.
    """
    wanted = list(dict.fromkeys(models))
    return [
        Case.of(registry.get_platform(platform), registry.get_profile(platform, model))
        for platform in dict.fromkeys(list(platforms) or registry.platforms())
        for model in wanted or registry.models(platform)
    ]


def compute(cases: Sequence[Case], report: Callable[[str], None] = lambda name: None) -> Study:
    """Make all tables.

    Args:
        cases: At least one.
        report: Told the name of each table before it is made.
    """
    makers: dict[str, Callable[[Sequence[Case]], pd.DataFrame]] = {
        "residency": residency,
        "bends": bends,
        "host": machine.host,
        "neighbours": machine.neighbours,
        "hooks": machine.beside_hooks,
        "preemption": preemptions,
        "published": against_published,
        "published_kv": machine.kv_beside_published,
        "cold": machine.cold_loads,
        "context": by_context,
        "outputs": by_output,
        "link": by_link,
        "rates": machine.link_rates,
        "elasticity": sensitivity.elasticities,
        "pays": sensitivity.preemption_pays,
        "batches": sensitivity.hidden_batches,
    }
    study = Study(cases)
    for name, make in makers.items():
        report(name)
        study.tables[name] = make(cases)
    return study


def _named(case: Case) -> Row:
    return {"platform": case.platform.name, "model": case.profile.model}


def residency(cases: Sequence[Case]) -> pd.DataFrame:
    """Decode steps for every number of resident layers: alone, beside a load, on the host."""
    return pd.DataFrame(row for case in cases for row in _residency(case))


def _residency(case: Case) -> Iterator[Row]:
    for batch in BATCHES:
        resident_s = case.step_s(case.layers, batch, CONTEXT)
        for layers in range(case.layers + 1):
            step_s = case.step_s(layers, batch, CONTEXT)
            beside_s = case.step_beside_load_s(layers, batch, CONTEXT)
            host_s = case.host_step_s(layers, batch, CONTEXT)
            yield _named(case) | {
                "batch": batch,
                "layers": layers,
                "residency": layers / case.layers,
                "step_s": step_s,
                "tokens_per_s": batch / step_s,
                "throughput": resident_s / step_s,
                "throughput_beside_load": resident_s / beside_s,
                "throughput_on_host": None if host_s is None else resident_s / host_s,
                "paced_by": "link" if step_s > resident_s else "device",
                "neighbour_factor": case.neighbour_factor(layers, batch, CONTEXT),
            }


def bends(cases: Sequence[Case]) -> pd.DataFrame:
    """Where the curve of throughput against residency bends, and what lies above 90 %.

    ``knee`` is the corner below which the link paces; ``keeps_90`` and ``keeps_50`` the lowest
    residencies that keep 90 and 50 % of the resident throughput; ``gain_above_90`` the share of
    the whole gain from no layer to all that the last tenth of the layers brings;
    ``host_wins_below`` the residency below which computing on the host beats streaming.
    """
    rows = []
    for case in cases:
        for batch in BATCHES:
            shares = [
                case.step_s(case.layers, batch, CONTEXT) / case.step_s(n, batch, CONTEXT)
                for n in (0.0, ABOVE * case.layers)
            ]
            gain = (1 - shares[1]) / (1 - shares[0]) if shares[0] < 1 else 0.0
            rows.append(
                _named(case)
                | {
                    "batch": batch,
                    "knee": case.knee(batch, CONTEXT),
                    "keeps_90": case.residency_for(0.9, batch, CONTEXT),
                    "keeps_50": case.residency_for(0.5, batch, CONTEXT),
                    "throughput_streamed": shares[0],
                    "gain_above_90": gain,
                    "host_wins_below": host_wins_below(case, batch, CONTEXT),
                }
            )
    return pd.DataFrame(rows)


def preemptions(cases: Sequence[Case]) -> pd.DataFrame:
    """The parts of a preemption of a resident model, and what it adds on a simulated node."""
    rows = []
    for case in cases:
        for batch in BATCHES:
            parts = preemption(case, batch, CONTEXT, case.layers)
            simulated_s = simulated_preemption_s(case, CONTEXT) if batch == 1 else None
            rows.append(
                _named(case)
                | {"batch": batch, "weight_bytes": case.profile.weight_bytes}
                | asdict(parts)
                | {
                    "total_s": parts.total_s,
                    "overhead_s": parts.overhead_s,
                    "simulated_s": simulated_s,
                }
            )
    return pd.DataFrame(rows)


def against_published(cases: Sequence[Case]) -> pd.DataFrame:
    """The published totals beside the same models' on each platform of the cases.

    A model without a profile there gets a derived one. ``ours_s`` is the overhead as a simulated
    node has it; on the study's own hosts, whose system overlaps nothing, the sum of the parts.
    ``without_fixed_s`` and ``page_locked_s`` lead from the published figure to ours: the fixed part
    gone, and then the weights copied at the full rate of the host's own link.
    """
    platforms = {case.platform.name: case.platform for case in cases}
    hosts = published.fit_loads()
    rows = []
    for point in published.PREEMPTIONS:
        link = registry.get_platform(point.host).link_bytes_per_s
        slower = 1 / hosts[point.host].bytes_per_s - 1 / link
        without_fixed_s = point.total_s - hosts[point.host].fixed_s
        for platform in platforms.values():
            if platform.name in published.HOSTS and platform.name != point.host:
                continue
            case = _published_case(cases, platform, point.model)
            if platform.name == point.host:
                context = published.CHECKPOINT_TOKENS
                ours_s = preemption(case, 1, context, case.layers).overhead_s
            else:
                ours_s = simulated_preemption_s(case, published.CHECKPOINT_TOKENS)
            rows.append(
                {"platform": platform.name, "model": point.model}
                | {
                    "profile": case.profile.kind,
                    "host": point.host,
                    "weight_bytes": case.profile.weight_bytes,
                    "published_s": point.total_s,
                    "without_fixed_s": without_fixed_s,
                    "page_locked_s": without_fixed_s - slower * case.profile.weight_bytes,
                    "ours_s": ours_s,
                    "ratio": point.total_s / ours_s,
                }
            )
    return pd.DataFrame(rows)


def _published_case(cases: Sequence[Case], platform: Platform, model: str) -> Case:
    """Return the case of a published model: that of its profile, or of a derived one."""
    for case in cases:
        if case.platform.name == platform.name and case.profile.model == model:
            return case
    return Case.of(platform, derive_profile(model, published.MODELS[model].architecture, platform))


def by_context(cases: Sequence[Case]) -> pd.DataFrame:
    """Throughput of partly resident models, and preemption, against the context."""
    rows = []
    for case in cases:
        for batch in BATCHES:
            for context in CONTEXTS:
                parts = preemption(case, batch, context, case.layers)
                rows.append(
                    _named(case)
                    | {"batch": batch, "context_tokens": context}
                    | _throughputs(case, batch, context)
                    | asdict(parts)
                    | {"total_s": parts.total_s}
                )
    return pd.DataFrame(rows)


def by_output(cases: Sequence[Case]) -> pd.DataFrame:
    """Throughput of partly resident models over whole outputs at batch 1, and preemption's share.

    ``preemption_share`` is the overhead of one preemption at the end over the time of the run.
    """
    rows = []
    for case in cases:
        for output in OUTPUTS:
            resident_s = case.mean_step_s(case.step_s, case.layers, PROMPT, output)
            row = _named(case) | {"output_tokens": output, "resident_tokens_per_s": 1 / resident_s}
            for residency in RESIDENCIES[:-1]:
                step_s = case.mean_step_s(case.step_s, residency * case.layers, PROMPT, output)
                row[f"throughput_{residency * 100:.0f}"] = resident_s / step_s
            overhead_s = preemption(case, 1, PROMPT + output, case.layers).overhead_s
            rows.append(row | {"preemption_share": overhead_s / (output * resident_s)})
    return pd.DataFrame(rows)


def by_link(cases: Sequence[Case]) -> pd.DataFrame:
    """Throughput of partly resident models, and preemption, against the link's rate."""
    named = [(rate, name) for name, rate in NAMED_LINKS.items()]
    rates = sorted([*((rate, None) for rate in LINKS_GB_PER_S), *named], key=lambda pair: pair[0])
    rows = []
    for case in cases:
        for rate, name in rates:
            moved = with_link(case, rate * 1e9)
            for batch in BATCHES:
                parts = preemption(moved, batch, CONTEXT, case.layers)
                rows.append(
                    _named(case)
                    | {"link_gb_per_s": rate, "link": name, "batch": batch}
                    | _throughputs(moved, batch, CONTEXT)
                    | {"knee": moved.knee(batch, CONTEXT)}
                    | asdict(parts)
                    | {"total_s": parts.total_s}
                )
    return pd.DataFrame(rows)


def _throughputs(case: Case, batch: int, context: int) -> Row:
    """Return the share of the resident throughput at each partial level, as percent columns."""
    resident_s = case.step_s(case.layers, batch, context)
    return {
        f"throughput_{level * 100:.0f}": resident_s
        / case.step_s(level * case.layers, batch, context)
        for level in RESIDENCIES[:-1]
    }
