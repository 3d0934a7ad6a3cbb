"""`ModelRunner`: prefill chunks and decode steps of one model over its KV pool.

The host prepares all inputs of an iteration as int32 in one staging buffer and sends them in one
copy. Block tables are packed one after the other, so that what is copied grows with the tokens that
are there and not with the longest possible context. On a GPU a small copy is made by a kernel that
addresses the page-locked buffer itself: a copy engine would have it wait behind the gigabytes of
weights that another thread is moving.

A decode step can be launched before the one before it has ended: its tokens are then taken from
there on the device, and the GPU never waits for the host. So what the host writes for a step is
there twice (`_Page`).

On a GPU a decode step of a resident model, and a chunk of a prefill, replay a CUDA graph, one for
each of some batch sizes and chunk lengths: a step of a 7B model launches hundreds of small kernels,
and launched one by one they take longer than the reading of the weights. A graph names addresses
only; weights and KV lie at addresses that outlive evictions, and what changes from step to step is
read from the staging buffer, so a graph once captured stays good. Rows of a graph beyond the batch
have length 0 and touch nothing. Tokens of a graph beyond the chunk are computed and thrown away:
they come after the real ones, which do not see them, and have no slot. Chunks that begin a sequence
have graphs of their own, with torch's flash attention; those that go on are longer as a rule, and
have fewer.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mmrl.deploy.attention import Decode, Prefill, use_paged_attention
from mmrl.deploy.fuse import fuse
from mmrl.deploy.graphs import GraphPool
from mmrl.deploy.kv import BLOCK_TOKENS, KVPool, Table
from mmrl.deploy.sampling import PARAMETERS, Choice, choose, forbid
from mmrl.node.state import CHUNK_TOKENS

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MAX_BATCH = BATCH_SIZES[-1]
CHUNK_SIZES = (16, 32, 64, 96, *range(128, 1024, 64), *range(1024, CHUNK_TOKENS + 1, 128))
LATER_SIZES = (64, *range(256, CHUNK_TOKENS + 1, 256))  # of chunks that go on

# Rows of a decode step in the staging buffer, MAX_BATCH numbers each; the packed tables follow.
_TOKEN, _POSITION, _LENGTH, _SLOT, _START, _NO_EOS = range(6)
_HEADER = 6 * MAX_BATCH
# A chunk there: these numbers, its tokens, their slots and the table, each part aligned.
_BEGIN, _COUNT, _LAST, _CHUNK_NO_EOS = range(4)
_ALIGNMENT = 4  # numbers: kernels are compiled apart for addresses that are no multiple of 16 bytes
_CHUNK_HEADER = _ALIGNMENT
_KERNEL_COPY_BYTES = 64 << 10  # of larger ones the copy engine is faster


@dataclass(frozen=True, slots=True)
class DecodeInput:
    """A sequence of a decode step.

    Attributes:
        token: Its last token, whose keys and values are not in the pool yet; -1 - k is the token
            that sequence k of the iteration launched before gets, a decode step.
        position: Position of this token: the tokens before it.
        table: Its blocks, with room for this token.
        sampling: How the next token is chosen.
    """

    token: int
    position: int
    table: Table
    sampling: Choice


class _Page:
    """What the host writes and reads for one iteration, page-locked if there is a GPU.

    Args:
        size: Numbers of the staging buffer.
        cuda: Whether there is a GPU.
    """

    def __init__(self, size: int, cuda: bool) -> None:
        self.host = torch.zeros(size, dtype=torch.int32, pin_memory=cuda)
        self.words: npt.NDArray[np.int32] = self.host.numpy()
        # Of the draws, as the words that a kernel copies.
        words = 2 * MAX_BATCH * PARAMETERS
        self.draws = torch.zeros(words, dtype=torch.int32, pin_memory=cuda)
        self.answer = torch.zeros(MAX_BATCH, dtype=torch.int64, pin_memory=cuda)
        self._event = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def mark(self) -> None:
        """Note that all that concerns it has been launched."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Wait until the device has done that."""
        if self._event is not None:
            self._event.synchronize()


