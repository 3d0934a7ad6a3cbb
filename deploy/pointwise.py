"""The small operations between matrix products on a GPU, one Triton kernel each.

A decode step of a 3B model written with torch's own operators is over a thousand kernels, most of
them for a few kilobytes: a norm is eight, a rotary embedding ten, a gate two. Each takes a few
microseconds whatever it does, and each is a command that the GPU fetches over the link, which other
threads keep busy with weights. As kernels of their own they are one each.

Everything is computed in float32 and rounded where the families of transformers round. Inputs need
be contiguous in the last dimension only where it is said.
"""

# Triton has no types and is there only where torch has a GPU.
# mypy: allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

_GATE_COLUMNS = 1024  # of the inner width for a program


@triton.jit
def _rms_norm(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    PLUS_ONE: tl.constexpr,
) -> None:
    """Scale one row to a mean square of 1 and by the weights; the grid is (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM_P)
    live = d < DIM
    h = tl.load(x + row * DIM + d, mask=live, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=live, other=0.0).to(tl.float32)
    h = h / tl.sqrt(tl.sum(h * h, 0) / DIM + eps)
    kind = out.dtype.element_ty
    # Gemma rounds after the weights, all others before as well.
    scaled = h * (1.0 + w) if PLUS_ONE else h.to(kind).to(tl.float32) * w
    tl.store(out + row * DIM + d, scaled.to(kind), mask=live)


@triton.jit
def _rotate(
    query: tl.tensor,
    key: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_out: tl.tensor,
    key_out: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    DIM_P: tl.constexpr,
) -> None:
    """Rotate one head of one token; the grid is (tokens, heads + kv_heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if head < HEADS:
        source = query + token * query_token + head * query_head
        target = query_out + (token * HEADS + head) * DIM
    else:
        head -= HEADS
        source = key + token * key_token + head * key_head
        target = key_out + (token * KV_HEADS + head) * DIM
    d = tl.arange(0, DIM_P)
    live = d < DIM
    turned = d < 2 * HALF
    other = tl.where(d < HALF, d + HALF, d - HALF)
    x = tl.load(source + d, mask=live)
    y = tl.load(source + other, mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + token * 2 * HALF + d, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + token * 2 * HALF + d, mask=turned, other=0.0).to(tl.float32)
    out = x.to(tl.float32) * c + tl.where(d < HALF, -y, y) * s
    tl.store(target + d, out.to(x.dtype), mask=live)


@triton.jit
def _gate(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_row: tl.tensor,
    up_row: tl.tensor,
    width: tl.tensor,
    EACH: tl.constexpr,
    GELU: tl.constexpr,
) -> None:
    """Multiply a part of a row by its activated gate; the grid is (rows, parts)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * EACH + tl.arange(0, EACH)
    live = d < width
    x = tl.load(gate + row * gate_row + d, mask=live, other=0.0)
    u = tl.load(up + row * up_row + d, mask=live, other=0.0).to(tl.float32)
    g = x.to(tl.float32)
    # tanh(z) = 2 sigmoid(2 z) - 1, so that gelu's 0.5 (1 + tanh(z)) is a sigmoid as well.
    steep = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    activated = (g * tl.sigmoid(steep)).to(x.dtype).to(tl.float32)
    tl.store(out + row * width + d, (activated * u).to(x.dtype), mask=live)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    """Return ``x`` over its root mean square, times the weights.

    Args:
        x: ``[..., dim]``.
        weight: ``[dim]``.
        eps: Added to the mean square.
        plus_one: The factors are 1 + weight, as Gemma has them.
    """
    x = x.contiguous()
    dim = x.shape[-1]
    out = torch.empty_like(x)
    dim_p = triton.next_power_of_2(dim)
    _rms_norm[(x.numel() // dim,)](
        x,
        weight,
        out,
        eps,
        DIM=dim,
        DIM_P=dim_p,
        PLUS_ONE=plus_one,
        num_warps=min(max(dim_p // 512, 1), 8),
    )
    return out


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys with their first ``rotary_dim`` numbers rotated by position.

    Args:
        query: ``[batch, heads, tokens, head_dim]``; batch or tokens is 1, the last stride too.
        key: ``[batch, kv_heads, tokens, head_dim]``, likewise.
        cos: ``[batch, tokens, rotary_dim]``, contiguous; both halves of the last dimension.
        sin: Likewise.

    Returns:
        Of the shapes that were given, contiguous by token.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, axis = key.shape[1], 2 if batch == 1 else 0
    turned = []
    for states in (query, key):
        out = torch.empty(
            (batch, tokens, states.shape[1], dim), dtype=states.dtype, device=states.device
        )
        turned.append(out)
    _rotate[(batch * tokens, heads + kv_heads)](
        query,
        key,
        cos,
        sin,
        *turned,
        query.stride(axis),
        query.stride(1),
        key.stride(axis),
        key.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        HALF=cos.shape[-1] // 2,
        DIM_P=triton.next_power_of_2(dim),
        num_warps=1,
    )
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


def gate(gates: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    """Return ``activation(gates) * up``.

    Args:
        gates: ``[..., width]``, its last stride 1 and its rows equally far apart.
        up: Likewise.
        gelu: The activation is the tanh form of GELU, else SiLU.
    """
    width = gates.shape[-1]
    out = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    _gate[(out.numel() // width, triton.cdiv(width, _GATE_COLUMNS))](
        gates,
        up,
        out,
        gates.stride(-2),
        up.stride(-2),
        width,
        EACH=_GATE_COLUMNS,
        GELU=gelu,
        num_warps=4,
    )
    return out
