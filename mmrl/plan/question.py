"""What an operator asks: a fleet with its traffic, and the sites that it might run on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mmrl.errors import InputError
from mmrl.profiles import registry
from mmrl.profiles.link import on_link
from mmrl.profiles.schema import save
from mmrl.scenarios.schema import Scenario, build_scenario
from mmrl.scenarios.sources import unique_names
from mmrl.workloads.fleet import fit_to_fleet
from mmrl.workloads.readers import read_trace

# utilisations (seconds of service alone per second) that are tried, if tables are long enough
LEAST, MOST = 1 / 32, 16.0
CV = 2.0  # of the times between arrivals: bursts, but not as wild as serverless functions


@dataclass(frozen=True)
class Question:
    """A fleet and its traffic.

    Attributes:
        models: Names of models, one architecture may come several times.
        rates_per_s: Requests per second wanted of each model; None: capacity alone is asked for,
            with equal rates.
        traffic: ``workload`` or ``trace`` of a scenario.
        targets: Latency targets, see `mmrl.scenarios.targets`.
        verbs: ``core``, or ``full``: layers of a model may be streamed while it runs.
        about: The traffic in words.
    """

    models: tuple[str, ...]
    rates_per_s: tuple[float, ...] | None
    traffic: dict[str, Any]
    targets: str
    verbs: str
    about: str

    @property
    def names(self) -> tuple[str, ...]:
        """The models, told apart: the second of an architecture is ``name#2``."""
        return unique_names(self.models)

    @property
    def total_per_s(self) -> float | None:
        """The rate wanted of the whole fleet."""
        return None if self.rates_per_s is None else sum(self.rates_per_s)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each model's share of the requests."""
        rates = self.rates_per_s or (1.0,) * len(self.models)
        return tuple(rate / sum(rates) for rate in rates)


@dataclass(frozen=True)
class Site:
    """Where the fleet might run.

    Attributes:
        platform: Name of a platform or its folder.
        budget_gb: Device memory.
        link_gb_per_s: Rate of the link in place of the platform's, or None.
    """

    platform: str
    budget_gb: float
    link_gb_per_s: float | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        name = Path(self.platform).name
        link = "" if self.link_gb_per_s is None else f", link {self.link_gb_per_s:g} GB/s"
        return f"{name}, {self.budget_gb:g} GB{link}"


def ask(
    fleet: Sequence[str],
    targets: str = "sliding",
    lengths: str = "chat",
    trace: Sequence[Path] = (),
    verbs: str = "core",
) -> Question:
    """Read a question as the command line has it.

    Args:
        fleet: ``name`` or ``name=rate`` for each model, a rate for all or for none.
        targets: Kind of latency targets.
        lengths: Length family of generated requests.
        trace: Files of a trace, which then says rates, bursts and lengths.
        verbs: ``core`` or ``full``.

    Raises:
        InputError: A rate is wrong, or a file cannot be read or does not suit the fleet.
    """
    parts = [entry.partition("=") for entry in fleet]
    models = tuple(name for name, _, _ in parts)
    rates = [
        _rate(entry, value) for entry, (_, sign, value) in zip(fleet, parts, strict=True) if sign
    ]
    if not models:
        raise InputError("no model is named", "for example: mmrl plan qwen2.5-7b=0.5 llama3.2-3b=2")
    if trace:
        if rates:
            raise InputError("rates and a trace are given", "the trace has rates: leave one out")
        recording = read_trace(trace, lengths=lengths)
        try:
            fitted = fit_to_fleet(recording, unique_names(models))
        except InputError as error:
            remedy = "add it, or map the trace before: mmrl workload fit --mapping services"
            raise InputError(error.message, remedy) from None
        counts = np.bincount(fitted.model, minlength=len(models))
        if not counts.all():
            silent = unique_names(models)[int(counts.argmin())]
            raise InputError(f"the trace has no request for {silent}", "leave it out of the fleet")
        recorded = tuple(float(count) / fitted.duration_s for count in counts)
        traffic: dict[str, Any] = {"trace": {"paths": [str(p) for p in trace], "lengths": lengths}}
        about = f"{len(fitted):,} recorded requests, stretched in time to each rate"
        return Question(models, recorded, traffic, targets, verbs, about)
    if rates and len(rates) != len(models):
        missing = next(entry for entry in fleet if "=" not in entry)
        raise InputError(f"'{missing}' has no rate, others have", "give all of them one, or none")
    question = Question(models, tuple(rates) or None, {}, targets, verbs, "")
    workload = {
        "arrivals": {"kind": "gamma", "cv": CV},
        "popularity": {"shares": question.shares},
        "lengths": {"family": lengths},
    }
    about = f"Generated requests, lengths of family {lengths}, gamma arrivals with CV {CV:g}"
    return replace(question, traffic={"workload": workload}, about=about)


