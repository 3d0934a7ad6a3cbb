"""Attention that reads and writes the paged KV pool, for models of transformers.

It is registered with transformers' attention interface, and handed what it needs (a `Step`) through
the keyword arguments that a model's ``forward`` passes on to its attention layers; the model is
called without a cache of its own and builds no mask. A step first writes the new keys and values
into their slots and then attends: a `Prefill` from a chunk of one sequence, a `Decode` from the
newest token of each of many. What differs between families comes with the call: scale, sliding
window, soft cap. Query heads that share keys and values are computed together, nothing is repeated.

On a GPU this is torch's flash attention for a prefill, and the kernels of `mmrl.deploy.kernels` for
a decode and for what flash attention cannot do: windows, soft caps, and a chunk whose place in its
sequence is read on the device. On a CPU it is plain torch.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from mmrl.deploy.kv import BLOCK_TOKENS

NAME = "mmrl_paged"


def use_paged_attention(module: nn.Module) -> None:
    """Have a model attend through the pool; from then on it is called with ``paged_step``."""
    AttentionInterface.register(NAME, paged_attention)
    module.set_attn_implementation(NAME)  # type: ignore[operator]


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged_step: "Step",
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write the new keys and values of a layer and attend; called by the attention layers.

    Args:
        module: The attention layer; its ``layer_idx`` says which.
        query: ``[batch, heads, tokens, head_dim]``.
        key: New keys, ``[batch, kv_heads, tokens, head_dim]``.
        value: New values, likewise.
        attention_mask: Always None.
        paged_step: What is being computed.
        scaling: Factor of the scores; by default 1 / sqrt(head_dim).
        sliding_window: A query sees so many tokens, its own included; None for all before it.
        softcap: Bound of the scores; None for none.

    Returns:
        ``[batch, tokens, heads, head_dim]``, and no weights.
    """
    layer = module.layer_idx
    assert isinstance(layer, int) and attention_mask is None
    keys, values = paged_step.layer(layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    paged_step.write(keys, values, key, value)
    return paged_step.attend(
        keys, values, query, key, value, scale, sliding_window or None, softcap or None
    ), None


class Step(ABC):
    """One forward pass over the pool.

    Args:
        data: The pool, ``[blocks, layers, 2, kv_heads, 16, head_dim]``.
        slots: Where each new token goes, ``block * 16 + offset``, int32 ``[tokens]``; -1 (on a GPU
            only) for nowhere.
    """

    def __init__(self, data: torch.Tensor, slots: torch.Tensor) -> None:
        self.data = data
        self.slots = slots

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a layer, each ``[blocks, kv_heads, 16, head_dim]``."""
        return self.data[:, index, 0], self.data[:, index, 1]

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put new keys and values of a layer into their slots."""
        key, value = self._by_token(key), self._by_token(value)
        if self.data.is_cuda:
            _kernels().write(keys, values, key, value, self.slots)
        else:
            blocks, offsets = self._places
            keys[blocks, :, offsets] = key
            values[blocks, :, offsets] = value

    @cached_property
    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self.slots.long()
        return slots // BLOCK_TOKENS, slots % BLOCK_TOKENS

    @abstractmethod
    def _by_token(self, states: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, heads, tokens, head_dim]`` as ``[tokens in all, heads, head_dim]``."""

    @abstractmethod
    def attend(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attend over a layer, see `paged_attention`."""


class Prefill(Step):
    """A chunk of one sequence, of which the pool has the tokens before.

    Args:
        data: See `Step`.
        slots: See `Step`.
        table: Blocks of the sequence, int32.
        start: Tokens in the pool already; None if that is known on the device only.
        tokens: Tokens of the chunk.
        extent: Of a chunk with padding (on a GPU only): tokens in the pool already and how many of
            the chunk are real, int32 ``[2]``. The slots of padding are -1, its results mean
            nothing.
    """

    def __init__(
        self,
        data: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        start: int | None,
        tokens: int,
        extent: torch.Tensor | None = None,
    ) -> None:
        super().__init__(data, slots)
        self.table = table
        self.start = start
        self.tokens = tokens
        self.extent = extent

    def _by_token(self, states: torch.Tensor) -> torch.Tensor:
        return states[0].transpose(0, 1)

    def attend(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attend from the chunk to itself and all before it."""
        start = self.start
        if window is not None and start is not None and window >= start + self.tokens:
            window = None
        flash = query.dtype in (torch.float16, torch.bfloat16) and start is not None
        if query.is_cuda and not (flash and window is None and softcap is None):
            out: torch.Tensor = _kernels().prefill(
                keys,
                values,
                query[0].transpose(0, 1),
                self.table,
                start or 0,
                self.extent,
                scale,
                window,
                softcap,
            )
            return out[None]
        assert start is not None
        if start:
            context = start + self.tokens
            key, value = self._gathered(keys, context), self._gathered(values, context)
        if softcap is not None:
            out = _softcapped(query, key, value, self._mask(start, window), scale, softcap)
        else:
            mask: Any = None
            if window is not None or (start and not query.is_cuda):
                mask = self._mask(start, window)
            elif start:
                mask = causal_lower_right(self.tokens, start + self.tokens)
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return out.transpose(1, 2)

    def _gathered(self, pool: torch.Tensor, context: int) -> torch.Tensor:
        """Return the context of a layer, ``[1, kv_heads, context, head_dim]``."""
        blocks = pool.index_select(0, self.table)
        flat = blocks.transpose(0, 1).reshape(pool.shape[1], -1, pool.shape[3])
        return flat[None, :, :context]

    def _mask(self, start: int, window: int | None) -> torch.Tensor:
        """Return what each query of the chunk sees, bool ``[tokens, context]``."""
        context = torch.arange(start + self.tokens, device=self.data.device)
        position = context[start:, None]
        seen = context <= position
        return seen if window is None else seen & (context > position - window)


class Decode(Step):
    """One new token of each of several sequences.

    Args:
        data: See `Step`.
        slots: See `Step`.
        tables: Block tables one after the other, int32.
        starts: Where each sequence's table begins in it, int32 ``[rows]``.
        lengths: Tokens of each sequence, the new one included, int32 ``[rows]``; 0 (on a GPU only)
            for a row that is not there.
        longest: The largest of them; a CPU needs it.
        splits: Programs per context; a GPU needs it, see ``kernels.decode_splits``.
    """

    def __init__(
        self,
        data: torch.Tensor,
        slots: torch.Tensor,
        tables: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        longest: int = 0,
        splits: int = 1,
    ) -> None:
        super().__init__(data, slots)
        self.tables = tables
        self.starts = starts
        self.lengths = lengths
        self.longest = longest
        self.splits = splits

    def _by_token(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, :, 0]

    def attend(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attend from the new tokens."""
        if query.is_cuda:
            out: torch.Tensor = _kernels().decode(
                keys,
                values,
                query[:, :, 0],
                self.tables,
                self.starts,
                self.lengths,
                self.splits,
                scale,
                window,
                softcap,
            )
            return out[:, None]
        rows, heads, _, dim = query.shape
        unseen = self._unseen(window)
        # The heads of a group become queries of the same keys.
        grouped = query.reshape(rows, keys.shape[1], -1, dim)
        scores = (grouped @ self._gathered(keys).mT).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill_(unseen[:, None, None], -torch.inf)
        weights = scores.softmax(-1).to(query.dtype)
        # What lies behind the end of a sequence may be anything, and 0 * NaN is NaN.
        context = self._gathered(values).masked_fill(unseen[:, None, :, None], 0)
        return (weights @ context).reshape(rows, 1, heads, dim)

    def _gathered(self, pool: torch.Tensor) -> torch.Tensor:
        """Return padded contexts of a layer, ``[rows, kv_heads, longest, head_dim]``."""
        blocks = pool[self._padded_tables].transpose(1, 2)
        rows, kv_heads, _, _, dim = blocks.shape
        return blocks.reshape(rows, kv_heads, -1, dim)[:, :, : self.longest]

    @cached_property
    def _padded_tables(self) -> torch.Tensor:
        last = (self.lengths.long() - 1) // BLOCK_TOKENS
        place = torch.arange(-(-self.longest // BLOCK_TOKENS))
        return self.tables[self.starts.long()[:, None] + place.minimum(last[:, None])].long()

    def _unseen(self, window: int | None) -> torch.Tensor:
        """Return what each row does not see, bool ``[rows, longest]``."""
        place = torch.arange(self.longest)
        unseen = place >= self.lengths[:, None]
        return unseen if window is None else unseen | (place < self.lengths[:, None] - window)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Return attention with bounded scores, ``[1, heads, tokens, head_dim]``."""
    heads, kv_heads = query.shape[1], key.shape[1]
    grouped = query.reshape(1, kv_heads, heads // kv_heads, *query.shape[2:])
    scores = (grouped @ key[:, :, None].mT).float() * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).to(query.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2)


def _kernels() -> Any:
    """Return the kernels; Triton is only there where torch has a GPU."""
    from mmrl.deploy import kernels

    return kernels
