"""What `fuse` recognises; that the kernels compute it is tested on a GPU."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from mmrl.deploy.fuse import fuse, gate_kind, is_rotary, norm_kind
from tests.deploy.families import CONFIGS, MAX_CONTEXT, generated, model, prompt

# Norms and networks of the tiny models: two norms a layer and a last one, Gemma four, Gemma 3 and
# Qwen3 two more for queries and keys.
KINDS = {
    "llama": {"weight": 7, "silu": 3},
    "qwen2": {"weight": 7, "silu": 3},
    "qwen3": {"weight": 13, "silu": 3},
    "mistral": {"weight": 7, "silu": 3},
    "mistral-window": {"weight": 7, "silu": 3},
    "gemma2": {"1 + weight": 17, "gelu": 4},
    "gemma3": {"1 + weight": 25, "gelu": 4},
    "phi3": {"weight": 7, "silu": 3},
    "gpt_neox": {},
    "opt": {},
}


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_recognised(family: str) -> None:
    module = model(family)
    kinds = [kind(part) for part in module.modules() for kind in (norm_kind, gate_kind)]
    assert Counter(kind for kind in kinds if kind is not None) == KINDS[family]
    rotary = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    assert is_rotary(rotary) if rotary is not None else family == "opt"


def test_a_model_on_a_processor_computes_what_it_did() -> None:
    module: Any = model("gemma3")
    before = module(torch.tensor([prompt(MAX_CONTEXT, 1)])).logits
    fuse(module)
    fuse(module)
    assert torch.equal(module(torch.tensor([prompt(MAX_CONTEXT, 1)])).logits, before)
    assert generated("gemma3", 5, 1, 4)


class OtherNorm(nn.Module):
    """Divides by the mean of absolute values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


class OtherNetwork(nn.Module):
    """Gates after the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act_fn(self.gate_proj(x)) * self.down_proj(self.up_proj(x))


def test_what_computes_something_else_is_left_alone() -> None:
    network = OtherNetwork()
    assert norm_kind(OtherNorm()) is None and gate_kind(network) is None
    assert norm_kind(nn.LayerNorm(64)) is None and norm_kind(nn.Linear(64, 64)) is None
    interleaved = lambda q, k, cos, sin: (q.flip(-1) * cos[:, None], k.flip(-1) * sin[:, None])  # noqa: E731
    assert not is_rotary(interleaved)
    relu = model("llama").get_submodule("model.layers.0.mlp")
    assert gate_kind(relu) == "silu"
    relu.act_fn = nn.ReLU()
    assert gate_kind(relu) is None
