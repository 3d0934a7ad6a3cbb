"""Random streams of episodes: training, development and test seeds are apart and frozen.

Tuning and model selection use ``dev``; ``test`` is for the figures that are reported. The stream
of an episode depends on its split and index alone, so that policies meet the same arrivals.
"""

from typing import Literal, get_args

import numpy as np

from mmrl.errors import InputError, unknown

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def episode_rng(split: Split, index: int) -> np.random.Generator:
    """Return the random generator of one episode.

    Args:
        split: ``"train"``, ``"dev"`` or ``"test"``.
        index: Number of the episode within its split, from 0.

    Raises:
        InputError: There is no such split, or the index is negative.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if index < 0:
        raise InputError(f"episode index is {index}", "count episodes from 0")
    # A spawn key keeps the streams apart from those of plain integer seeds.
    key = (SPLITS.index(split), index)
    return np.random.default_rng(np.random.SeedSequence(0, spawn_key=key))
