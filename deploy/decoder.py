"""What a model is made of, as its module tells without weights.

What the node must know of an architecture (order of the layers, keys and values per token, which
tensors are one) is not looked up by its name but observed on the module itself, which runs one
token on the meta device. Its parameters are laid out in *pieces*, one run of bytes each: the base
weights, then every decoder layer.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mmrl.deploy.sources import Spread
from mmrl.errors import InputError

ALIGNMENT = 256  # of a tensor within its piece, bytes: what CUDA's own allocator gives
ATTENDING = re.compile(r"\.(q_proj|k_proj|qkv_proj|query_key_value|c_attn)\.")
LINE = 160  # characters of another library's error that are passed on
OTHER = "choose another checkpoint"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter in its piece.

    Attributes:
        name: Its name in the module; of tied parameters, the first.
        dtype: Data type in memory.
        shape: Its shape.
        offset: First byte in the piece, a multiple of 256.
        nbytes: Its bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What is loaded and dropped together: the base weights, or one decoder layer.

    Attributes:
        nbytes: Bytes with the gaps between tensors, a multiple of 256.
        tensors: Its parameters, in order.
    """

    nbytes: int
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a module without weights tells of itself; see the same names in `Checkpoint`."""

    layers_path: str
    pieces: tuple[Piece, ...]
    aliases: dict[str, tuple[str, ...]]  # parameter -> all its names in the module
    prefix: str  # of the parameters of the decoder without its head
    spreads: dict[str, Spread]
    kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool


def observe(name: str, config: PretrainedConfig, dtype: torch.dtype) -> Decoder:
    """Build the module without weights and see what it is made of.

    Args:
        name: What the model is called in errors.
        config: Configuration of the decoder.
        dtype: Data type of its weights.

    Raises:
        InputError: It is not a plain decoder: layers of one kind, each run once and in order, with
            keys and values of one shape.
    """
    try:
        with torch.device("meta"):
            module = construct(config, dtype, "eager")
    except Exception as error:  # a configuration may be wrong in many ways
        raise InputError(f"{name}: no causal language model: {line(error)}", OTHER) from error
    layers_path = _layers_path(name, module, config)
    kv_heads, head_dim = _run_one_token(name, module, layers_path, dtype)
    names: dict[int, list[str]] = {}
    for parameter, value in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(parameter)
    head = _head(module)
    return Decoder(
        layers_path=layers_path,
        pieces=_lay_out(module, layers_path),
        aliases={same[0]: tuple(same) for same in names.values()},
        prefix=module.base_model_prefix,
        spreads=_spreads(module, config),
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied=head is not None and head is module.get_input_embeddings().weight,
        qkv_bias=any(
            ATTENDING.search(parameter) and parameter.endswith("bias")
            for parameter in module.state_dict()
        ),
    )


def construct(
    config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """Build the module of a configuration, for inference.

    Args:
        config: Left as it is.
        dtype: Data type of its weights.
        attn_implementation: Name of an attention function; transformers' own choice if None.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    own = copy.deepcopy(config)  # from_config writes to it
    module: PreTrainedModel = AutoModelForCausalLM.from_config(own, dtype=dtype, **options)
    nn.Module.eval(module)
    module.requires_grad_(False)
    return module


def freeze_rope(module: nn.Module) -> None:
    """Keep rotary frequencies as they were made.

    Some kinds recompute them for the longest sequence of a call, so that one sequence's tokens
    would depend on its neighbours, and a captured graph on the values it was captured with.
    `max_context` ends where they would first change.
    """
    for part in module.modules():
        kind = getattr(part, "rope_type", None)
        if isinstance(kind, str):
            part.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kind, dict):
            part.rope_type = dict.fromkeys(kind, "default")  # type: ignore[assignment]


