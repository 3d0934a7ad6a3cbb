"""Models with weights for tests, cut into pieces without a checkpoint on disk."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from mmrl.deploy.decoder import Piece, TensorSpec
from mmrl.deploy.memory import DeviceMemory, HostArena
from mmrl.deploy.streaming import StreamSlots
from mmrl.deploy.weights import ModelWeights, host_buffers, host_bytes

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
}


def llama(layers: int = 4, *, tied: bool = False, **changes: Any) -> PretrainedConfig:
    """A tiny Llama."""
    return LlamaConfig(
        **{**LLAMA, "num_hidden_layers": layers, "tie_word_embeddings": tied, **changes}
    )


def model(config: PretrainedConfig, seed: int = 0) -> nn.Module:
    """A model on the CPU with weights large enough that each of them matters."""
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
    return module


def cut(module: nn.Module, layers_path: str = "model.layers") -> tuple[Piece, ...]:
    """Cut a model into base weights and layers, every tensor at a multiple of 256 bytes."""
    groups: list[list[tuple[str, nn.Parameter]]] = [[]]
    groups += [[] for _ in module.get_submodule(layers_path).children()]
    for name, parameter in module.named_parameters():
        if name.startswith(f"{layers_path}."):
            groups[1 + int(name[len(layers_path) + 1 :].split(".")[0])].append((name, parameter))
        else:
            groups[0].append((name, parameter))
    pieces = []
    for group in groups:
        at, specs = 0, []
        for name, parameter in group:
            nbytes = parameter.numel() * parameter.element_size()
            specs.append(TensorSpec(name, parameter.dtype, tuple(parameter.shape), at, nbytes))
            at += -(-nbytes // 256) * 256
        pieces.append(Piece(at, tuple(specs)))
    return tuple(pieces)


class Fixture:
    """A model of which the host holds all weights and the device none.

    Attributes:
        reference: The same model, complete, on the CPU.
        weights: Of the module under test.
        arena: With its host copy.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        memory: DeviceMemory,
        slots: StreamSlots,
        layers_path: str = "model.layers",
        seed: int = 0,
    ) -> None:
        self.reference = model(config, seed)
        # What is under test gets its weights from the host copy only.
        module = copy.deepcopy(self.reference).requires_grad_(False)
        self.pieces = cut(module, layers_path)
        self.arena = HostArena(host_bytes(self.pieces), page_locked=memory.device.type == "cuda")
        buffers = host_buffers(self.arena, self.pieces)
        named = dict(module.named_parameters())
        for buffer, piece in zip(buffers, self.pieces, strict=True):
            for spec in piece.tensors:
                source = named[spec.name].detach().reshape(-1).view(torch.uint8)
                buffer[spec.offset : spec.offset + spec.nbytes] = source
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
        self.weights = ModelWeights(module, self.pieces, layers_path, buffers, memory, slots)

    @property
    def module(self) -> nn.Module:
        return self.weights.module

    def load(self) -> None:
        """Copy all that is granted and missing."""
        count = len(self.weights.granted or ())
        while (piece := self.weights.claim_piece(count)) is not None:
            self.weights.copy_piece(piece)

    def close(self) -> None:
        self.weights.close()
        self.arena.close()
