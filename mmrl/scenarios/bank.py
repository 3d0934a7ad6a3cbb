"""`CostBank`: what each model costs on each platform, as the rows that a node is filled from.

Made once per scenario; drawing an episode copies rows of it. The cost tables that the simulator
reads are stacked here, one table per row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrl.node.state import BLOCK_TOKENS, NODE
from mmrl.profiles.costs import CostModel
from mmrl.profiles.interpolate import interpolated_profiles
from mmrl.profiles.registry import get_platform, get_profile
from mmrl.profiles.schema import Overhead, Platform, Profile, Slowdown, Transfer

Tokens = int | NDArray[np.int64]

LOAD_FIELDS = ("load_fixed_ns", "load_base_ns", "load_layer_ns")
STREAM_FIELDS = ("stream_fixed_ns", "stream_layer_ns")
OTHER_FIELDS = (
    "profile",
    "pieces",
    "base_bytes",
    "layer_bytes",
    "block_bytes",
    "save_fixed_ns",
    "save_block_ns",
    "restore_fixed_ns",
    "restore_block_ns",
    "beside_load",
    "beside_stream",
    "beside_save",
    "settle_ns",
)
CONSTANT_FIELDS = (*OTHER_FIELDS, *LOAD_FIELDS, *STREAM_FIELDS)


@dataclass(frozen=True)
class CostBank:
    """Constants and cost tables of P (platform, model) pairs.

    Attributes:
        places: Names or folders of the platforms, as they were read; empty for none.
        platforms: The platforms, each with all models.
        models: The models.
        profiles: P profiles; that of platform k and model m is the one of ``row(k, m)``.
        constants: For each of `CONSTANT_FIELDS`, an array[P] in the type of NODE.
        weight_bytes: int64[P].
        workspace_bytes: int64[P].
        graphs_bytes: int64[P].
        decode_tables: float64[P, 65, 33], seconds.
        prefill_tables: float64[P, 257], seconds.
    """

    places: tuple[str, ...]
    platforms: tuple[Platform, ...]
    models: tuple[str, ...]
    profiles: tuple[Profile, ...]
    constants: dict[str, NDArray[Any]]
    weight_bytes: NDArray[np.int64]
    workspace_bytes: NDArray[np.int64]
    graphs_bytes: NDArray[np.int64]
    decode_tables: NDArray[np.float64]
    prefill_tables: NDArray[np.float64]

    @classmethod
    def read(
        cls,
        platforms: tuple[str, ...],
        models: tuple[str, ...],
        between: int = 0,
        neighbours: tuple[str, ...] = (),
    ) -> "CostBank":
        """Read the profiles of these models on these platforms.

        Args:
            platforms: Their names or folders.
            models: Their names.
            between: How many further sizes to put between each two neighbours in size ...
            neighbours: ... of these models.

        Raises:
            InputError: A platform or model is unknown, or a file is wrong.
        """
        read = tuple(get_platform(platform) for platform in platforms)
        profiles: list[Profile] = []
        names: tuple[str, ...] = models
        for name, place in zip(platforms, read, strict=True):
            known = [get_profile(name, model) for model in models]
            ends = [known[models.index(model)] for model in neighbours]
            added = interpolated_profiles(place, ends, between)
            names = (*models, *(profile.model for profile in added))
            profiles += [*known, *added]
        return cls.of(tuple(profiles), platforms, read, names)

    @classmethod
    def of(
        cls,
        profiles: tuple[Profile, ...],
        places: tuple[str, ...] = (),
        platforms: tuple[Platform, ...] = (),
        models: tuple[str, ...] = (),
    ) -> "CostBank":
        """Stack the costs of profiles, in their order."""
        costs = [CostModel(profile) for profile in profiles]
        rows = [
            _constants(row, profile, cost)
            for row, (profile, cost) in enumerate(zip(profiles, costs, strict=True))
        ]
        return cls(
            places,
            platforms,
            models,
            profiles,
            {
                field: np.array([row[field] for row in rows], NODE[field].base)
                for field in CONSTANT_FIELDS
            },
            np.array([profile.weight_bytes for profile in profiles], np.int64),
            np.array([profile.workspace_bytes for profile in profiles], np.int64),
            np.array([profile.graphs_bytes for profile in profiles], np.int64),
            np.stack([cost.decode_table() for cost in costs]),
            np.stack([cost.prefill_table() for cost in costs]),
        )

    def row(self, platform: int, model: int) -> int:
        """Return the row of a model on a platform."""
        return platform * len(self.models) + model

    def kv_bytes(self, rows: NDArray[np.int64], tokens: Tokens) -> NDArray[np.int64]:
        """Return what a sequence of so many tokens takes: its blocks, and one more to grow."""
        blocks = -(-tokens // BLOCK_TOKENS) + 1
        return np.asarray(blocks * self.constants["block_bytes"][rows], np.int64)

    def reserve_bytes(self, rows: NDArray[np.int64], levels: bool) -> int:
        """Return what a fleet holds for the life of the node.

        The largest workspace, the graphs of all models and, where the verb set has levels, two
        streaming slots of the largest kind of layer.
        """
        slots = 2 * int(self.constants["layer_bytes"][rows].max()) if levels else 0
        return int(self.workspace_bytes[rows].max() + self.graphs_bytes[rows].sum()) + slots

    def needed_bytes(
        self, rows: NDArray[np.int64], levels: bool, tokens: Tokens
    ) -> NDArray[np.int64]:
        """Return the budget below which each model of a fleet can never serve, int64[M].

        The reserve, the weights (of partial levels only the base) and one sequence of `tokens`, the
        same for all models or int64[M].
        """
        weights = self.constants["base_bytes"] if levels else self.weight_bytes
        return np.asarray(
            self.reserve_bytes(rows, levels) + weights[rows] + self.kv_bytes(rows, tokens),
            np.int64,
        )

    def most_tokens(
        self, rows: NDArray[np.int64], levels: bool, budget_bytes: int
    ) -> NDArray[np.int64]:
        """Return the longest sequence that each model of a fleet can serve, int64[M]; 0 for none.

        The tokens for which `needed_bytes` is within a budget.
        """
        left = budget_bytes - self.needed_bytes(rows, levels, 0)
        blocks = np.maximum(0, left // self.constants["block_bytes"][rows])
        return np.asarray(blocks * BLOCK_TOKENS, np.int64)


def _constants(row: int, profile: Profile, cost: CostModel) -> dict[str, int | float]:
    block_bytes = BLOCK_TOKENS * profile.kv_bytes_per_token
    slowed = profile.slowdown or Slowdown(beside_load=1, beside_save=1, beside_stream=1)
    added = profile.overhead or Overhead(decode_s=0, prefill_s=0, kv_s=0)
    piece_ns = round((added.piece_s or 0.0) * 1e9)
    return {
        "profile": row,
        "pieces": profile.layers + 1,
        "base_bytes": profile.base_bytes,
        "layer_bytes": profile.layer_bytes,
        "block_bytes": block_bytes,
        "load_fixed_ns": round(profile.load.fixed_s * 1e9),
        "load_base_ns": _move_ns(profile.load, profile.base_bytes) + piece_ns,
        "load_layer_ns": _move_ns(profile.load, profile.layer_bytes) + piece_ns,
        "stream_fixed_ns": round(profile.stream.fixed_s * 1e9),
        "stream_layer_ns": round(cost.stream_layer_s() * 1e9),
        "save_fixed_ns": round(cost.kv_save_s(0) * 1e9),
        "save_block_ns": block_bytes / profile.kv_save.bytes_per_s * 1e9,
        "restore_fixed_ns": round(cost.kv_restore_s(0) * 1e9),
        "restore_block_ns": block_bytes / profile.kv_restore.bytes_per_s * 1e9,
        "beside_load": max(0.0, slowed.beside_load - 1),
        "beside_stream": max(0.0, slowed.beside_stream - 1),
        "beside_save": max(0.0, slowed.beside_save - 1),
        "settle_ns": round((added.settle_s or 0.0) * 1e9),
    }


def _move_ns(transfer: Transfer, n_bytes: int) -> int:
    return max(1, round(n_bytes / transfer.bytes_per_s * 1e9))
