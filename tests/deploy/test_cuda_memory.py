"""On a GPU: memory that moves under captured graphs, copies that do not block, streamed layers."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from mmrl.deploy.kv import HostKV, KVPool
from mmrl.deploy.memory import (
    BudgetExceeded,
    DeviceMemory,
    HostArena,
    OutOfDeviceMemory,
    copy_async,
    wait_for_stream,
)
from mmrl.deploy.streaming import Abandoned, LinkBoundGate, StreamSlots
from mmrl.deploy.weights import ModelWeights
from tests.deploy.pieces import Fixture, llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GB = 1 << 30


@pytest.fixture
def memory() -> DeviceMemory:
    return DeviceMemory(torch.device("cuda"), 4 * GB)


def free() -> int:
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def logits(module: nn.Module) -> torch.Tensor:
    tokens = torch.arange(16, device="cuda").view(2, 8)
    with torch.inference_mode():
        result: torch.Tensor = module(input_ids=tokens, use_cache=False).logits
    torch.cuda.current_stream().synchronize()
    return result


def test_memory_is_taken_when_committed_and_given_back_when_decommitted(
    memory: DeviceMemory,
) -> None:
    # Kernels are loaded at their first use, and that takes memory too.
    assert int(torch.empty(8, dtype=torch.uint8, device="cuda").fill_(7)[-1]) == 7
    before = free()
    space = memory.reserve(64 * GB)
    address = space.tensor.data_ptr()
    assert space.tensor.is_cuda
    assert space.tensor.device == memory.device
    assert before - free() < 64 << 20
    space.commit(63 * GB, 64 * GB)
    space.commit(0, 512 << 20, part=128 << 20)
    space.tensor[63 * GB :].fill_(7)
    space.tensor[: 512 << 20].fill_(5)
    assert (int(space.tensor[-1]), int(space.tensor[0])) == (7, 5)
    taken = before - free()
    assert abs(taken - (GB + (512 << 20))) < 64 << 20
    space.decommit(128 << 20, 256 << 20)
    assert int(space.tensor[(256 << 20) + 3]) == 5
    space.decommit(63 * GB, 64 * GB)
    assert space.tensor.data_ptr() == address
    space.close()
    assert memory.committed_bytes == 0
    memory.close()
    assert before - free() < 64 << 20


def test_a_thread_that_never_used_the_device_can_commit(memory: DeviceMemory) -> None:
    space = memory.reserve(GB)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(space.commit, 0, GB).result()
        space.tensor.fill_(1)
        torch.cuda.synchronize()
        pool.submit(space.close).result()
    assert memory.committed_bytes == 0


def test_the_budget_and_the_device_run_out_separately() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    memory = DeviceMemory(torch.device("cuda"), 10 * total)
    space = memory.reserve(12 * total)
    size = memory.round_up(11 * total)
    with pytest.raises(BudgetExceeded):
        space.commit(0, size)
    size = memory.round_up(2 * total)
    for part in (None, memory.granule):
        before = free()
        with pytest.raises(OutOfDeviceMemory, match="out of memory") as caught:
            space.commit(0, size, part=part)
        assert not isinstance(caught.value, BudgetExceeded)
        assert memory.committed_bytes == 0
        assert abs(free() - before) < 64 << 20
    space.commit(0, memory.granule)
    space.tensor[: memory.granule].fill_(3)
    assert int(space.tensor[0]) == 3
    space.close()


def test_scattered_kv_is_saved_and_restored_and_compacted_whole(memory: DeviceMemory) -> None:
    pool = KVPool(memory, layers=8, kv_heads=4, head_dim=128, dtype=torch.bfloat16)
    host = HostKV(100 * pool.block_bytes, page_locked=True)
    stream = torch.cuda.Stream()  # as the engine's threads have one each
    with torch.cuda.stream(stream):
        for blocks in range(1, 31):
            for key in (1, 2):  # grown in turn: no two blocks of a sequence are adjacent
                pool.resize(key, blocks)
        pool.data[pool.table(1).tolist()] = torch.randn_like(pool.data[:30])
        before = pool.data[pool.table(1).tolist()].clone()
        host.save(pool, 1)
        pool.free(1)
        pool.resize(3, 15)  # takes the lower half of the holes
        pool.resize(1, 30)
        pool.data[pool.table(1).tolist()] = 0
        host.restore(pool, 1)
        assert torch.equal(pool.data[pool.table(1).tolist()], before)
        pool.slack_bytes = 0
        pool.free(2)
        pool.free(3)
        assert pool.compact({1}) > 0
        assert torch.equal(pool.data[pool.table(1).tolist()], before)
    pool.close()
    host.close()


@pytest.mark.parametrize("to_device", [True, False])
def test_copies_from_and_to_an_arena_do_not_block(memory: DeviceMemory, to_device: bool) -> None:
    nbytes = (256 << 20) + 4096
    arena = HostArena(nbytes, page_locked=True)
    arena.tensor.copy_(torch.arange(nbytes, dtype=torch.int32).to(torch.uint8))
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    expected = arena.tensor.clone()
    if not to_device:
        device.copy_(expected)
        arena.tensor.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)  # cycles, about a second
        copy_async(*((device, arena.tensor) if to_device else (arena.tensor, device)))
        done = stream.record_event()
        assert not done.query()
        wait_for_stream(memory.device)
        assert done.query()
    assert torch.equal(device.cpu(), expected)
    assert torch.equal(arena.tensor, expected)
    del device
    arena.close()


class Node:
    """Slots, and a copying thread beside the computing one, each with a stream of its own."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self.slots = StreamSlots(memory, 1 << 20)
        self.h2d = ThreadPoolExecutor(1)
        self.compute = torch.cuda.Stream()
        self.link = torch.cuda.Stream()

    def copy(self, job: Callable[[], None]) -> None:
        with torch.cuda.stream(self.link):
            job()

    def run(
        self, weights: ModelWeights, gate: LinkBoundGate, job: Callable[[], None]
    ) -> torch.Tensor:
        copying = self.h2d.submit(self.copy, job)
        try:
            with gate, torch.cuda.stream(self.compute):
                return logits(weights.module)
        finally:
            copying.result(timeout=60)


