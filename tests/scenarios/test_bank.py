"""What a node is filled with is what its profiles say."""

import numpy as np
import pytest

from mmrl.profiles.registry import get_profile
from mmrl.profiles.schema import Overhead
from mmrl.scenarios.bank import CostBank


def test_what_settling_and_a_piece_of_a_load_add_is_the_nodes_to_pay() -> None:
    profile = get_profile("h200", "qwen2.5-7b").model_copy(update={"overhead": None})
    added = Overhead(decode_s=0, prefill_s=0, kv_s=0, settle_s=2e-3, piece_s=3e-3)
    alone, busy = (
        CostBank.of((one,)).constants
        for one in (profile, profile.model_copy(update={"overhead": added}))
    )
    assert (alone["settle_ns"][0], busy["settle_ns"][0]) == (0, 2_000_000)
    for field in ("load_base_ns", "load_layer_ns"):
        assert busy[field][0] - alone[field][0] == 3_000_000
    layer_s = profile.layer_bytes / profile.load.bytes_per_s
    assert alone["load_layer_ns"][0] == pytest.approx(layer_s * 1e9, abs=1)
    rest = set(alone) - {"settle_ns", "load_base_ns", "load_layer_ns"}
    assert all(alone[field][0] == busy[field][0] for field in rest)


@pytest.mark.parametrize("levels", [False, True])
def test_the_longest_sequence_is_the_last_that_fits(levels: bool) -> None:
    bank = CostBank.of(tuple(get_profile("h200", f"qwen2.5-{size}") for size in ("1.5b", "14b")))
    rows = np.array([0, 1, 1])
    budget = 48 * 10**9
    most = bank.most_tokens(rows, levels, budget)
    assert (bank.needed_bytes(rows, levels, most) <= budget).all()
    assert (bank.needed_bytes(rows, levels, most + 1) > budget).all()
    assert bank.most_tokens(rows, False, 20 * 10**9).tolist()[1:] == [0, 0]  # its weights alone