class ModelRunner:
    """Runs one model, one iteration at a time, on the current stream of the calling thread.

    Args:
        module: A causal language model of transformers in eval mode. Its attention is replaced, its
            buffers are moved to the pool's device; its parameters may come and go between calls.
        pool: Its KV blocks.
        max_context: Most tokens of a sequence.
        eos: Its end-of-sequence tokens.
        graph_pool: Shared by the models of a device; none runs without graphs.

    Attributes:
        max_context: As given.
        serial: Number of the last iteration that was launched.
    """

    def __init__(
        self,
        module: nn.Module,
        pool: KVPool,
        max_context: int,
        eos: Sequence[int] = (),
        graph_pool: GraphPool | None = None,
    ) -> None:
        self._module: Any = module
        self._pool = pool
        self.max_context = max_context
        self.serial = 0
        self._device = device = pool.device
        use_paged_attention(module)
        if device.type == "cuda":
            fuse(module)
        _slice_long_inputs(module)
        _move_buffers(module, device)
        self._eos = torch.tensor(sorted(set(eos)), dtype=torch.int64, device=device)
        blocks_each = -(-max_context // BLOCK_TOKENS)
        tables = min(pool.capacity, MAX_BATCH * blocks_each)
        chunk = _CHUNK_HEADER + 2 * (max_context + _ALIGNMENT) + blocks_each
        size = max(_HEADER + tables, chunk)
        cuda = device.type == "cuda"
        self._page, self._other_page = _Page(size, cuda), _Page(size, cuda)
        self._staged = torch.zeros(size, dtype=torch.int32, device=device)
        self._drawn = torch.zeros_like(self._page.draws, device=device)
        self._chosen = torch.zeros(MAX_BATCH, dtype=torch.int64, device=device)
        self._graph_pool = graph_pool if cuda and not _depends_on_lengths(module) else None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by batch size
        # By chunk size, of those that begin a sequence and of those that go on.
        self._chunk_graphs: tuple[dict[int, torch.cuda.CUDAGraph], ...] = ({}, {})
        longest = max_context if self._graph_pool is not None else 0
        self._chunk_sizes = tuple(
            tuple(size for size in sizes if size <= longest) for sizes in (CHUNK_SIZES, LATER_SIZES)
        )
        self._logits: torch.Tensor | None = None  # of the last graph, [MAX_BATCH, vocabulary]
        self._copies_by_kernel = cuda
        self._multiprocessors = 0
        if cuda:
            self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
            # cuDNN's attention, which torch prefers on some GPUs, prepares anew for every length.
            torch.backends.cuda.enable_cudnn_sdp(False)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Sequence[int],
        start: int,
        table: Table,
        sampling: Choice | None,
        resident: bool = False,
    ) -> int | None:
        """Compute a chunk of a sequence, whose earlier tokens are in the pool.

        Args:
            tokens: Of the chunk, at least one.
            start: Position of the first.
            table: Blocks of the sequence, with room for them.
            sampling: How the token after the chunk is chosen; None if none is wanted.
            resident: All weights are on the device at their own addresses: a graph may be used.

        Returns:
            The next token, or None. The device has done everything by then.
        """
        count = len(tokens)
        table = np.asarray(table, np.int32)
        if not count or start + count > len(table) * BLOCK_TOKENS:
            raise ValueError(f"{count} tokens from {start} do not fit {len(table)} blocks")
        size = count
        graph = None
        later = start > 0
        padded = next((size for size in self._chunk_sizes[later] if size >= count), None)
        if resident and padded is not None:
            size = padded
            graph = self._chunk_graphs[later].get(size) or self._capture_chunk(size, later)
        self._turn()
        staged = self._send(self._pack_chunk(tokens, start, table, sampling, size))
        if graph is None:
            logits = self._chunk(staged, size, start, wanted=sampling is not None)
        else:
            graph.replay()
            logits = self._logits
        if sampling is None:
            self._page.mark()
            self._page.wait()
            return None
        assert logits is not None
        return self._choose(logits, [sampling], [start + count])()[0]

    def decode(self, batch: Sequence[DecodeInput], resident: bool) -> list[int]:
        """Compute one token of each sequence, see `launch_decode`.

        Returns:
            Their next tokens, in order. The device has done everything by then.
        """
        return self.launch_decode(batch, resident)()

    @torch.inference_mode()
    def launch_decode(
        self, batch: Sequence[DecodeInput], resident: bool
    ) -> Callable[[], list[int]]:
        """Have the device compute one token of each sequence.

        Another step may be launched meanwhile, on the same stream; one after that waits for the
        end of the first.

        Args:
            batch: The sequences, 1 to `MAX_BATCH`.
            resident: All weights are on the device at their own addresses: a graph may be used.

        Returns:
            A function that waits until the device has done everything and returns their next
            tokens, in order; any thread may call it.
        """
        rows = len(batch)
        if not 1 <= rows <= MAX_BATCH:
            raise ValueError(f"a batch has 1 to {MAX_BATCH} sequences, not {rows}")
        size = rows
        graph = None
        if resident and self._graph_pool is not None:
            size = next(size for size in BATCH_SIZES if size >= rows)
            graph = self._graphs.get(size) or self._capture(size)
        self._turn()
        staged = self._send(self._pack(batch, size), references=rows)
        if graph is None:
            longest = max(one.position for one in batch) + 1
            logits = self._step(staged, size, longest)
        else:
            graph.replay()
            assert self._logits is not None
            logits = self._logits
        return self._choose(
            logits, [one.sampling for one in batch], [one.position + 1 for one in batch]
        )

    @torch.inference_mode()
    def capture(
        self,
        sizes: Sequence[int] = BATCH_SIZES,
        chunks: Sequence[int] = CHUNK_SIZES,
        later_chunks: Sequence[int] = LATER_SIZES,
    ) -> None:
        """Capture the graphs of some batch and chunk sizes now, if graphs are used at all.

        All weights must be on the device. No KV is read or written.
        """
        if self._graph_pool is None:
            return
        # The largest first: the others fit in its memory.
        for later, wanted in enumerate((chunks, later_chunks)):
            for size in sorted(set(wanted) & set(self._chunk_sizes[later]), reverse=True):
                if size not in self._chunk_graphs[later]:
                    self._capture_chunk(size, bool(later))
        for size in sorted(sizes, reverse=True):
            if size not in self._graphs:
                self._capture(size)

    def _pack_chunk(
        self, tokens: Sequence[int], start: int, table: Table, sampling: Choice | None, size: int
    ) -> int:
        """Write a chunk into the staging buffer, padded to ``size`` tokens.

        Returns:
            How many numbers it takes.
        """
        words, count = self._page.words, len(tokens)
        words[_BEGIN] = start
        words[_COUNT] = count
        words[_LAST] = max(count - 1, 0)
        words[_CHUNK_NO_EOS] = sampling is not None and sampling.no_eos
        first_slot, first_block = _chunk_layout(size)
        words[_CHUNK_HEADER : _CHUNK_HEADER + count] = tokens
        words[_CHUNK_HEADER + count : _CHUNK_HEADER + size] = 0
        words[first_slot : first_slot + count] = _slots(table, np.arange(start, start + count))
        words[first_slot + count : first_slot + size] = -1
        blocks = -(-(start + count) // BLOCK_TOKENS)
        words[first_block : first_block + blocks] = table[:blocks]
        return first_block + blocks

    def _chunk(
        self,
        staged: torch.Tensor,
        size: int,
        start: int | None,
        wanted: bool,
        padded: bool = False,
    ) -> torch.Tensor | None:
        """Run the model on a packed chunk; put the greedy choice into ``_chosen``.

        Args:
            staged: The staging buffer on the device.
            size: Tokens, with padding.
            start: Position of the first; None if it is read on the device.
            wanted: Whether a token is to follow.
            padded: Whether there may be padding.

        Returns:
            Logits of its last real token, ``[1, vocabulary]``; None if they are not wanted.
        """
        first_slot, first_block = _chunk_layout(size)
        blocks = -(-((start or 0) + size) // BLOCK_TOKENS)
        step = Prefill(
            self._pool.data,
            staged[first_slot : first_slot + size],
            staged[first_block:] if start is None else staged[first_block : first_block + blocks],
            start,
            size,
            staged[_BEGIN : _COUNT + 1] if padded else None,
        )
        positions = torch.arange(size, device=self._device) + staged[_BEGIN]
        # Padding must not go where a model with learned positions has none.
        positions = positions.clamp_(max=self.max_context - 1)
        inputs = {
            "input_ids": staged[None, _CHUNK_HEADER : _CHUNK_HEADER + size].long(),
            "position_ids": positions[None],
            "use_cache": False,
            "paged_step": step,
        }
        if not wanted:
            self._module.base_model(**inputs)
            return None
        last = staged[_LAST : _LAST + 1].long()
        logits: torch.Tensor = self._module(**inputs, logits_to_keep=last).logits[:, -1]
        forbid(logits, self._eos, staged[_CHUNK_NO_EOS : _CHUNK_NO_EOS + 1] != 0)
        self._chosen[:1].copy_(logits.argmax(-1))
        return logits

    def _capture_chunk(self, size: int, later: bool) -> torch.cuda.CUDAGraph:
        """Capture a chunk of up to ``size`` tokens that begins a sequence, or goes on."""
        self._turn()
        self._send(self._pack_chunk([], 0, np.empty(0, np.int32), None, size))

        def run() -> None:
            start = None if later else 0
            logits = self._chunk(self._staged, size, start, wanted=True, padded=True)
            assert logits is not None
            self._keep(logits)

        self._chunk_graphs[later][size] = graph = self._captured(run)
        return graph

    def _pack(self, batch: Sequence[DecodeInput], size: int) -> int:
        """Write a decode step into the staging buffer, padded to ``size`` rows.

        Returns:
            How many numbers it takes.
        """
        words = self._page.words
        rows = words[:_HEADER].reshape(-1, MAX_BATCH)
        rows[_LENGTH, len(batch) : size] = 0
        rows[_SLOT, len(batch) : size] = -1
        rows[_TOKEN : _POSITION + 1, len(batch) : size] = 0
        rows[_NO_EOS, len(batch) : size] = 0
        end = _HEADER
        for row, one in enumerate(batch):
            place, offset = divmod(one.position, BLOCK_TOKENS)
            if place >= len(one.table):
                raise ValueError(f"position {one.position} is beyond {len(one.table)} blocks")
            slot = int(one.table[place]) * BLOCK_TOKENS + offset
            rows[:, row] = (
                one.token,
                one.position,
                one.position + 1,
                slot,
                end - _HEADER,
                one.sampling.no_eos,
            )
            words[end : end + place + 1] = one.table[: place + 1]
            end += place + 1
        return end

    def _step(self, staged: torch.Tensor, rows: int, longest: int) -> torch.Tensor:
        """Run the model on a packed decode step; put the greedy choices into ``_chosen``.

        Returns:
            Logits, ``[rows, vocabulary]``.
        """
        fields = staged[:_HEADER].view(-1, MAX_BATCH)[:, :rows]
        splits = 1
        if self._device.type == "cuda":
            from mmrl.deploy.kernels import decode_splits  # Triton is there only with a GPU

            kv_heads = self._pool.data.shape[3]
            splits = decode_splits(rows, kv_heads, self._multiprocessors)
        step = Decode(
            self._pool.data,
            fields[_SLOT],
            staged[_HEADER:],
            fields[_START],
            fields[_LENGTH],
            longest,
            splits,
        )
        logits: torch.Tensor = self._module(
            input_ids=fields[_TOKEN].long()[:, None],
            position_ids=fields[_POSITION].long()[:, None],
            use_cache=False,
            paged_step=step,
        ).logits[:, -1]
        forbid(logits, self._eos, fields[_NO_EOS] != 0)
        self._chosen[:rows].copy_(logits.argmax(-1))
        return logits

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """Capture a decode step of ``size`` rows."""
        self._turn()
        self._send(self._pack([], size))
        self._graphs[size] = graph = self._captured(
            lambda: self._keep(self._step(self._staged, size, 0))
        )
        return graph

    def _captured(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Return the graph of a function whose inputs have been sent."""
        assert self._graph_pool is not None
        torch.cuda.current_stream(self._device).synchronize()
        chosen = self._chosen.clone()  # the next step may take its tokens from there
        graph = self._graph_pool.capture(run, self._device)
        self._chosen.copy_(chosen)
        return graph

    def _keep(self, logits: torch.Tensor) -> None:
        """Put logits where they outlive the next graph."""
        if self._logits is None:  # before the first capture, so it is not memory of the graphs
            shape = (MAX_BATCH, logits.shape[-1])
            self._logits = torch.empty(shape, dtype=logits.dtype, device=self._device)
        self._logits[: len(logits)].copy_(logits)

    def _choose(
        self, logits: torch.Tensor, choices: Sequence[Choice], positions: Sequence[int]
    ) -> Callable[[], list[int]]:
        """Have the tokens of the first rows chosen, of which the greedy ones are in ``_chosen``.

        Returns:
            A function that waits for them and returns them.
        """
        page, chosen = self._page, self._chosen[: len(choices)]
        if not all(choice.greedy for choice in choices):
            chosen.copy_(choose(logits[: len(choices)], choices, positions, self._send_draws))
        answer = page.answer[: len(choices)]
        self._copy(chosen, answer)
        page.mark()

        def wait() -> list[int]:
            page.wait()
            return answer.tolist()

        return wait

    def _turn(self) -> None:
        """Take the other page, once what was last launched with it has been done."""
        self._page, self._other_page = self._other_page, self._page
        self._page.wait()
        self.serial += 1

    def _send(self, count: int, references: int = 0) -> torch.Tensor:
        """Start the copy of the first numbers of the staging buffer.

        Args:
            count: How many.
            references: So many of the first may stand for a choice of the step before.

        Returns:
            The staging buffer on the device.
        """
        source, target = self._page.host[:count], self._staged[:count]
        self._copy(source, target, references)
        return self._staged

    def _send_draws(self, parameters: torch.Tensor) -> torch.Tensor:
        """Start the copy of float64 ``[rows, PARAMETERS]``; return it on the device."""
        words = parameters.view(torch.int32).view(-1)
        count = len(words)
        draws = self._page.draws[:count]
        draws.copy_(words)
        self._copy(draws, self._drawn[:count])
        return self._drawn[:count].view(torch.float64).view(parameters.shape)

    def _copy(self, source: torch.Tensor, target: torch.Tensor, references: int = 0) -> None:
        """Start a copy between host and device, see `_send`."""
        if self._copies_by_kernel and source.nbytes <= _KERNEL_COPY_BYTES:
            from mmrl.deploy import kernels  # Triton is there only with a GPU

            try:
                kernels.copy(source, target, self._chosen if references else None, references)
                return
            except ValueError:  # the device cannot address page-locked memory of the host
                self._copies_by_kernel = False
        target.copy_(source, non_blocking=True)
        if references:
            tokens = target[:references]
            chosen = self._chosen[(-1 - tokens).clamp_(min=0)].to(tokens.dtype)
            tokens.copy_(torch.where(tokens < 0, chosen, tokens))


def _slice_long_inputs(module: nn.Module) -> None:
    """Have feed-forward networks take long prompts in parts: most of what they need is in them.

    A gated network holds three times its inner width for each token, of a 7B model 110 KB.
    """
    for name, part in module.named_modules():
        if name.rpartition(".")[2] == "mlp":
            part.forward = functools.partial(_in_parts, part.forward)


def _in_parts(
    forward: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    tokens = hidden.shape[-2]
    if tokens <= CHUNK_TOKENS:
        return forward(hidden)
    out = torch.empty_like(hidden)
    for first in range(0, tokens, CHUNK_TOKENS):
        part = slice(first, first + CHUNK_TOKENS)
        out[..., part, :] = forward(hidden[..., part, :])
    return out


def _chunk_layout(size: int) -> tuple[int, int]:
    """Return where slots and table of a chunk begin in the staging buffer."""
    aligned = -(-size // _ALIGNMENT) * _ALIGNMENT
    return _CHUNK_HEADER + aligned, _CHUNK_HEADER + 2 * aligned


def _slots(table: Table, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where tokens of a sequence lie in the pool: block * 16 + offset."""
    return table[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move what is no parameter (frequencies of the rotary embedding, for example)."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device != device:
                part._buffers[name] = buffer.to(device)


def _depends_on_lengths(module: nn.Module) -> bool:
    """Return whether a rotary embedding changes with the longest sequence, on the host's say."""
    kinds = [str(getattr(part, "rope_type", "")) for part in module.modules()]
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)