def _rate(entry: str, value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = np.nan
    if not 0 < rate < np.inf:
        raise InputError(f"'{entry}': '{value}' is not a rate", "requests per second: name=0.5")
    return rate


def sites(
    platforms: Sequence[str], budgets_gb: Sequence[float], links: Sequence[float]
) -> list[Site]:
    """Return the site asked about and its alternatives: each differs from the first in one thing.

    Args:
        platforms: Names or folders, the first is the site's.
        budgets_gb: Device memory, the first is the site's; none: all that is usable.
        links: Rates of the link in GB/s, for alternatives only.

    Raises:
        InputError: A platform is unknown, a number is not positive, or a budget is more than the
            site's platform has.
    """
    for option, values in (("--budget", budgets_gb), ("--link", links)):
        if any(not 0 < value < np.inf for value in values):
            raise InputError(f"{option}: must be a positive number", "in GB, or GB/s for the link")
    places = [registry.get_platform(name) for name in platforms]
    usable = [place.usable_bytes / 1e9 for place in places]
    too_much = max(budgets_gb, default=0.0)
    if too_much > usable[0]:
        raise InputError(
            f"--budget: {too_much:g} GB is more than the {_floor(usable[0])} GB of "
            f"{places[0].name}",
            "lower it, or leave it out for all that is usable",
        )
    budget = budgets_gb[0] if budgets_gb else _floor(usable[0])
    found = [Site(platforms[0], budget)]
    found += [Site(platforms[0], other) for other in budgets_gb[1:]]
    found += [
        Site(other, min(budget, _floor(room)))
        for other, room in zip(platforms[1:], usable[1:], strict=True)
    ]
    found += [Site(platforms[0], budget, link) for link in links]
    return list(dict.fromkeys(found))


def _floor(gigabytes: float) -> float:
    return int(gigabytes * 10) / 10


@contextmanager
def scenario_at(question: Question, site: Site) -> Iterator[Scenario]:
    """Give the scenario of a question at a site; the files of a changed link live as long.

    Its load is the utilisation.

    Raises:
        InputError: A model is unknown, or a field is wrong.
    """
    for model in question.models:
        registry.get_profile(site.platform, model)  # tells of an unknown model before all else
    data = {
        "name": "plan",
        "platform": site.platform,
        "budget_gb": site.budget_gb,
        "models": question.models,
        "targets": question.targets,
        "verbs": question.verbs,
        "utilisation_at_load_1": 1.0,
        "load": (LEAST, MOST),
        **question.traffic,
    }
    if site.link_gb_per_s is None:
        yield build_scenario(data, "plan")
        return
    with TemporaryDirectory() as folder:
        _write_platform(Path(folder), question, site.platform, site.link_gb_per_s)
        yield build_scenario(data | {"platform": folder}, "plan")


def _write_platform(folder: Path, question: Question, platform: str, link_gb_per_s: float) -> None:
    """Write a platform with another link, and the profiles of the fleet on it."""
    source = registry.get_platform(platform)
    for model in dict.fromkeys(question.models):
        profile = registry.get_profile(platform, model)
        moved, changed = on_link(source, profile, link_gb_per_s * 1e9)
        save(folder / f"{model}.json", changed)
    save(folder / registry.PLATFORM_FILE, moved)