def _layers_path(name: str, module: nn.Module, config: PretrainedConfig) -> str:
    """Return the name of the list of decoder layers, the outermost list of that length."""
    lists = [
        (path.count("."), path)
        for path, part in module.named_modules()
        if isinstance(part, nn.ModuleList)
        and len(part) == getattr(config, "num_hidden_layers", None)
        and len({type(layer) for layer in part}) == 1
    ]
    if not lists:
        raise InputError(f"{name}: no uniform list of decoder layers ({config.model_type})", OTHER)
    path: str = min(lists)[1]
    return path


def _run_one_token(
    name: str, module: nn.Module, layers_path: str, dtype: torch.dtype
) -> tuple[int, int]:
    """Run one token without values; return heads and size of a head of the keys and values."""
    order: list[int] = []
    layers = list(module.get_submodule(layers_path).children())
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=i: order.append(i))
    freeze_rope(module)
    try:
        with torch.no_grad(), torch.device("meta"):
            # As the node calls it: with positions, and a mask that transformers leaves alone.
            token = torch.zeros((1, 1), dtype=torch.int64)
            mask = torch.zeros((1, 1, 1, 1), dtype=dtype)
            output = module(
                input_ids=token, position_ids=token, attention_mask=mask, use_cache=True
            )
        if output.past_key_values is None:
            raise ValueError("it keeps no keys and values")
        cached = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        shapes = {tuple(part.shape) for both in cached for part in both}
    except Exception as error:  # a module that works otherwise may fail in any way
        raise InputError(f"{name}: not a plain decoder: {line(error)}", OTHER) from error
    if order != list(range(len(layers))) or len(cached) != len(layers):
        raise InputError(f"{name}: its layers do not run once each, in order", OTHER)
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise InputError(f"{name}: its layers differ in the shape of keys and values", OTHER)
    _, kv_heads, _, head_dim = shapes.pop()
    return kv_heads, head_dim


def _lay_out(module: nn.Module, layers_path: str) -> tuple[Piece, ...]:
    in_layer = re.compile(re.escape(layers_path) + r"\.(\d+)\.")
    pieces: list[list[TensorSpec]] = [
        [] for _ in range(1 + len(list(module.get_submodule(layers_path).children())))
    ]
    for name, value in module.named_parameters():
        match = in_layer.match(name)
        piece = pieces[1 + int(match[1]) if match else 0]
        offset = _end(piece)
        piece.append(TensorSpec(name, value.dtype, tuple(value.shape), offset, value.nbytes))
    return tuple(Piece(_end(piece), tuple(piece)) for piece in pieces)


def _end(piece: Sequence[TensorSpec]) -> int:
    """Return where the next tensor of a piece begins."""
    end = piece[-1].offset + piece[-1].nbytes if piece else 0
    return -(-end // ALIGNMENT) * ALIGNMENT


def _head(module: PreTrainedModel) -> nn.Parameter | None:
    """Return the weights of the output head."""
    head: nn.Module | None = module.get_output_embeddings()
    return None if head is None else head.get_parameter("weight")


def _spreads(module: PreTrainedModel, config: PretrainedConfig) -> dict[str, Spread]:
    """Return how random weights are spread so that greedy outputs are sane and varied.

    A linear layer keeps the variance of what goes in, so that every layer matters beside the
    embedding; logits have a standard deviation of 2. Queries and keys are larger: attention that
    averages over everything forgets what came before, and greedy outputs run in circles. Gains of
    norms have mean 0: with tied tables and gains about 1, a token's most likely successor would be
    the token itself.
    """
    gain = -1.0 if config.model_type.startswith("gemma") else 0.0  # Gemma's norms add 1
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    tables.add(id(_head(module)))
    spreads = {}
    for name, value in module.named_parameters():
        if value.ndim >= 2:
            scale = 2.0 if id(value) in tables else 2.5 if ATTENDING.search(name) else 1.0
            spreads[name] = Spread(0.0, scale / value.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            spreads[name] = Spread(0.0, 0.05)
        else:
            spreads[name] = Spread(gain, 1.0)
    return spreads


def line(error: BaseException) -> str:
    """Return the beginning of an error's text as one line, or its kind if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LINE else text[:LINE] + "..."
