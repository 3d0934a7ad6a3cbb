"""`warm_up`: run every model once before anybody waits, and see what memory that takes.

Kernels are compiled and CUDA graphs captured. What the device then holds beside weights and KV is
measured, not guessed, so that a node can set it apart of its budget: graphs, libraries, and the
activations of the largest iterations on each of the two streams that compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmrl.deploy.hardware import used_bytes
from mmrl.deploy.memory import BudgetExceeded, DeviceMemory
from mmrl.deploy.runner import MAX_BATCH, DecodeInput
from mmrl.deploy.sampling import Choice
from mmrl.deploy.served import ServedModel
from mmrl.node.state import BLOCK_TOKENS, CHUNK_TOKENS, STREAM_CHUNK_TOKENS

STREAMS_BYTES = 64 << 20  # cuBLAS keeps 32 MiB for each stream; the engine has two more
KEY = -1  # of the sequence that is run
DRAWN = Choice(temperature=1.0, top_p=0.9, top_k=50)  # sorting the logits takes memory, too


@dataclass(frozen=True)
class Footprint:
    """What models take of a GPU beside weights and KV, bytes.

    Attributes:
        graphs: Captured graphs and loaded kernels, of all models together.
        compute: Activations of resident iterations, of the model that needs most.
        stream: Activations of link-bound iterations, likewise; they have a stream of their own.
    """

    graphs: int
    compute: int
    stream: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.graphs + self.compute + self.stream


def warm_up(models: Sequence[ServedModel], memory: DeviceMemory, before: int) -> Footprint:
    """Run models one after the other with all weights on the GPU, while nothing else runs.

    Models that do not fit wholly are left out; they never use a graph.

    Args:
        models: With a runner and host weights.
        memory: What weights and KV live in.
        before: `used_bytes` of the device before anything was taken.

    Returns:
        What was seen.
    """
    compute = stream = 0
    for model in models:
        weights, pool = model.weights, model.pool
        try:
            weights.set_granted(range(weights.layers))
            tokens = _longest(model)
        except BudgetExceeded:
            weights.set_granted(None)
            continue
        for piece in range(1 + weights.layers):
            weights.copy_piece(piece)
        model.runner.prefill([0], 0, pool.table(KEY), Choice())
        model.runner.capture()
        compute = max(compute, _taken(model, min(tokens, CHUNK_TOKENS), resident=True))
        stream = max(stream, _taken(model, tokens, resident=False))
        pool.free(KEY)
        weights.set_granted(None)
    torch.cuda.empty_cache()
    graphs = max(0, used_bytes(memory.device) - before - memory.held_bytes)
    return Footprint(graphs + STREAMS_BYTES, compute, stream)


def _longest(model: ServedModel) -> int:
    """Take KV blocks for the longest link-bound prefill that fits; return its tokens.

    Raises:
        BudgetExceeded: Not even one block fits.
    """
    tokens = min(model.runner.max_context, STREAM_CHUNK_TOKENS)
    while True:
        try:
            model.pool.resize(KEY, -(-tokens // BLOCK_TOKENS))
            return tokens
        except BudgetExceeded:
            if tokens <= BLOCK_TOKENS:
                raise
            tokens //= 2


def _taken(model: ServedModel, tokens: int, resident: bool) -> int:
    """Return what torch takes of the device for the largest iterations of a kind."""
    torch.cuda.empty_cache()
    before = int(torch.cuda.memory_reserved())
    table = model.pool.table(KEY)
    model.runner.prefill([0] * tokens, 0, table, DRAWN)
    model.runner.decode([DecodeInput(0, 0, table, DRAWN)] * MAX_BATCH, resident=resident)
    return int(torch.cuda.memory_reserved()) - before
