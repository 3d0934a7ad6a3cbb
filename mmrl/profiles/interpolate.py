"""Profiles of sizes that nobody has measured, between two neighbours that are profiled.

The shape of the model in between is the geometric mean of its neighbours', and its costs are what
the rule of `derive` says of that shape, times by how much the rule is off for the neighbours, mixed
the same way. At the ends this is the neighbour itself. In between, counts move in whole numbers and
what has no middle (the size of a head, whether embeddings are tied) is the nearer neighbour's, so
that size and costs may jump at the middle. A policy meets many sizes between the smallest and the
largest, and no cost that hardware could not have. For training; what is served has a profile of its
own.
"""

import itertools
import math
from collections.abc import Sequence

from mmrl.profiles.costs import CostModel
from mmrl.profiles.derive import DECODE_GRID, compose_profile, rule
from mmrl.profiles.schema import Architecture, Platform, Profile, Provenance

MARK = "~"  # in front of the name of a size in between
WIDTH_STEP = 64  # widths are multiples of it


def interpolated_profiles(
    platform: Platform, profiles: Sequence[Profile], each: int
) -> list[Profile]:
    """Return profiles between each two neighbours in size, evenly on a logarithmic scale.

    Args:
        platform: Where they all run.
        profiles: At least one; two of the same size have nothing between them.
        each: How many between two neighbours.

    Returns:
        The new profiles, from the smallest neighbours to the largest, named by their size:
        ``~4.11b``; of the same size to two digits, the second is ``~4.11b-2``.
    """
    known = sorted(profiles, key=lambda profile: profile.parameters)
    found = [
        interpolated_profile(platform, low, high, step / (each + 1))
        for low, high in itertools.pairwise(known)
        if low.parameters < high.parameters
        for step in range(1, each + 1)
    ]
    names = [profile.model for profile in found]
    for k, name in enumerate(names):
        if before := names[:k].count(name):
            found[k] = found[k].model_copy(update={"model": f"{name}-{before + 1}"})
    return found


def interpolated_profile(platform: Platform, low: Profile, high: Profile, share: float) -> Profile:
    """Return the profile of a model between two: at share 0 like the first, at 1 like the second.

    Args:
        platform: Of both profiles.
        low: A profile.
        high: Another.
        share: 0 to 1.
    """
    shape = interpolated_shape(low.architecture, high.architecture, share)
    by, limits = rule(), platform.limits
    costs = (CostModel(low), low.architecture), (CostModel(high), high.architecture)

    def decode_s(batch: int, context: int) -> float:
        off = [
            cost.decode_s(batch, context) / by.decode_s(of, limits, batch, context)
            for cost, of in costs
        ]
        return by.decode_s(shape, limits, batch, context) * _mix(off[0], off[1], share)

    def prefill_s(tokens: int) -> float:
        off = [cost.prefill_s(tokens) / by.prefill_s(of, limits, tokens) for cost, of in costs]
        return by.prefill_s(shape, limits, tokens) * _mix(off[0], off[1], share)

    return compose_profile(
        f"{MARK}{shape.parameters / 1e9:.2f}b",
        shape,
        platform,
        DECODE_GRID,
        decode_s,
        prefill_s,
        (
            round(_mix(low.workspace_bytes, high.workspace_bytes, share)),
            round((1 - share) * low.graphs_bytes + share * high.graphs_bytes),
        ),
        Provenance(
            source=f"between {low.model} and {high.model} on {platform.name}, at {share:.2f}",
            command="mmrl.profiles.interpolate.interpolated_profile",
            gpu=platform.provenance.gpu,
            link=platform.provenance.link,
        ),
    )


def interpolated_shape(low: Architecture, high: Architecture, share: float) -> Architecture:
    """Return the shape between two: counts mixed geometrically, the rest the nearer one's."""

    def mixed(field: str, step: int = 1) -> int:
        value = _mix(getattr(low, field), getattr(high, field), share)
        return max(step, round(value / step) * step)

    nearer = low if share < 0.5 else high
    kv_heads = mixed("kv_heads")
    return nearer.model_copy(
        update={
            "layers": mixed("layers"),
            "hidden_size": mixed("hidden_size", WIDTH_STEP),
            "intermediate_size": mixed("intermediate_size", WIDTH_STEP),
            "attention_heads": mixed("attention_heads", kv_heads),
            "kv_heads": kv_heads,
            "vocabulary": mixed("vocabulary", WIDTH_STEP),
        }
    )


def _mix(low: float, high: float, share: float) -> float:
    return math.exp((1 - share) * math.log(low) + share * math.log(high))
