"""`MixedSampler`: draws each episode from one of a scenario's variants, with equal chance.

All variants share one bank of profiles, so that a node of any of them reads the same tables.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrl.errors import InputError
from mmrl.scenarios.sampler import EpisodeInfo, EpisodeSampler, read_bank, read_options
from mmrl.scenarios.schema import Scenario


class MixedSampler:
    """Draws episodes of a scenario with variants; to a simulator it is like any other sampler.

    Args:
        scenario: What to draw; with variants.

    Raises:
        InputError: A variant cannot be drawn.

    Attributes:
        scenario: The scenario.
        bank: The profiles of all variants as arrays.
        decode_tables: float64[P, 65, 33], seconds; a node's ``profile`` is the row.
        prefill_tables: float64[P, 257], seconds.
        parts: The sampler of each variant.
        max_models: The most models that an episode has.
        full_verbs: Whether the verb set is ``full``.
        capacity: Rows that a request table needs.
        highest_load: Up to which options may ask for a load: what every variant can play.
        rates_at_load_1: Lowest and highest mean rate per second at load 1, and between them the
            middle one of the variants' medians.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        variants = scenario.parts()
        self.bank = read_bank(variants)
        self.decode_tables = self.bank.decode_tables
        self.prefill_tables = self.bank.prefill_tables
        self.parts = [EpisodeSampler(variant, self.bank) for variant in variants]
        self.max_models = max(part.max_models for part in self.parts)
        self.full_verbs = scenario.verbs == "full"
        self.capacity = max(part.capacity for part in self.parts)
        self.highest_load = min(part.highest_load for part in self.parts)
        low, middle, high = zip(*(part.rates_at_load_1 for part in self.parts), strict=True)
        self.rates_at_load_1 = (min(low), float(np.median(middle)), max(high))

    def rows(self, platform: int) -> NDArray[np.int64]:
        """Return the rows that variants draw on a platform of the bank."""
        found = [part.rows(platform) for part in self.parts if platform in part.platforms]
        return np.unique(np.concatenate(found))

    @property
    def trace_notes(self) -> tuple[str, ...]:
        """What was done to the variants' traces."""
        return tuple(note for part in self.parts for note in part.trace_notes)

    def draw(
        self,
        rng: np.random.Generator,
        node: np.record,
        requests: np.recarray,
        options: Mapping[str, Any] | None = None,
    ) -> EpisodeInfo:
        """Draw a variant, and an episode of it; see `EpisodeSampler.draw`.

        Raises:
            InputError: An option is unknown, or does not suit the scenario.
        """
        _, trace = read_options(options, self.highest_load)
        if trace is not None:
            raise InputError(
                f"scenario '{self.scenario.name}' draws a variant: a trace cannot be played",
                "name a scenario with a fixed fleet (mmrl scenarios list)",
            )
        return self.parts[int(rng.random() * len(self.parts))].draw(rng, node, requests, options)


ScenarioSampler = EpisodeSampler | MixedSampler
