"""Tiny models of the supported families, and what `generate` says about them."""

import copy
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 211
MAX_CONTEXT = 160

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_NO_GROUPS = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_OPT = {key: value for key, value in _NO_GROUPS.items() if key != "intermediate_size"}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_COMMON),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=24),
    "mistral": MistralConfig(**_COMMON, sliding_window=None),
    "mistral-window": MistralConfig(**_COMMON, sliding_window=21),
    "gemma2": Gemma2Config(
        **{**_COMMON, "num_hidden_layers": 4},
        head_dim=32,
        sliding_window=19,
        attn_logit_softcapping=3.0,
        query_pre_attn_scalar=11,
    ),
    "gemma3": Gemma3TextConfig(
        **{**_COMMON, "num_hidden_layers": 4},
        head_dim=32,
        sliding_window=17,
        query_pre_attn_scalar=11,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "phi3": Phi3Config(**_COMMON, sliding_window=26),
    "gpt_neox": GPTNeoXConfig(**_NO_GROUPS, rotary_pct=0.25),
    "opt": OPTConfig(**_OPT, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=True),
}


def model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of a family, the same each time, with weights so large that outputs vary."""
    torch.manual_seed(7)
    module: nn.Module = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[family]), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.to(dtype)


def kv_shape(family: str) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their size."""
    config = CONFIGS[family]
    heads = config.num_attention_heads
    return (
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def prompt(length: int, seed: int) -> list[int]:
    """A random prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()


@cache
def oracle(family: str) -> Any:
    """The model that `generated` asks."""
    module: Any = model(family)
    module.generation_config.eos_token_id = None
    return module


@cache
def generated(family: str, length: int, seed: int, tokens: int) -> tuple[int, ...]:
    """What ``generate`` makes, greedily, of a prompt."""
    ids = torch.tensor([prompt(length, seed)])
    with torch.inference_mode():
        out = oracle(family).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return tuple(out[0, length:].tolist())
