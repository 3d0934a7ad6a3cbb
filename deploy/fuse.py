"""Replace small operations of a transformers model by one kernel each (`mmrl.deploy.pointwise`).

Norms, rotary embeddings and gated feed-forward networks are recognised by what they compute, not by
their names: each is tried on a few numbers and compared with the formula of the kernel. What
computes something else (another norm, another activation) is left as it is, and so is everything on
a CPU.
"""

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_PROBES = 64  # numbers in the last dimension of what is tried


def fuse(module: nn.Module) -> None:
    """Have a model use the kernels wherever its inputs are on a GPU.

    Args:
        module: A causal language model of transformers; its parameters may be anywhere.
    """
    for part in module.modules():
        if plus_one := norm_kind(part):
            part.forward = functools.partial(_norm, part, part.forward, plus_one == "1 + weight")
        elif activation := gate_kind(part):
            part.forward = functools.partial(_feed_forward, part, part.forward, activation)
    for name in {type(part).__module__ for part in module.modules()}:
        file: Any = sys.modules[name]
        rotary = getattr(file, "apply_rotary_pos_emb", None)
        # A function of its file, so one for all models of a family.
        if isinstance(rotary, functools.partial) or rotary is None or not is_rotary(rotary):
            continue
        file.apply_rotary_pos_emb = functools.partial(_rotary, rotary)


def norm_kind(part: nn.Module) -> str | None:
    """Return what an RMS norm multiplies by, "weight" or "1 + weight"; None for other modules."""
    if set(dict(part.named_parameters())) != {"weight"} or _eps(part) is None:
        return None
    x, weight = _numbers(4, _PROBES), _numbers(_PROBES)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _eps(part))
    try:
        out = torch.func.functional_call(part, {"weight": weight}, (x,))
    except (RuntimeError, TypeError):
        return None
    for kind, factor in (("weight", weight), ("1 + weight", 1 + weight)):
        if _same(out, normed * factor):
            return kind
    return None


def gate_kind(part: nn.Module) -> str | None:
    """Return the activation of a gated feed-forward network; None for other modules."""
    together = hasattr(part, "gate_up_proj")
    activation = getattr(part, "activation_fn" if together else "act_fn", None)
    if activation is None or not (together or hasattr(part, "gate_proj")):
        return None
    x = 4 * _numbers(4, _PROBES)
    stand_in = SimpleNamespace(
        gate_proj=lambda x: x - 1,
        up_proj=lambda x: 3 - x,
        gate_up_proj=lambda x: torch.cat((x - 1, 3 - x), -1),
        down_proj=lambda x: x * x,
        act_fn=activation,
        activation_fn=activation,
    )
    try:
        out = type(part).forward(stand_in, x)
    except (AttributeError, TypeError):
        return None
    for kind, known in (("silu", F.silu), ("gelu", functools.partial(F.gelu, approximate="tanh"))):
        if _same(out, (known(x - 1) * (3 - x)) ** 2):
            return kind
    return None


def is_rotary(function: Callable[..., Any]) -> bool:
    """Return whether a function rotates the halves of the first numbers of each head."""
    query, key = _numbers(1, 4, 3, _PROBES), _numbers(1, 2, 3, _PROBES)
    for turned in (_PROBES, _PROBES // 4):
        cos, sin = _numbers(1, 3, turned), _numbers(1, 3, turned + 1)[..., :turned]
        try:
            outs = function(query, key, cos, sin)
        except (RuntimeError, TypeError):
            continue
        if all(
            _same(out, _rotated(x, cos, sin)) for out, x in zip(outs, (query, key), strict=True)
        ):
            return True
    return False


def _norm(
    part: Any, forward: Callable[..., torch.Tensor], plus_one: bool, x: torch.Tensor
) -> torch.Tensor:
    if not x.is_cuda:
        return forward(x)
    out: torch.Tensor = _kernels().rms_norm(x, part.weight, _eps(part), plus_one)
    return out


def _feed_forward(
    part: Any, forward: Callable[..., torch.Tensor], activation: str, x: torch.Tensor
) -> torch.Tensor:
    if not x.is_cuda:
        return forward(x)
    if hasattr(part, "gate_up_proj"):
        gates, up = part.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gates, up = part.gate_proj(x), part.up_proj(x)
    out: torch.Tensor = part.down_proj(_kernels().gate(gates, up, activation == "gelu"))
    return out


def _rotary(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    one_by_token = 1 in (query.shape[0], query.shape[2])
    even = cos.is_contiguous() and sin.is_contiguous() and query.stride(-1) == key.stride(-1) == 1
    if not (query.is_cuda and one_by_token and even) or args or kwargs:
        return function(query, key, cos, sin, *args, **kwargs)
    out: tuple[torch.Tensor, torch.Tensor] = _kernels().rotate(query, key, cos, sin)
    return out


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return what the kernel computes."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    crossed = torch.cat((-second, first), -1)
    return torch.cat((turned * cos[:, None] + crossed * sin[:, None], rest), -1)


def _eps(part: Any) -> Any:
    return getattr(part, "variance_epsilon", getattr(part, "eps", None))


def _numbers(*shape: int) -> torch.Tensor:
    """Return numbers between -1 and 1 without a pattern, the same each time."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) ** 2 + 1).reshape(shape)


def _same(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _kernels() -> Any:
    """Return the kernels; Triton is only there where torch has a GPU."""
    from mmrl.deploy import pointwise

    return pointwise
