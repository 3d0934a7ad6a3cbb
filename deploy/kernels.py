"""Attention over a paged KV pool on a GPU, as Triton kernels.

What torch has no operation for: writing new keys and values into the blocks of many
sequences at once; one query per sequence against ragged, paged contexts (*decode*); and a chunk of
queries of one sequence with a sliding window or soft-capped scores (*prefill*; without them torch's
flash kernel is faster). A fourth, `copy`, takes a few numbers between host and device: a copy
engine would have them wait behind the gigabytes that another stream is moving.

Decode follows flash-decoding: a context is split among programs so that one long sequence fills the
GPU too, each program keeps a running softmax over its part, and a second kernel merges the parts by
their log-sum-exp. How many parts a context really has is worked out on the device from its length;
the grid depends on shapes alone, so that a CUDA graph of it serves any lengths. The query heads of
a group share a program and with it the loaded keys and values.

A row of length 0 is padding: nothing is read or written for it and its output is zero. So it is for
tokens of a prefill beyond those that are real, which it may read on the device.
"""

# Triton has no types and is there only where torch has a GPU.
# mypy: allow-untyped-decorators

from typing import Any

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

MAX_SPLITS = 64
_WAVES = 4  # programs per multiprocessor that a decode grid aims at


@triton.jit(do_not_specialize=["count", "references"])
def _copy(
    source: tl.tensor,
    target: tl.tensor,
    count: tl.tensor,
    values: tl.tensor,
    references: tl.tensor,
    EACH: tl.constexpr,
) -> None:
    """Copy ``EACH`` numbers; of the first, one below 0 stands for a value."""
    n = tl.program_id(0) * EACH + tl.arange(0, EACH)
    copied = tl.load(source + n, mask=n < count)
    if values is not None:
        refers = (n < references) & (copied < 0)
        copied = tl.where(refers, tl.load(values + (-1 - copied), mask=refers, other=0), copied)
    tl.store(target + n, copied.to(target.dtype.element_ty), mask=n < count)