@pytest.fixture
def node(memory: DeviceMemory) -> Iterator[Node]:
    made = Node(memory)
    yield made
    made.h2d.shutdown()
    made.slots.close()


def test_a_captured_graph_survives_that_its_weights_come_and_go(node: Node) -> None:
    fixture = Fixture(llama(4), node.memory, node.slots)
    weights = fixture.weights
    weights.set_granted(range(4))
    fixture.load()
    x = torch.randn(8, 64, device="cuda")

    def forward() -> torch.Tensor:
        y = x
        for layer in weights._layer_modules:
            y = y + layer.mlp(layer.input_layernorm(y))
        head: torch.Tensor = weights.module.lm_head(y)
        return head

    with torch.inference_mode():
        expected = forward().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward()
    for number in range(5):
        weights.set_granted({1} if number % 2 else None)
        torch.cuda.synchronize()
        # What the model gave back is used by another in the meantime.
        blocker = node.memory.reserve(weights.piece_bytes[0] * 8)
        blocker.commit(0, blocker.nbytes)
        blocker.tensor.fill_(77)
        torch.cuda.synchronize()
        weights.set_granted(range(4))
        fixture.load()
        with torch.inference_mode():
            out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        blocker.close()
    graph.reset()
    fixture.close()


def test_random_splits_change_no_logit_and_leak_nothing(node: Node) -> None:
    rng = random.Random(3)
    fixture = Fixture(llama(6, tied=True), node.memory, node.slots)
    weights = fixture.weights
    weights.set_granted(range(6))
    fixture.load()
    expected = logits(fixture.module)
    on_cpu = fixture.reference(input_ids=torch.arange(16).view(2, 8), use_cache=False).logits
    torch.testing.assert_close(expected.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
    memory_left = 0
    seen = {"same": 0, "abandoned": 0}
    for number in range(1000):
        if number == 100:
            node.memory.close()  # what it keeps for the next taker
            memory_left = free()
        weights.set_granted(None if number % 7 == 0 else weights.choose(rng.randrange(7)))
        count = rng.randrange(7)
        weights.set_granted(weights.choose(count))
        if 0 not in weights.landed:
            weights.copy_piece(0)
        gate = weights.link_bound(sorted({*range(6)} - weights.choose(count)))
        cancel_at = rng.choice([None, None, rng.randrange(6)])

        def copies(gate: LinkBoundGate = gate, cancel_at: int | None = cancel_at) -> None:
            for layer in range(6):
                if layer == cancel_at:
                    gate.cancel()
                    return
                if layer in gate.streamed:
                    weights.stream_layer(layer, gate)
                elif layer + 1 not in weights.landed:
                    weights.copy_piece(layer + 1)

        try:
            assert torch.equal(node.run(weights, gate, copies), expected)
            seen["same"] += 1
        except Abandoned:
            seen["abandoned"] += 1
    assert min(seen.values()) > 100, seen
    node.memory.close()
    assert memory_left - free() < 16 << 20
    fixture.close()
