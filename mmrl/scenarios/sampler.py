"""`EpisodeSampler`: draws the episodes of one scenario into the arrays of a node.

Everything that does not change between episodes (profiles, tables, which models fit where) is
prepared once; a draw assigns rows of it and samples the requests in compiled code. Each draw
takes its random numbers in the same order, so that fixing the load changes nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrl.errors import InputError, unknown
from mmrl.node.state import DISPATCHES, MAX_MODELS, new_nodes, new_requests
from mmrl.profiles.interpolate import MARK
from mmrl.scenarios.bank import LOAD_FIELDS, OTHER_FIELDS, STREAM_FIELDS, CostBank
from mmrl.scenarios.requests import FleetCosts
from mmrl.scenarios.schema import Scenario
from mmrl.scenarios.sources import (
    GeneratedRequests,
    RecordedRequests,
    longest_tokens,
    play,
    unique_names,
)
from mmrl.workloads.trace import Trace

LARGEST_SHARE = 1.08  # a drawn budget has room for so many times the largest model's weights ...
LARGEST_EXTRA_BYTES = 2 * 10**9  # ... and this, beside what the node reserves
OPTION_LOAD = 1.5  # options may ask for a load up to this, or up to the scenario's highest
PROBES = 128  # episodes drawn to learn how many requests an episode can have
PROBE_ROWS = 2**16
CAPACITY_MARGIN = 2  # times the most that those episodes had
OPTIONS = ("load", "trace")


@dataclass(frozen=True, slots=True)
class EpisodeInfo:
    """What an episode is, apart from its requests.

    Attributes:
        scenario: Name of the scenario.
        platform: Name of the platform.
        model_names: The fleet; a second model of the same architecture is ``name#2``.
        budget_gb: Device memory.
        load: Load, 1 as defined by the scenario.
        rate_per_s: Mean rate of the requests' source, all models together.
        requests: How many requests the episode has.
        dropped: Requests for which the table had no room.
    """

    scenario: str
    platform: str
    model_names: tuple[str, ...]
    budget_gb: float
    load: float
    rate_per_s: float
    requests: int
    dropped: int


def read_bank(scenarios: Sequence[Scenario]) -> CostBank:
    """Read the profiles of all models that scenarios can draw, on all their platforms.

    Raises:
        InputError: A platform or model is unknown, a file is wrong, or two fleets interpolate
            between different models.
    """
    models: list[str] = []
    platforms: list[str] = []
    between: set[tuple[int, tuple[str, ...]]] = set()
    for scenario in scenarios:
        fleet = scenario.fleet
        platforms += scenario.platform
        models += fleet.choose_from if fleet else scenario.models or ()
        if fleet and fleet.between:
            between.add((fleet.between, fleet.choose_from))
    if len(between) > 1:
        raise InputError(
            f"scenario '{scenarios[0].name}': fleet.between: variants interpolate other sizes",
            "give all of them the same fleet",
        )
    names = tuple(dict.fromkeys(models))
    return CostBank.read(tuple(dict.fromkeys(platforms)), names, *(between or {(0, ())}).pop())


class DoesNotFit(InputError):
    """A model of the fleet can never serve under the budget."""


def read_options(
    options: Mapping[str, Any] | None, highest_load: float
) -> tuple[float | None, Trace | None]:
    """Return the load and the trace that the options of an episode ask for, None for neither.

    Raises:
        InputError: An option is unknown, or the load is not above 0 and up to the highest.
    """
    if not options:
        return None, None
    for key in options:
        if key not in OPTIONS:
            raise unknown("reset option", key, OPTIONS)
    load = options.get("load")
    if load is not None and not 0 < load <= highest_load:
        raise InputError(
            f"option load is {load:g}, not above 0 and up to {highest_load:g}",
            "a scenario of your own may have more: load = [1, 2]",
        )
    return load, options.get("trace")


class TooManyRequests(InputError):
    """An episode at the highest load has more requests than tables are made for."""


class EpisodeSampler:
    """Draws episodes of a scenario.

    Args:
        scenario: What to draw.
        bank: Its profiles, maybe among others; read unless given.

    Raises:
        InputError: A platform, model or trace is unknown or wrong; `DoesNotFit`: a model can
            never fit; `TooManyRequests`: an episode is too long for its load.

    Attributes:
        scenario: The scenario.
        bank: Its profiles as arrays.
        platforms: Which platforms of the bank are drawn.
        decode_tables: float64[P, 65, 33], seconds; a node's ``profile`` is the row.
        prefill_tables: float64[P, 257], seconds.
        max_models: The most models that an episode has.
        full_verbs: Whether the verb set is ``full``.
        capacity: Rows that a request table needs.
        highest_load: Up to which options may ask for a load.
        rates_at_load_1: Lowest, median and highest mean rate per second at load 1, over fleets
            and workloads.
    """

    def __init__(self, scenario: Scenario, bank: CostBank | None = None) -> None:
        self.scenario = scenario
        self.bank = bank if bank is not None else read_bank((scenario,))
        # by the scenario's own words: two folders may hold platforms of one name
        self.platforms = [self.bank.places.index(place) for place in scenario.platform]
        self.decode_tables = self.bank.decode_tables
        self.prefill_tables = self.bank.prefill_tables
        self.max_models = scenario.largest_fleet
        self.highest_load = max(OPTION_LOAD, scenario.load[1])
        self.full_verbs = scenario.verbs == "full"
        self._row_names = [profile.model for profile in self.bank.profiles]
        self._source: GeneratedRequests | RecordedRequests
        if scenario.trace is not None:
            self._source = RecordedRequests(scenario.trace, scenario, self.bank)
        else:
            assert scenario.workload is not None
            self._source = GeneratedRequests(scenario.workload, scenario, self.bank)
        self._constants = {field: self.bank.constants[field] for field in OTHER_FIELDS}
        self._load_ns = np.stack([self.bank.constants[field] for field in LOAD_FIELDS])
        self._stream_ns = np.stack([self.bank.constants[field] for field in STREAM_FIELDS])
        self._choices = [self._rows_to_choose(k) for k in self.platforms]
        self._required = [self._rows_required(rows) for rows in self._choices]
        self.capacity, self.rates_at_load_1 = self._probe()

    def rows(self, platform: int) -> NDArray[np.int64]:
        """Return the rows of the fixed fleet on a platform of the bank, or those drawn there."""
        return self._choices[self.platforms.index(platform)]

    @property
    def longest_tokens(self) -> int:
        """The most tokens, prompt and output, that a request can have."""
        return int(np.max(self._source.longest_tokens))

    def most_tokens(self, platform: int) -> NDArray[np.int64]:
        """Return the most tokens of a request for each model of the fixed fleet, int64[M].

        Prompt and output, under the least budget on a platform of the bank; 0 for no request.
        """
        rows = self.rows(platform)
        budget = self._budget_bytes(platform, rows, 0.0)
        return self.bank.most_tokens(rows, self.full_verbs, budget)

    @property
    def trace_notes(self) -> tuple[str, ...]:
        """What was done to the scenario's trace for the largest fleet; empty without a trace."""
        if isinstance(self._source, RecordedRequests):
            return self._source.notes(self.max_models)
        return ()

    # ------------------------------------------------------------------ drawing an episode

    def draw(
        self,
        rng: np.random.Generator,
        node: np.record,
        requests: np.recarray,
        options: Mapping[str, Any] | None = None,
    ) -> EpisodeInfo:
        """Draw an episode: fill a node's numbers and constants, and the rows of its requests.

        Args:
            rng: Where every draw comes from.
            node: A zeroed record of NODE.
            requests: recarray[R >= capacity] of REQUEST; rows after the episode's stay as
                they are.
            options: ``load`` fixes the load; ``trace``, a `Trace` over as many models as the
                fleet has, is played as it is, from its start.

        Raises:
            InputError: An option is unknown or does not suit the scenario.
        """
        scenario = self.scenario
        load, trace = read_options(options, self.highest_load)
        uniform = rng.random(4 + MAX_MODELS)
        if load is None:
            low, high = scenario.load
            load = low + (high - low) * float(uniform[0])
        drawn = int(uniform[1] * len(scenario.platform))
        rows = self._draw_fleet(rng, drawn, uniform[3:])
        platform = self.platforms[drawn]
        budget = self._budget_bytes(platform, rows, uniform[2])
        scale = np.ones((4, len(rows)))
        if scenario.jitter:
            scale += scenario.jitter * (2 * rng.random((4, len(rows))) - 1)
        self._fill_node(node, platform, rows, budget, scale)

        costs = FleetCosts(rows, self.decode_tables, self.prefill_tables, scale[0], scale[1])
        if trace is None:
            utilisation = load * scenario.utilisation_at_load_1
            filled = self._source.fill(rng, utilisation, costs, requests)
        else:
            filled = play(trace, scenario.duration_s, costs, scenario.targets.numbers, requests)
            self._check_fit(platform, rows, budget, longest_tokens(trace))
            service_s = requests["isolated_ns"][: filled.requests].sum() / 1e9
            load = float(service_s) / scenario.duration_s / scenario.utilisation_at_load_1
        node["n_requests"] = filled.requests
        return EpisodeInfo(
            scenario.name,
            self.bank.platforms[platform].name,
            unique_names(tuple(self._row_names[row] for row in rows.tolist())),
            budget / 1e9,
            load,
            filled.rate_per_s,
            filled.requests,
            filled.dropped,
        )

    def _draw_fleet(
        self, rng: np.random.Generator, platform: int, uniform: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Return the rows of a fleet's models; uniform is float64[1 + MAX_MODELS]."""
        if self.scenario.fleet is None:
            return self._choices[platform]
        low, high = self.scenario.fleet.size
        models = low + int(uniform[0] * (high - low + 1))
        choices, required = self._choices[platform], self._required[platform]
        rows = choices[(uniform[1 : 1 + models] * len(choices)).astype(np.int64)]
        if len(required) and not set(required.tolist()) & set(rows.tolist()):
            rows[int(rng.random() * models)] = required[int(rng.random() * len(required))]
        return rows

    def _budget_bytes(self, platform: int, rows: NDArray[np.int64], uniform: float) -> int:
        scenario = self.scenario
        if scenario.budget_gb is not None:
            return round(scenario.budget_gb * 1e9)
        assert scenario.budget_fraction is not None
        low, high = scenario.budget_fraction
        wanted = round(
            (low + (high - low) * float(uniform)) * int(self.bank.weight_bytes[rows].sum())
        )
        least = int(self._least_budgets(rows).max())
        return min(self.bank.platforms[platform].usable_bytes, max(wanted, least))

    def _least_budgets(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the least budget that is drawn for each model of a fleet, int64[M].

        It holds the model as a whole beside what a fleet with levels reserves, whatever the verb
        set: streaming a model through every iteration is another trade, and another load.
        """
        reserve = self.bank.reserve_bytes(rows, levels=True)
        weights = self.bank.weight_bytes[rows]
        kv = np.maximum(
            np.rint((LARGEST_SHARE - 1) * weights).astype(np.int64) + LARGEST_EXTRA_BYTES,
            self.bank.kv_bytes(rows, self._source.longest_tokens),
        )
        return np.asarray(reserve + weights + kv, np.int64)

    def _fill_node(
        self,
        node: np.record,
        platform: int,
        rows: NDArray[np.int64],
        budget_bytes: int,
        scale: NDArray[np.float64],
    ) -> None:
        """Write numbers and constants; scale is float64[4, M]: decode, prefill, load, stream."""
        scenario, models = self.scenario, len(rows)
        host_kv = scenario.host_kv_gb
        node["n_models"] = models
        node["horizon_ns"] = round((scenario.duration_s + scenario.drain_s) * 1e9)
        node["interval_ns"] = round(scenario.interval_s * 1e9)
        node["latency_ns"] = round(scenario.latency_s * 1e9)
        node["gap_ns"] = round(scenario.gap_s * 1e9)
        node["budget_bytes"] = budget_bytes
        node["reserve_bytes"] = self.bank.reserve_bytes(rows, self.full_verbs)
        node["host_kv_limit_bytes"] = (
            self.bank.platforms[platform].host_kv_bytes if host_kv is None else round(host_kv * 1e9)
        )
        node["dispatch"] = DISPATCHES.index(scenario.dispatch)
        node["full_verbs"] = self.full_verbs
        node["prefetch"] = scenario.prefetch
        node["miss_weight"] = scenario.reward.miss
        node["latency_weight"] = scenario.reward.latency
        for field, values in self._constants.items():
            node[field][:models] = values[rows]
        node["decode_scale"][:models] = scale[0]
        node["prefill_scale"][:models] = scale[1]
        for fields, values, factor in (
            (LOAD_FIELDS, self._load_ns, scale[2]),
            (STREAM_FIELDS, self._stream_ns, scale[3]),
        ):
            for field, value in zip(fields, np.rint(values[:, rows] * factor), strict=True):
                node[field][:models] = value

    # ------------------------------------------------------------------ preparing

    def _rows_to_choose(self, platform: int) -> NDArray[np.int64]:
        """Return the rows of a platform's models that may be in a fleet: those that can fit.

        A fixed fleet must fit as it is. Of the models to choose from, those are left out that
        even the largest budget cannot serve in every fleet.

        Raises:
            DoesNotFit: A model can never fit, or none of those to choose from can.
            InputError: The budget is more than a platform has.
        """
        scenario, bank = self.scenario, self.bank
        names = scenario.fleet.choose_from if scenario.fleet else scenario.models or ()
        if scenario.fleet is not None and scenario.fleet.between:
            names = (*names, *(name for name in bank.models if name.startswith(MARK)))
        rows = np.array([bank.row(platform, bank.models.index(name)) for name in names])
        usable = bank.platforms[platform].usable_bytes
        if scenario.budget_gb is not None and scenario.budget_gb * 1e9 > usable:
            raise InputError(
                f"scenario '{scenario.name}': budget_gb: {scenario.budget_gb:g} GB is more than "
                f"the {usable / 1e9:.1f} GB of {bank.platforms[platform].name}",
                "lower it",
            )
        budget = usable if scenario.budget_gb is None else round(scenario.budget_gb * 1e9)
        if scenario.fleet is None:
            longest = np.full(len(rows), self._source.longest_tokens)
            self._check_fit(platform, rows, budget, longest)
            return rows
        fitting = rows[self._needed_bytes(rows, scenario.fleet.size[1]) <= budget]
        if len(fitting) == 0:
            raise DoesNotFit(
                f"scenario '{scenario.name}': fleet.choose_from: none of them fits in "
                f"{budget / 1e9:.1f} GB of {bank.platforms[platform].name}",
                "raise the budget, or name smaller models or fleets",
            )
        return fitting

    def _needed_bytes(self, rows: NDArray[np.int64], models: int) -> NDArray[np.int64]:
        """Return what each row needs as a whole in the worst fleet of so many, int64[R].

        The rest of that fleet is the worst of all rows, for an architecture may come several times:
        the largest workspace, the most graphs and, with levels, the largest streaming slots.
        """
        bank = self.bank
        workspace, graphs = bank.workspace_bytes[rows], bank.graphs_bytes[rows]
        slots = 2 * bank.constants["layer_bytes"][rows] * self.full_verbs
        if models > 1:
            workspace, slots = workspace.max(), slots.max()
            graphs = graphs + (models - 1) * graphs.max()
        kv = bank.kv_bytes(rows, self._source.longest_tokens)
        return np.asarray(workspace + graphs + slots + bank.weight_bytes[rows] + kv, np.int64)

    def _check_fit(
        self,
        platform: int,
        rows: NDArray[np.int64],
        budget_bytes: int,
        tokens: NDArray[np.int64],
    ) -> None:
        """Refuse a fleet with a model that can never serve its longest request, of int64[M]."""
        needed = self.bank.needed_bytes(rows, self.full_verbs, tokens)
        worst = int(needed.argmax())
        if needed[worst] <= budget_bytes:
            return
        row = rows[worst]
        what = "base weights" if self.full_verbs else "weights"
        weights = (
            self.bank.constants["base_bytes"] if self.full_verbs else self.bank.weight_bytes
        )[row]
        kv = self.bank.kv_bytes(rows, tokens)[worst]
        remedy = f"raise the budget to {needed[worst] / 1e9:.1f} GB or leave the model out"
        if not self.full_verbs:
            remedy += ', or set verbs = "full" to stream its layers'
        most = int(self.bank.most_tokens(rows, self.full_verbs, budget_bytes).min())
        if most and isinstance(self._source, RecordedRequests):
            remedy += f", or leave longer requests out (mmrl workload fit --longest {most})"
        raise DoesNotFit(
            f"scenario '{self.scenario.name}': {self._row_names[row]} can never fit on "
            f"{self.bank.platforms[platform].name}: {weights / 1e9:.1f} GB of {what}, "
            f"{(needed[worst] - weights - kv) / 1e9:.1f} GB reserved and {kv / 1e9:.1f} GB of KV "
            f"cache for {tokens[worst]:,} tokens are more than the budget of "
            f"{budget_bytes / 1e9:.1f} GB",
            remedy,
        )

    def _rows_required(self, choices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the choices of which a fleet has at least one; none for no such rule."""
        fleet = self.scenario.fleet
        wanted = fleet.at_least_one_of if fleet else ()
        required = choices[[self._row_names[row] in wanted for row in choices.tolist()]]
        if wanted and len(required) == 0:
            raise InputError(
                f"scenario '{self.scenario.name}': fleet.at_least_one_of: none of "
                f"{', '.join(wanted)} fits",
                "raise the budget or name smaller models",
            )
        return required

    def _probe(self) -> tuple[int, tuple[float, float, float]]:
        """Draw some episodes: (rows that a table needs, range of the rate at load 1)."""
        node, requests = new_nodes(1)[0], new_requests(1, PROBE_ROWS)[0]
        rng = np.random.default_rng(0)
        load = {"load": self.highest_load}
        infos: list[EpisodeInfo] = []
        for _ in range(PROBES):
            infos.append(self.draw(rng, node, requests, load))
            if infos[-1].dropped:
                raise TooManyRequests(
                    f"scenario '{self.scenario.name}': an episode has over {PROBE_ROWS:,} requests",
                    "lower duration_s, load or utilisation_at_load_1",
                )
        rates = sorted(info.rate_per_s / self.highest_load for info in infos)
        capacity = CAPACITY_MARGIN * max(info.requests for info in infos) + 64
        if isinstance(self._source, RecordedRequests):  # a burst may be in no probe
            utilisation = self.highest_load * self.scenario.utilisation_at_load_1
            most = (self._source.most_requests(utilisation, rows) for rows in self._choices)
            capacity = max(capacity, *most)
        return capacity, (rates[0], rates[PROBES // 2], rates[-1])
