"""On a GPU: the kernels against plain torch, CUDA graphs, and whole models against generate."""

import random
from itertools import chain
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from mmrl.deploy import kernels
from mmrl.deploy.attention import Decode, Prefill
from mmrl.deploy.graphs import GraphPool
from mmrl.deploy.kv import HostKV, KVPool
from mmrl.deploy.memory import DeviceMemory
from mmrl.deploy.runner import CHUNK_SIZES, LATER_SIZES, DecodeInput, ModelRunner
from mmrl.deploy.sampling import Choice, choose, gumbel, noise_key
from tests.deploy.families import CONFIGS, MAX_CONTEXT, generated, kv_shape, model, prompt

CUDA = torch.device("cuda")
GREEDY = Choice()
SHAPES = [(8, 2, 64), (7, 1, 128), (4, 4, 96), (6, 3, 80), (8, 4, 256)]
VARIANTS = [(None, None), (70, None), (None, 5.0), (300, 3.0)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Paged:
    """Scattered contexts, on the GPU and on the CPU in float32."""

    def __init__(self, lengths: list[int], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.dim = shape
        self.lengths, blocks = lengths, sum(-(-n // 16) for n in lengths) + 3
        self.data = torch.full((blocks, 2, 2, self.kv_heads, 16, self.dim), torch.nan, dtype=dtype)
        free = torch.randperm(blocks).tolist()
        self.tables = [[free.pop() for _ in range(-(-n // 16))] for n in lengths]
        for table, length in zip(self.tables, lengths, strict=True):
            for place in range(length):
                at = self.data[table[place // 16], 1, :, :, place % 16]
                at.copy_(torch.randn(2, self.kv_heads, self.dim))
        self.query = torch.randn(max(lengths), self.heads, self.dim, dtype=dtype)

    def decode(self, device: torch.device, splits: int, **variant: Any) -> torch.Tensor:
        """Attention from each sequence's last token, as it is in the pool."""
        data = self.data.to(device, torch.float32 if device.type == "cpu" else None)
        starts = [sum(len(t) for t in self.tables[:row]) for row in range(len(self.tables))]
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        step = Decode(
            data,
            torch.empty(0, dtype=torch.int32, device=device),
            torch.tensor(list(chain(*self.tables)), dtype=torch.int32, device=device),
            torch.tensor(starts, dtype=torch.int32, device=device),
            lengths,
            max(self.lengths),
            splits,
        )
        query = self.query[: len(self.lengths), :, None].to(data)
        keys, values = step.layer(1)
        scale = self.dim**-0.5
        return step.attend(keys, values, query, query, query, scale, **variant).float().cpu()

    def prefill(self, device: torch.device, start: int, **variant: Any) -> torch.Tensor:
        """Attention from the first sequence's tokens from start on."""
        data = self.data.to(device, torch.float32 if device.type == "cpu" else None)
        count = self.lengths[0] - start
        table = torch.tensor(self.tables[0], dtype=torch.int32, device=device)
        step = Prefill(data, table[:0], table, start, count)
        keys, values = step.layer(1)
        query = self.query[:count].to(data).transpose(0, 1)[None]
        new = [
            pool[table.long()].transpose(0, 1).flatten(1, 2)[None, :, start : self.lengths[0]]
            for pool in (keys, values)
        ]
        return step.attend(keys, values, query, *new, self.dim**-0.5, **variant).float().cpu()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_kernel(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    paged = Paged([1, 130, 77, 16, 1000, 64, 2049], shape, dtype)
    for window, softcap in VARIANTS:
        expected = paged.decode(torch.device("cpu"), 1, window=window, softcap=softcap)
        for splits in (1, 4, 64):
            out = paged.decode(CUDA, splits, window=window, softcap=softcap)
            error = (out - expected).abs().max().item()
            assert error < TOLERANCE[dtype], (window, softcap, splits)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Flash attention and the kernel, whichever is taken, at the start and later."""
    paged = Paged([700], shape, dtype)
    for window, softcap in VARIANTS:
        for start in (0, 37, 640, 699):
            expected = paged.prefill(torch.device("cpu"), start, window=window, softcap=softcap)
            out = paged.prefill(CUDA, start, window=window, softcap=softcap)
            error = (out - expected).abs().max().item()
            assert error < TOLERANCE[dtype], (window, softcap, start)


def test_padding_writes_nothing_and_gives_zero() -> None:
    paged = Paged([5], (4, 2, 64), torch.bfloat16)
    data = paged.data.cuda()
    before = data.clone()
    new = torch.ones(3, 2, 64, dtype=torch.bfloat16, device=CUDA)
    slots = torch.tensor([-1, paged.tables[0][0] * 16 + 5, -1], dtype=torch.int32, device=CUDA)
    kernels.write(data[:, 1, 0], data[:, 1, 1], new, 2 * new, slots)
    written = data[paged.tables[0][0], 1, :, :, 5]
    assert (written[0] == 1).all() and (written[1] == 2).all()
    data[paged.tables[0][0], 1, :, :, 5] = before[paged.tables[0][0], 1, :, :, 5]
    assert torch.equal(data.view(torch.int16), before.view(torch.int16))
    zeros = torch.zeros(2, dtype=torch.int32, device=CUDA)
    query = torch.ones(2, 4, 64, dtype=torch.bfloat16, device=CUDA)
    for window in (None, 8):
        out = kernels.decode(
            data[:, 1, 0], data[:, 1, 1], query, zeros, zeros, zeros, 8, 1.0, window, None
        )
        assert (out == 0).all()


@pytest.fixture(scope="module")
def graph_pool() -> GraphPool:
    return GraphPool()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("resident", [True, False])
def test_a_model_gives_what_generate_gives(
    family: str, resident: bool, graph_pool: GraphPool
) -> None:
    """In float32, with and without graphs; sequences join, leave, are saved and restored."""
    torch.backends.cuda.matmul.allow_tf32 = False
    memory = DeviceMemory(CUDA, 256 << 20)
    pool = KVPool(memory, *kv_shape(family), torch.float32, capacity=64)
    host = HostKV(16 << 20, page_locked=True)
    runner = ModelRunner(model(family).cuda(), pool, MAX_CONTEXT, [0], graph_pool)
    if resident:
        runner.capture((4, 1), (64, 16))
    lengths, count = [1, 37, 70], 16
    tokens = {key: prompt(length, key) for key, length in enumerate(lengths)}
    for key, length in enumerate(lengths):
        pool.resize(key, -(-length // 16))
        cut = length // 2
        if cut:
            assert runner.prefill(tokens[key][:cut], 0, pool.table(key), None, resident) is None
        token = runner.prefill(tokens[key][cut:], cut, pool.table(key), GREEDY, resident)
        assert token is not None
        tokens[key].append(token)
    for step in range(0, count - 1, 2):  # a step is launched before the one before is waited for
        for keys in ([0, 1, 2],) if step % 4 else ([2, 0], [1]):
            waits = []
            for later in range(min(2, count - 1 - step)):
                batch = []
                for place, key in enumerate(keys):
                    position = len(tokens[key]) - 1 + later
                    pool.resize(key, -(-(position + 1) // 16))
                    token = -1 - place if later else tokens[key][-1]
                    batch.append(DecodeInput(token, position, pool.table(key), GREEDY))
                waits.append(runner.launch_decode(batch, resident))
            for wait in waits:
                for key, token in zip(keys, wait(), strict=True):
                    tokens[key].append(token)
        if step == 8:
            blocks = len(pool.table(1))
            host.save(pool, 1)
            pool.free(1)
            pool.resize(5, 3)
            pool.resize(1, blocks)
            host.restore(pool, 1)
            host.free(1)
    for key, length in enumerate(lengths):
        assert tuple(tokens[key][length:]) == generated(family, length, key, count)
    host.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_chunk_through_a_graph_is_that_without(
    family: str, dtype: torch.dtype, graph_pool: GraphPool
) -> None:
    """Token and KV are the same, and no slot but those of the chunk is written or made use of."""
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = dtype == torch.float32
    memory = DeviceMemory(CUDA, 256 << 20)
    pool = KVPool(memory, *kv_shape(family), dtype, capacity=64)
    [eos] = generated(family, 40, 40, 1)
    runner = ModelRunner(model(family, dtype).cuda(), pool, MAX_CONTEXT, [eos], graph_pool)
    runner.capture((1,))
    pool.resize(1, MAX_CONTEXT // 16)
    table = pool.table(1)
    index = torch.from_numpy(table.copy()).long().cuda()
    draw = random.Random(5)
    longest = CHUNK_SIZES[4]
    assert longest < MAX_CONTEXT < CHUNK_SIZES[5]  # beyond it the padding may not go
    lengths = [1, 16, 17, 40, longest, MAX_CONTEXT, *(draw.randint(1, longest) for _ in range(8))]
    chunks = [(0, length) for length in draw.sample(lengths, len(lengths))]
    chunks += [(begin, begin + count) for begin in (1, 37, 96) for count in (1, 40, LATER_SIZES[0])]
    drawn = Choice(temperature=1.0, top_p=0.9, seed=3)
    for begin, length in chunks:
        for choice in (GREEDY, None, drawn, Choice(no_eos=True)):
            seen = []
            for resident in (True, False):
                pool.data[index] = torch.nan
                tokens = prompt(length, length)
                if begin:
                    runner.prefill(tokens[:begin], 0, table, None, resident)
                token = runner.prefill(tokens[begin:], begin, table, choice, resident)
                seen.append((token, pool.data[index].float()))
            (token, kv), (expected_token, expected_kv) = seen
            written = ~expected_kv.isnan()
            assert torch.equal(~kv.isnan(), written)
            assert int(written[:, 0, 0, 0, :, 0].sum()) == length
            error = (kv - expected_kv)[written].norm() / expected_kv[written].norm()
            assert error < (1e-5 if exact else 0.1)
            assert (token is None) == (choice is None)
            if exact:
                assert token == expected_token
                if (begin, length) == (0, 40) and choice == GREEDY:
                    assert token == eos
            if choice is not None and choice.no_eos:
                assert token != eos


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_copies_between_host_and_device(dtype: torch.dtype) -> None:
    """By a kernel that addresses page-locked memory; other memory of the host is refused."""
    for count in (1, 7, 1024, 5000):
        host = torch.randint(1, 2**31 - 1, (5000,), dtype=dtype).pin_memory()
        device = torch.zeros(5000, dtype=dtype, device=CUDA)
        kernels.copy(host[:count], device[:count])
        assert torch.equal(device[:count].cpu(), host[:count]) and not device[count:].any()
        answer = torch.zeros(5000, dtype=dtype).pin_memory()
        kernels.copy(device[:count], answer[:count])
        torch.cuda.current_stream().synchronize()
        assert torch.equal(answer[:count], host[:count]) and not answer[count:].any()
    with pytest.raises(ValueError, match="cannot be accessed"):
        kernels.copy(torch.ones(5000, dtype=dtype), device)


def test_graphs_outlive_their_memory(graph_pool: GraphPool) -> None:
    """KV blocks are given back and taken again between replays."""
    memory = DeviceMemory(CUDA, 256 << 20)
    pool = KVPool(memory, *kv_shape("llama"), torch.float32)
    runner = ModelRunner(model("llama").cuda(), pool, MAX_CONTEXT, [], graph_pool)
    seen = []
    for _ in range(3):
        pool.resize(1, 4)
        token = runner.prefill(prompt(40, 1), 0, pool.table(1), GREEDY, resident=True)
        out = []
        for position in range(40, 60):
            assert token is not None
            out.append(token)
            [token] = runner.decode([DecodeInput(token, position, pool.table(1), GREEDY)], True)
        seen.append(tuple(out))
        pool.free(1)
        assert pool.blocks == 0 and memory.committed_bytes <= pool.slack_bytes
    assert seen == [generated("llama", 40, 1, 20)] * 3


@pytest.mark.parametrize("scattered", [True, False])
def test_saved_blocks_return(scattered: bool) -> None:
    memory = DeviceMemory(CUDA, 512 << 20)
    pool = KVPool(memory, 4, 2, 64, torch.bfloat16)
    host = HostKV(64 << 20, page_locked=True)
    for blocks in range(1, 301, 1 if scattered else 300):
        pool.resize(1, blocks)
        pool.resize(2, blocks)
    index = torch.from_numpy(pool.table(1).copy()).long().cuda()
    pool.data[index] = torch.randn_like(pool.data[index])
    expected = pool.data[index].clone()
    blocks = len(pool.table(1))
    host.save(pool, 1)
    pool.free(1)
    pool.resize(3, 7)
    pool.resize(1, blocks)
    index = torch.from_numpy(pool.table(1).copy()).long().cuda()
    pool.data[index] = 0
    host.restore(pool, 1)
    assert torch.equal(pool.data[index], expected)
    pool.free(2)
    pool.compact({1, 3})
    assert pool.committed_bytes <= pool.blocks * pool.block_bytes + pool.slack_bytes
    index = torch.from_numpy(pool.table(1).copy()).long().cuda()
    assert torch.equal(pool.data[index], expected)
    host.close()


def test_sampling_is_that_of_the_cpu() -> None:
    keys = torch.tensor([noise_key(seed, 3) for seed in range(4)], dtype=torch.int32)
    noise = gumbel(keys, 50_000)
    torch.testing.assert_close(gumbel(keys.cuda(), 50_000).cpu(), noise, rtol=1e-4, atol=1e-5)
    logits = torch.randn(40, 5_000, generator=torch.Generator().manual_seed(0)) * 3
    choices = [
        Choice([0.0, 0.7, 1.5][i % 3], [1.0, 0.9][i % 2], [0, 20][i % 4 // 2], seed=i)
        for i in range(40)
    ]
    expected = choose(logits, choices, range(40)).tolist()
    assert choose(logits.cuda(), choices, range(40)).tolist() == expected
