"""`Scenario`: platform, fleet, workload, targets and verbs, as a user writes them in TOML.

Whatever may vary between episodes is a range or a list to draw from; `sampler` draws it. An
unknown field or value is an `InputError` that names the field and the nearest name that exists.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mmrl.errors import InputError, first_error, nearest
from mmrl.node.state import MAX_MODELS
from mmrl.scenarios.targets import Targets
from mmrl.workloads.fleet import Mapping
from mmrl.workloads.generators import WorkloadSpec, as_range

if TYPE_CHECKING:
    from mmrl.scenarios.mixture import ScenarioSampler

REMEDY = "docs/scenarios.md describes each field"


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


def _rising(range_: tuple[Any, Any]) -> tuple[Any, Any]:
    if range_[0] > range_[1]:
        raise ValueError(f"[{range_[0]:g}, {range_[1]:g}]: the lower end comes first")
    return range_


Names = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
# A number, or [low, high] to draw it from uniformly.
PositiveRange = Annotated[
    tuple[Positive, Positive], BeforeValidator(as_range), AfterValidator(_rising)
]
FleetSize = Annotated[int, Field(ge=1, le=MAX_MODELS)]
SizeRange = Annotated[
    tuple[FleetSize, FleetSize], BeforeValidator(as_range), AfterValidator(_rising)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FleetSpec(_Strict):
    """Fleets to draw from.

    Attributes:
        size: How many models.
        choose_from: Each model is one of these with equal chance; the same architecture may come
            several times, as fine-tunes of one base model do.
        at_least_one_of: The fleet has one of these at least; empty for no such rule.
        between: So many further sizes between each two neighbours in size of `choose_from`, by
            interpolation (`mmrl.profiles.interpolate`), may be drawn too.
    """

    size: SizeRange
    choose_from: Names
    between: Annotated[int, Field(ge=0, le=8)] = 0
    at_least_one_of: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()

    @model_validator(mode="after")
    def _choosable(self) -> "FleetSpec":
        for name in self.at_least_one_of:
            if name not in self.choose_from:
                raise ValueError(f"at_least_one_of: '{name}' is not in choose_from")
        return self


class TraceSpec(_Strict):
    """Recorded requests in place of a generated workload, fitted to the fleet and the load.

    Attributes:
        paths: The files, all of one format.
        format: Name of the format; told from the columns unless given.
        mapping: How services become models, see `mmrl.workloads.fleet.fit_to_fleet`.
        lengths: Length family of counts per minute, which record no lengths.
        skip_bad: Skip bad rows instead of refusing the file.
    """

    paths: Annotated[tuple[Path, ...], BeforeValidator(_as_list), Field(min_length=1)]
    format: str | None = None
    mapping: Mapping = "auto"
    lengths: str = "chat"
    skip_bad: bool = False


class RewardSpec(_Strict):
    """Weights of the reward: each miss, and each second of waiting over isolated latency.

    A request's waits over its isolated latency add up to its normalised latency, so that the
    weights are those of the tuner's objective. With ten times the latency weight, two thirds of the
    reward are latency, most of it of overloaded nodes: nothing is learned about goodput.
    """

    miss: Annotated[float, Field(ge=0)] = 1.0
    latency: Annotated[float, Field(ge=0)] = 0.005


class Scenario(_Strict):
    """What a scheduler is trained or judged on.

    Attributes:
        name: Name of the scenario (the file's, unless given).
        description: One line.
        platform: A platform's name or the folder of its profiles; of a list, each episode draws
            one.
        budget_gb: Device memory for weights and KV cache.
        budget_fraction: The same as a fraction of the fleet's total weights; raised to what the
            largest model needs, and never more than the platform's usable memory.
        models: A fixed fleet, in order of popularity unless the workload says otherwise.
        fleet: Or fleets to draw from.
        workload: Generated requests.
        trace: Or recorded ones.
        targets: Latency targets.
        verbs: ``core`` (out, level 1, pause, resume) or ``full`` (partial levels and focus too).
        prefetch: With core verbs: models may be loaded before somebody asks for them.
        dispatch: Who gets the device next: ``rr``, ``edf`` or ``las``.
        load: 1 is the load at which the slack rule reaches a goodput of .90.
        utilisation_at_load_1: Offered seconds of isolated service per second at load 1, as
            ``mmrl scenarios calibrate`` found it.
        duration_s: Requests arrive for so long.
        drain_s: The episode then goes on for so long; what is unfinished at its end is a miss.
        interval_s: Longest time between two decision instants.
        latency_s: From an event to the decision that it asks for.
        gap_s: Shortest time between two askings of the policy; at most `interval_s`.
        host_kv_gb: Host memory for saved KV cache; the platform's unless given.
        jitter: Each cost of each model is off by up to this fraction, drawn per episode.
        reward: Weights of the reward.
        variants: Tables of fields that replace those above; each episode draws one. A table in
            them is replaced whole. Name, description and verbs are the same for all.
    """

    name: str = ""
    description: str = ""
    platform: Names
    budget_gb: Positive | None = None
    budget_fraction: PositiveRange | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_MODELS)] | None = None
    fleet: FleetSpec | None = None
    workload: WorkloadSpec | None = None
    trace: TraceSpec | None = None
    targets: Targets
    verbs: Literal["core", "full"] = "core"
    prefetch: bool = False
    dispatch: Literal["rr", "edf", "las"] = "rr"
    load: PositiveRange = (1.0, 1.0)
    utilisation_at_load_1: Positive
    duration_s: Annotated[float, Field(gt=0, le=86_400)] = 120.0
    drain_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    interval_s: Annotated[float, Field(ge=0.001, le=60)] = 0.25
    latency_s: Annotated[float, Field(ge=0, le=10)] = 0.002
    gap_s: Annotated[float, Field(ge=0, le=10)] = 0.1
    host_kv_gb: Annotated[float, Field(ge=0)] | None = None
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    reward: RewardSpec = RewardSpec()
    variants: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _variants_are_scenarios(self) -> "Scenario":
        for variant in self.variants:
            for field in variant:
                if field not in Scenario.model_fields or field in COMMON:
                    raise ValueError(f"variants: '{field}' cannot vary")
        for k, variant in enumerate(self.variants):
            try:
                self._with(variant)
            except ValidationError as error:
                raise ValueError(f"variants.{k}.{first_error(error)}") from None
        return self

    @model_validator(mode="after")
    def _one_of_each(self) -> "Scenario":
        for one, other in ALTERNATIVES:
            given = (getattr(self, one) is not None) + (getattr(self, other) is not None)
            if given != 1:
                raise ValueError(f"{one} or {other}: give {'one' if given == 0 else 'only one'}")
        return self

    @model_validator(mode="after")
    def _gaps_are_kept(self) -> "Scenario":
        if self.interval_s < self.gap_s:  # the timer asks for a decision whatever the gap
            raise ValueError(f"interval_s: {self.interval_s:g} is below gap_s, {self.gap_s:g}")
        return self

    @property
    def largest_fleet(self) -> int:
        """The most models that a fleet of this scenario has."""
        return self.fleet.size[1] if self.fleet is not None else len(self.models or ())

    def parts(self) -> "tuple[Scenario, ...]":
        """Return the scenarios that an episode is drawn from: the variants, or itself."""
        return tuple(self._with(variant) for variant in self.variants) or (self,)

    def _with(self, variant: dict[str, Any]) -> "Scenario":
        data = self.model_dump(exclude={"variants"})
        for pair in ALTERNATIVES:
            if any(field in variant for field in pair):
                data = {field: value for field, value in data.items() if field not in pair}
        return Scenario.model_validate(data | variant)

    def pinned(self) -> "Scenario":
        """Return the scenario with nothing left to draw but arrivals and lengths.

        Ranges become their middles, of lists the first is taken (of models to choose from every
        one in turn), and there is no jitter.
        """
        first = self.parts()[0]
        changes: dict[str, Any] = {
            "platform": first.platform[:1],
            "load": (sum(first.load) / 2,) * 2,
            "jitter": 0.0,
        }
        if first.budget_fraction is not None:
            changes["budget_fraction"] = (sum(first.budget_fraction) / 2,) * 2
        if first.fleet is not None:
            names, size = first.fleet.choose_from, sum(first.fleet.size) // 2
            changes["fleet"] = None
            changes["models"] = tuple(names[-1 - k % len(names)] for k in range(size))
        if first.workload is not None:
            changes["workload"] = first.workload.pinned()
        return first.model_copy(update=changes)

    def sampler(self) -> "ScenarioSampler":
        """Read the profiles and prepare to draw episodes.

        Raises:
            InputError: A platform or model is unknown, or a model can never fit the budget.
        """
        from mmrl.scenarios.mixture import MixedSampler
        from mmrl.scenarios.sampler import EpisodeSampler

        return MixedSampler(self) if self.variants else EpisodeSampler(self)


# Pairs of fields of which a scenario has exactly one.
ALTERNATIVES = (("budget_gb", "budget_fraction"), ("models", "fleet"), ("workload", "trace"))
COMMON = ("name", "description", "verbs", "variants")  # what all variants share


def build_scenario(data: dict[str, Any], where: str) -> Scenario:
    """Validate the content of a TOML file.

    Args:
        data: The content.
        where: Name of the file or scenario, for the message.

    Raises:
        InputError: A field is unknown, missing or wrong; the message names it.
    """
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise _explain(error, where) from None


def _explain(error: ValidationError, where: str) -> InputError:
    """Say the first error in one line, and how many more there are."""
    errors = error.errors(include_url=False)
    # A required field that is misspelt is both missing and unknown: the latter names it.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # Of a union, pydantic adds the branch to the path: not a name that the user has written.
    field = ".".join(str(part) for part in first["loc"] if re.fullmatch(r"\w+", str(part)))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(Scenario, first["loc"][:-1]))
        remedy = nearest(str(first["loc"][-1]), known) or f"known: {', '.join(known)}"
        return InputError(f"{where}: unknown field '{field}'{more}", remedy)
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    remedy = REMEDY
    if first["type"] == "literal_error":
        candidates = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        remedy = nearest(str(first["input"]), candidates) or f"known: {', '.join(candidates)}"
        message = f"unknown value {first['input']!r}"
    if first["type"] == "missing" and field == "utilisation_at_load_1":
        remedy = f"mmrl scenarios calibrate {where} finds it"
    return InputError(f"{where}: {f'{field}: ' if field else ''}{message}{more}", remedy)


def _fields_at(schema: type[BaseModel], path: tuple[int | str, ...]) -> Iterator[str]:
    """Yield the fields of the table that stands at path within schema."""
    if not path:
        yield from schema.model_fields
    elif path[0] in schema.model_fields:
        annotation = schema.model_fields[str(path[0])].annotation
        for part in (annotation, *get_args(annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _fields_at(part, path[1:])