@triton.jit
def _write(
    key: tl.tensor,
    value: tl.tensor,
    key_pool: tl.tensor,
    value_pool: tl.tensor,
    slots: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    pool_block: tl.tensor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
) -> None:
    """Write one token's key and value of one head; the grid is (tokens, heads)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    at = (slot // BLOCK).to(tl.int64) * pool_block + (head * BLOCK + slot % BLOCK) * DIM
    d = tl.arange(0, DIM_P)
    live = d < DIM
    token = token.to(tl.int64)
    new_key = tl.load(key + token * key_token + head * key_head + d, mask=live)
    tl.store(key_pool + at + d, new_key, mask=live)
    new_value = tl.load(value + token * value_token + head * value_head + d, mask=live)
    tl.store(value_pool + at + d, new_value, mask=live)


@triton.jit
def _capped(scores: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """Return ``softcap * tanh(scores / softcap)``."""
    return softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)


@triton.jit
def _decode_part(
    query: tl.tensor,
    key_pool: tl.tensor,
    value_pool: tl.tensor,
    tables: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    parts: tl.tensor,
    logsums: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    pool_block: tl.tensor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Attend from a group of heads to a part of a context; the grid is (rows, groups, splits)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(lengths + row)
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    # As many whole tiles for each program: short contexts use the first programs only.
    share = tl.maximum(tl.cdiv(tl.cdiv(length - first, splits), TILE), 1) * TILE
    begin = first + split * share
    if begin >= length:
        return
    end = tl.minimum(begin + share, length)
    table = tables + tl.load(starts + row)
    d = tl.arange(0, DIM_P)
    g = tl.arange(0, GROUP_P)
    q = tl.load(
        query + row * query_row + (head * GROUP + g)[:, None] * query_head + d[None, :],
        mask=(g < GROUP)[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    top = tl.full([GROUP_P], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    out = tl.zeros([GROUP_P, DIM_P], tl.float32)
    for tile in range(begin, end, TILE):
        n = tile + tl.arange(0, TILE)
        live = n < end
        block = tl.load(table + n // BLOCK, mask=live, other=0).to(tl.int64)
        at = block * pool_block + (head * BLOCK + n % BLOCK) * DIM
        keys = tl.load(
            key_pool + at[None, :] + d[:, None],
            mask=live[None, :] & (d < DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, keys, input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = _capped(scores, softcap)
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            value_pool + at[:, None] + d[None, :],
            mask=live[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        out = out * shrink[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision=PRECISION
        )
        top = new_top
    part = (row * tl.num_programs(1) * GROUP + head * GROUP + g) * splits + split
    tl.store(
        parts + part[:, None] * DIM_P + d[None, :],
        out / total[:, None],
        mask=(g < GROUP)[:, None],
    )
    tl.store(logsums + part, top + tl.log(total), mask=g < GROUP)


@triton.jit
def _decode_merge(
    parts: tl.tensor,
    logsums: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    window: tl.tensor,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    """Merge the parts of one head; the grid is (rows, heads)."""
    row = tl.program_id(0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    context = tl.load(lengths + row)
    if WINDOW:
        context = tl.minimum(context, window)
    share = tl.maximum(tl.cdiv(tl.cdiv(context, SPLITS), TILE), 1) * TILE
    s = tl.arange(0, SPLITS)
    live = s * share < context
    d = tl.arange(0, DIM_P)
    logsum = tl.load(logsums + at * SPLITS + s, mask=live, other=float("-inf"))
    weights = tl.where(live, tl.exp(logsum - tl.max(logsum, 0)), 0.0)
    part = tl.load(
        parts + (at * SPLITS + s)[:, None] * DIM_P + d[None, :], mask=live[:, None], other=0.0
    )
    total = tl.sum(weights, 0)
    merged = tl.sum(part * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + at * DIM + d, merged.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=["tokens", "start"])
def _prefill(
    query: tl.tensor,
    key_pool: tl.tensor,
    value_pool: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    extent: tl.tensor,
    tokens: tl.tensor,
    start: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    pool_block: tl.tensor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Attend from ``ROWS`` queries of one head to all before them; the grid is (tiles, heads)."""
    # The last tile sees the most keys; started first, it does not end last.
    tile_of_queries = tl.num_programs(0) - 1 - tl.program_id(0)
    heads = tl.num_programs(1)
    query_index = tl.program_id(1)
    head = query_index // GROUP
    m = tile_of_queries * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM_P)
    inside = (m < tokens)[:, None] & (d < DIM)[None, :]
    q = tl.load(
        query + m.to(tl.int64)[:, None] * query_token + query_index * query_head + d[None, :],
        mask=inside,
        other=0.0,
    )
    real = tokens
    if extent is not None:
        start = tl.load(extent)
        real = tl.load(extent + 1)
    position = start + m
    end = start + tl.minimum((tile_of_queries + 1) * ROWS, real)
    begin = 0
    if WINDOW:
        begin = tl.maximum(start + tile_of_queries * ROWS - window + 1, 0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM_P], tl.float32)
    for tile in range(begin, end, TILE):
        n = tile + tl.arange(0, TILE)
        live = n < end
        block = tl.load(table + n // BLOCK, mask=live, other=0).to(tl.int64)
        at = block * pool_block + (head * BLOCK + n % BLOCK) * DIM
        keys = tl.load(
            key_pool + at[None, :] + d[:, None],
            mask=live[None, :] & (d < DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, keys, input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = _capped(scores, softcap)
        seen = live[None, :] & (n[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row may see none of the first keys of its tile; then -inf - -inf must not be formed.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - base)
        weights = tl.exp(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            value_pool + at[:, None] + d[None, :],
            mask=live[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        attended = attended * shrink[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision=PRECISION
        )
        top = new_top
    # Padding is not left as it is: in later layers a NaN of it would reach the real tokens.
    attended = tl.where((m < real)[:, None], attended / total[:, None], 0.0)
    tl.store(
        out + (m.to(tl.int64) * heads + query_index)[:, None] * DIM + d[None, :],
        attended.to(out.dtype.element_ty),
        mask=inside,
    )


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """Return how products are formed: float32 exactly, not in TensorFloat-32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def decode_splits(rows: int, kv_heads: int, multiprocessors: int) -> int:
    """Return into how many parts a context is split at most, a power of two.

    Args:
        rows: Sequences of the batch.
        kv_heads: Heads of keys and values.
        multiprocessors: Of the GPU.
    """
    wanted = triton.cdiv(_WAVES * multiprocessors, rows * kv_heads)
    return int(min(triton.next_power_of_2(wanted), MAX_SPLITS))


def copy(
    source: torch.Tensor,
    target: torch.Tensor,
    values: torch.Tensor | None = None,
    references: int = 0,
) -> None:
    """Copy numbers between the device and page-locked host memory, as a kernel.

    Args:
        source: Contiguous, one-dimensional.
        target: Likewise, of its type and size.
        values: On the device, int64: -1 - k stands for number k of them.
        references: So many of the first numbers may.

    Raises:
        ValueError: One of them is host memory that the device cannot address.
    """
    _copy[(triton.cdiv(len(source), 1024),)](
        source, target, len(source), values, references, EACH=1024, num_warps=4
    )


def write(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write new keys and values into their slots.

    Args:
        keys: Keys of one layer of the pool, ``[blocks, kv_heads, block, head_dim]``; a block is
            contiguous from its heads on.
        values: Its values, likewise.
        key: New keys, ``[tokens, kv_heads, head_dim]``.
        value: New values, likewise.
        slots: Place of each token, ``block * 16 + offset``, int32 ``[tokens]``; -1 for none.
    """
    key, value = _last_contiguous(key), _last_contiguous(value)
    _, kv_heads, block, dim = keys.shape
    _write[(key.shape[0], kv_heads)](
        key,
        value,
        keys,
        values,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        keys.stride(0),
        BLOCK=block,
        DIM=dim,
        DIM_P=triton.next_power_of_2(dim),
        num_warps=1,
    )


def decode(
    keys: torch.Tensor,
    values: torch.Tensor,
    query: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    splits: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend from one query per sequence.

    Args:
        keys: Keys of one layer of the pool, ``[blocks, kv_heads, block, head_dim]``.
        values: Its values, likewise.
        query: Queries, ``[rows, heads, head_dim]``.
        tables: Block tables one after the other, int32.
        starts: Where the table of each row begins in it, int32 ``[rows]``.
        lengths: Tokens of each context, its new one included, int32 ``[rows]``; 0 for padding.
        splits: From `decode_splits`.
        scale: Factor of the scores.
        window: Width of a sliding window, the query's own token included.
        softcap: Bound of the scores.

    Returns:
        ``[rows, heads, head_dim]``.
    """
    query = _last_contiguous(query)
    rows, heads, dim = query.shape
    _, kv_heads, block, _ = keys.shape
    dim_p = triton.next_power_of_2(dim)
    group = heads // kv_heads
    tile = 64 if dim_p * query.element_size() <= 256 else 32
    parts = torch.empty((rows, heads, splits, dim_p), dtype=torch.float32, device=query.device)
    logsums = torch.empty((rows, heads, splits), dtype=torch.float32, device=query.device)
    out = torch.empty((rows, heads, dim), dtype=query.dtype, device=query.device)
    _decode_part[(rows, kv_heads, splits)](
        query,
        keys,
        values,
        tables,
        starts,
        lengths,
        parts,
        logsums,
        scale,
        softcap or 0.0,
        window or 0,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        BLOCK=block,
        DIM=dim,
        DIM_P=dim_p,
        GROUP=group,
        GROUP_P=max(16, triton.next_power_of_2(group)),
        TILE=tile,
        SOFTCAP=softcap is not None,
        WINDOW=window is not None,
        PRECISION=_precision(query.dtype),
        num_warps=4,
        num_stages=2,
    )
    _decode_merge[(rows, heads)](
        parts,
        logsums,
        lengths,
        out,
        window or 0,
        DIM=dim,
        DIM_P=dim_p,
        SPLITS=splits,
        TILE=tile,
        WINDOW=window is not None,
        num_warps=4,
    )
    return out


def _prefill_shape(tokens: int, dim_p: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return tile sizes and warps: what was fastest, of what fits a multiprocessor."""
    if dtype == torch.float32:
        return {"ROWS": 32, "TILE": 32, "num_warps": 4, "num_stages": 1}
    if dim_p <= 128:
        return {"ROWS": 64 if tokens <= 512 else 128, "TILE": 64, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 64, "TILE": 32, "num_warps": 8, "num_stages": 2}


def prefill(
    keys: torch.Tensor,
    values: torch.Tensor,
    query: torch.Tensor,
    table: torch.Tensor,
    start: int,
    extent: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend from a chunk of queries of one sequence, whose keys and values are written already.

    Args:
        keys: Keys of one layer of the pool, ``[blocks, kv_heads, block, head_dim]``.
        values: Its values, likewise.
        query: Queries, ``[tokens, heads, head_dim]``.
        table: Blocks of the sequence, int32.
        start: Position of the first query.
        extent: Instead of ``start``: the position of the first query and how many are real, int32
            ``[2]``; those after them are padding. None if all are.
        scale: Factor of the scores.
        window: Width of a sliding window, the query's own token included.
        softcap: Bound of the scores.

    Returns:
        ``[tokens, heads, head_dim]``.
    """
    query = _last_contiguous(query)
    tokens, heads, dim = query.shape
    _, kv_heads, block, _ = keys.shape
    shape = _prefill_shape(tokens, triton.next_power_of_2(dim), query.dtype)
    out = torch.empty((tokens, heads, dim), dtype=query.dtype, device=query.device)
    _prefill[(triton.cdiv(tokens, shape["ROWS"]), heads)](
        query,
        keys,
        values,
        table,
        out,
        extent,
        tokens,
        start,
        scale,
        softcap or 0.0,
        window or 0,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        BLOCK=block,
        DIM=dim,
        DIM_P=triton.next_power_of_2(dim),
        GROUP=heads // kv_heads,
        SOFTCAP=softcap is not None,
        WINDOW=window is not None,
        PRECISION=_precision(query.dtype),
        **shape,
    )
    return out
