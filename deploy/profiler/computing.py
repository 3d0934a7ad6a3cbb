"""What iterations take: decode and prefill of a resident model, and the model on the host.

Every step is the runner's own and runs on the engine's compute worker, so that its time is what the
engine would see, launches and the copy of the tokens included. A decode step is measured behind
another one, which is where the engine has it.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from mmrl.deploy.kv import KVPool, Table
from mmrl.deploy.memory import DeviceMemory
from mmrl.deploy.profiler.raw import Section
from mmrl.deploy.profiler.subject import Subject
from mmrl.deploy.runner import DecodeInput, ModelRunner
from mmrl.deploy.sampling import Choice
from mmrl.deploy.warm import warm_up
from mmrl.deploy.weights import host_buffers
from mmrl.deploy.workers import Launched
from mmrl.node.state import BLOCK_TOKENS, CHUNK_TOKENS

# The runner pads a batch to the next size it has a graph for: costs bend at these.
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MORE_BATCHES = (24, 48, 9, 17, 33, 49)  # its other sizes, and just above some
CONTEXTS = (128, 1024, 4096, 16384)
MORE_CONTEXTS = (512, 2048, 8192)
# A chunk that begins a sequence is padded to the next size it has a graph for: between two sizes
# the middle of what is padded to the larger stands for all of it.
PROMPTS = (16, 24, 48, 112, 160, 224, 352, 480, 608, 736, 864, 992, 1216, 1472, 1728, 1984)
CORE_PROMPT, LONG_PROMPT = 512, 16384
CHUNKS_AFTER = (16, 128, 512, 1024)  # tokens of a chunk that continues a prompt
HOST_TOKENS = (1, 8, 32, 128)
HOST_CONTEXT = 128
HOST_LIMIT_S = 6.0  # no larger point on the host is begun after one that took so long


def memory(subject: Subject, section: Section) -> None:
    """Measure what the model takes of a GPU beside weights and KV."""
    if subject.on_gpu:
        rig = subject.rig
        section.values |= asdict(warm_up([subject.model], rig.fleet.memory, subject.used_before))


def decode(subject: Subject, section: Section) -> None:
    """Measure decode steps over batch and context."""
    _decode_grid(subject, section, BATCHES, CONTEXTS)


def more_decode(subject: Subject, section: Section) -> None:
    """Measure decode steps between and just above the sizes of `decode`."""
    _decode_grid(subject, section, MORE_BATCHES, CONTEXTS[:3])
    _decode_grid(subject, section, BATCHES, MORE_CONTEXTS)


def _decode_grid(
    subject: Subject, section: Section, batches: Sequence[int], contexts: Sequence[int]
) -> None:
    with subject.resident() as model:
        longest = subject.longest
        fitting = [context for context in contexts if context <= longest]
        for context in fitting or [longest]:
            with subject.sequences(max(batches), context) as tables:
                inputs = [DecodeInput(5, context - 1, table, Choice()) for table in tables]
                for batch in batches:
                    point = {"batch": batch, "context_tokens": context}
                    if batch > len(inputs):
                        section.skip(point, "no memory for its KV cache")
                        continue
                    if section.points and subject.deadline.left_s < 0 and batch not in (1, 32):
                        section.skip(point, "no time left")
                        continue
                    section.measure(
                        functools.partial(_step, subject, model.runner, inputs[:batch]),
                        subject.patience(0.5, least=8),
                        warm=2,
                        **point,
                    )


def _step(subject: Subject, runner: ModelRunner, inputs: Sequence[DecodeInput]) -> float:
    """Return the seconds of a decode step behind another."""

    def launch() -> Launched:
        return Launched(runner.launch_decode(inputs, resident=True))

    return subject.compute(launch, times=2)


def prefill(subject: Subject, section: Section) -> None:
    """Measure prompts from empty: in one chunk up to its size, then in chunks of that size."""
    with subject.resident(), subject.sequences(1, min(LONG_PROMPT, subject.longest)) as tables:
        (table,) = tables
        longest = len(table) * BLOCK_TOKENS
        for count in PROMPTS:
            if count > CORE_PROMPT and subject.deadline.left_s < 0:
                section.skip({"tokens": count}, "no time left")
            elif count <= longest:
                section.measure(
                    functools.partial(_prefill, subject, table, 0, count),
                    subject.patience(0.5),
                    warm=2,
                    tokens=count,
                )
        _long_prompt(subject, section, table, longest)


def _long_prompt(subject: Subject, section: Section, table: Table, longest: int) -> None:
    """Measure a long prompt chunk by chunk; its beginnings are shorter prompts."""
    starts = range(0, longest - CHUNK_TOKENS + 1, CHUNK_TOKENS)
    prompts: list[list[float]] = [[] for _ in starts]
    for repeat in range(1 + subject.patience(3.0, least=5).least):
        spent = 0.0
        for i, start in enumerate(starts):
            if i and subject.deadline.left_s < 0 and not repeat:
                section.skip({"tokens": (i + 1) * CHUNK_TOKENS}, "no time left")
                starts, prompts = starts[:i], prompts[:i]
                break
            spent += _prefill(subject, table, start, CHUNK_TOKENS)
            if repeat:  # the first time warms up
                prompts[i].append(spent)
    for i, times in enumerate(prompts):
        section.add(times, tokens=(i + 1) * CHUNK_TOKENS)


def other_prefill(subject: Subject, section: Section) -> None:
    """Measure chunks that continue a prompt, and long prompts in one pass, as streamed ones are."""
    with subject.resident(), subject.sequences(1, min(LONG_PROMPT, subject.longest)) as tables:
        (table,) = tables
        longest = len(table) * BLOCK_TOKENS
        for count in CHUNKS_AFTER:
            if CHUNK_TOKENS + count <= longest:
                section.measure(
                    functools.partial(_prefill, subject, table, CHUNK_TOKENS, count),
                    subject.patience(0.3),
                    start_tokens=CHUNK_TOKENS,
                    tokens=count,
                )
        for count in (128, 1024, 2048, 4096, LONG_PROMPT):
            if count <= longest:
                section.measure(
                    functools.partial(_prefill, subject, table, 0, count, resident=False),
                    subject.patience(0.5, least=3),
                    one_pass=True,
                    tokens=count,
                )


def _prefill(
    subject: Subject, table: Table, start: int, count: int, resident: bool = True
) -> float:
    tokens = [10 + (7 * i) % 200 for i in range(count)]
    runner = subject.model.runner
    return subject.compute(lambda: runner.prefill(tokens, start, table, Choice(), resident))


def host(subject: Subject, section: Section) -> None:
    """Measure iterations computed by the host from the weights that are there anyway."""
    section.values |= {
        "threads": torch.get_num_threads(),
        "layers": subject.checkpoint.layers,
    }
    contexts = min(HOST_CONTEXT, subject.checkpoint.max_context)
    with _on_host(subject, contexts) as (runner, tables, layers):
        last_s = 0.0
        for tokens in HOST_TOKENS:
            if last_s > HOST_LIMIT_S or (subject.deadline.left_s < 2 * last_s and last_s):
                section.skip({"tokens": tokens}, "no time left")
                continue

            def iteration(count: int = tokens) -> float:
                begun = time.perf_counter()
                if count <= len(tables):
                    rows = [DecodeInput(5, contexts - 1, t, Choice()) for t in tables[:count]]
                    runner.decode(rows, resident=False)
                else:
                    runner.prefill([5] * min(count, contexts), 0, tables[0], Choice())
                return time.perf_counter() - begun

            layers.clear()
            patience = subject.patience(2.0, least=3, most=10)
            times = section.measure(iteration, patience, tokens=tokens)
            section.points[-1]["layers_s"] = layers[-len(times) :]
            last_s = max(times, default=last_s)


@contextmanager
def _on_host(
    subject: Subject, context: int
) -> Iterator[tuple[ModelRunner, list[Table], list[float]]]:
    """Yield a runner on the CPU over the fleet's host memory, sequences, and times of all layers.

    The times, seconds in all decoder layers, are appended at each iteration.
    """
    checkpoint = subject.checkpoint
    batch, blocks = max(n for n in HOST_TOKENS if n <= 64), -(-context // BLOCK_TOKENS)
    memory = DeviceMemory(
        torch.device("cpu"), 2 * batch * blocks * BLOCK_TOKENS * checkpoint.kv_bytes_per_token
    )
    shape = checkpoint.layers, checkpoint.kv_heads, checkpoint.head_dim, checkpoint.dtype
    pool = KVPool(memory, *shape, capacity=batch * blocks)
    try:
        module = _host_module(subject)
        runner = ModelRunner(module, pool, context, checkpoint.eos)
        for key in range(batch):
            pool.resize(key, blocks)
        tables = [pool.table(key) for key in range(batch)]
        pool.data[: batch * blocks] = 0.01
        decoder: Any = list(module.get_submodule(checkpoint.layers_path).children())
        begun, layers = [0.0], []

        def before(*_: Any) -> None:
            begun[0] = time.perf_counter()

        def after(*_: Any) -> None:
            layers.append(time.perf_counter() - begun[0])

        decoder[0].register_forward_pre_hook(before)
        decoder[-1].register_forward_hook(after)
        yield runner, tables, layers
    finally:
        pool.close()


def _host_module(subject: Subject) -> torch.nn.Module:
    """Build the module over the fleet's host copy of the weights."""
    checkpoint = subject.checkpoint
    buffers = host_buffers(subject.rig.fleet.arenas[0], checkpoint.pieces)
    weights = {
        spec.name: buffer[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).view(spec.shape)
        for piece, buffer in zip(checkpoint.pieces, buffers, strict=True)
        for spec in piece.tensors
    }
    module: Any = checkpoint.build()
    module.load_state_dict(weights, strict=False, assign=True)
    module.tie_weights()
    left = [name for name, value in module.named_parameters() if value.is_meta]
    if left:
        raise RuntimeError(f"no weights for {', '.join(left)}")
    return module  # type: ignore[no-any-return]


def host_layer_s(point: dict[str, Any], layers: int) -> float:
    """Return the median seconds of one decoder layer of a point that `host` measured."""
    return float(np.median(point["layers_s"])) / layers
