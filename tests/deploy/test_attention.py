"""Attention over scattered blocks equals attention over the plain sequence."""

from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from mmrl.deploy.attention import Decode, Prefill, Step, paged_attention, use_paged_attention
from tests.deploy.families import model

HEADS, KV_HEADS, DIM, LAYERS, BLOCKS = 6, 2, 8, 2, 40
LAYER = 1
VARIANTS = [(None, None), (5, None), (40, None), (None, 1.5), (7, 1.5)]


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of queries from position start on, written out; ``[tokens, heads, dim]``."""
    out = torch.empty_like(query)
    for t in range(len(query)):
        position = start + t
        first = 0 if window is None else max(0, position + 1 - window)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            keys, values = key[first : position + 1, group], value[first : position + 1, group]
            scores = keys @ query[t, head] * DIM**-0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[t, head] = scores.softmax(-1) @ values
    return out


def attend(
    step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **variant: Any
) -> torch.Tensor:
    """Call it as an attention layer does; all ``[batch, heads, tokens, dim]``."""
    layer: Any = SimpleNamespace(layer_idx=LAYER)
    out, weights = paged_attention(
        layer, query, key, value, None, paged_step=step, dropout=0.0, **variant
    )
    assert weights is None
    return out


class Contexts:
    """Sequences with scattered blocks in a pool that holds NaN elsewhere."""

    def __init__(self, lengths: list[int]) -> None:
        torch.manual_seed(0)
        self.data = torch.full((BLOCKS, LAYERS, 2, KV_HEADS, 16, DIM), torch.nan)
        free = torch.randperm(BLOCKS).tolist()
        self.tables = [[free.pop() for _ in range(-(-n // 16))] for n in lengths]
        self.keys = [torch.randn(n, KV_HEADS, DIM) for n in lengths]
        self.values = [torch.randn(n, KV_HEADS, DIM) for n in lengths]

    def slots(self, row: int, start: int, stop: int) -> torch.Tensor:
        table = self.tables[row]
        return torch.tensor([table[i // 16] * 16 + i % 16 for i in range(start, stop)]).int()

    def prefill(
        self, row: int, start: int, stop: int, query: torch.Tensor, **variant: Any
    ) -> torch.Tensor:
        step = Prefill(
            self.data,
            self.slots(row, start, stop),
            torch.tensor(self.tables[row][: -(-stop // 16)]).int(),
            start,
            stop - start,
        )
        key, value = self.keys[row][start:stop], self.values[row][start:stop]
        states = [x.transpose(0, 1)[None] for x in (query, key, value)]
        return attend(step, *states, **variant)[0]


@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
def test_chunks_attend_to_what_came_before(window: int | None, softcap: float | None) -> None:
    contexts = Contexts([50])
    query = torch.randn(50, HEADS, DIM)
    expected = plain(query, contexts.keys[0], contexts.values[0], 0, window, softcap)
    for cuts in ([0, 50], [0, 1, 17, 32, 50]):
        parts = [
            contexts.prefill(0, a, b, query[a:b], sliding_window=window, softcap=softcap)
            for a, b in pairwise(cuts)
        ]
        torch.testing.assert_close(torch.cat(parts), expected)


@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
def test_a_ragged_batch_attends_each_to_its_own(window: int | None, softcap: float | None) -> None:
    lengths = [1, 16, 17, 48, 33]
    contexts = Contexts(lengths)
    for row, length in enumerate(lengths):
        if length > 1:
            contexts.prefill(row, 0, length - 1, torch.randn(length - 1, HEADS, DIM))
    query = torch.randn(len(lengths), HEADS, 1, DIM)
    starts = [sum(len(t) for t in contexts.tables[:row]) for row in range(len(lengths))]
    step = Decode(
        contexts.data,
        torch.cat([contexts.slots(row, n - 1, n) for row, n in enumerate(lengths)]),
        torch.tensor(list(chain(*contexts.tables))).int(),
        torch.tensor(starts).int(),
        torch.tensor(lengths).int(),
        longest=max(lengths),
    )
    new = [
        torch.stack([x[-1] for x in states])[:, :, None]
        for states in (contexts.keys, contexts.values)
    ]
    out = attend(step, query, *new, sliding_window=window, softcap=softcap)
    for row, length in enumerate(lengths):
        expected = plain(
            query[row].transpose(0, 1),
            contexts.keys[row],
            contexts.values[row],
            length - 1,
            window,
            softcap,
        )
        torch.testing.assert_close(out[row], expected)


def test_only_the_slots_of_the_layer_are_written() -> None:
    contexts = Contexts([20])
    contexts.prefill(0, 0, 20, torch.randn(20, HEADS, DIM))
    first, second = contexts.tables[0]
    written = ~contexts.data.isnan()
    assert int(written.sum()) == 20 * 2 * KV_HEADS * DIM
    assert written[first, LAYER].all()
    assert written[second, LAYER, :, :, :4].all()
    key = contexts.data[second, LAYER, 0, :, 3]
    assert torch.equal(key, contexts.keys[0][19])


def test_the_scale_of_the_layer_is_used() -> None:
    contexts = Contexts([12])
    query = torch.randn(12, HEADS, DIM)
    expected = plain(query * 3, contexts.keys[0], contexts.values[0], 0, None, None)
    out = contexts.prefill(0, 0, 12, query, scaling=3 * DIM**-0.5)
    torch.testing.assert_close(out, expected)


def test_a_model_is_switched_over_and_builds_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = model("gemma2")
    use_paged_attention(module)
    use_paged_attention(module)
    masks = []

    def spy(
        layer: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        masks.append((args[2], kwargs["paged_step"], kwargs["sliding_window"], kwargs["softcap"]))
        return query.transpose(1, 2), None

    module.config._attn_implementation = "spy"
    AttentionInterface.register("spy", spy)
    module(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False, paged_step="the step")
    assert masks == [(None, "the step", 19, 3.0), (None, "the step", None, 3.0)] * 2
