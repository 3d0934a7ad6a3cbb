"""Blocks of the KV pool, and sequences saved on the host."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.deploy import kv
from mmrl.deploy.kv import HostFull, HostKV, KVPool
from mmrl.deploy.memory import DeviceMemory, OutOfDeviceMemory
from mmrl.errors import MmrlError

CPU = torch.device("cpu")
BLOCK_BYTES = 24 << 10  # 3/8 of a granule: blocks straddle granules


@pytest.fixture
def memory() -> DeviceMemory:
    return DeviceMemory(CPU, 4 << 20)


@pytest.fixture
def pool(memory: DeviceMemory) -> Iterator[KVPool]:
    pool = make_pool(memory)
    yield pool
    pool.close()


def make_pool(memory: DeviceMemory, **changes: Any) -> KVPool:
    pool = KVPool(memory, layers=3, kv_heads=2, head_dim=64, dtype=torch.float16, **changes)
    assert pool.block_bytes == BLOCK_BYTES
    return pool


def fill(pool: KVPool, key: int) -> None:
    """Write into each block of a sequence what nobody else writes."""
    for place, block in enumerate(pool.table(key).tolist()):
        pool.data[block] = key + place / 64


def check(pool: KVPool, key: int, blocks: int) -> None:
    table = pool.table(key)
    assert len(table) == blocks
    for place, block in enumerate(table.tolist()):
        assert (pool.data[block] == key + place / 64).all()


def needed(pool: KVPool) -> int:
    """Bytes of all granules in which a block of a table lies."""
    granule, used = kv.DeviceMemory(CPU, 1).granule, set()
    for key in list(pool._tables):
        for block in pool.table(key).tolist():
            first = block * BLOCK_BYTES // granule
            used |= set(range(first, ((block + 1) * BLOCK_BYTES - 1) // granule + 1))
    return len(used) * granule


def test_a_block_is_contiguous_over_all_layers(pool: KVPool) -> None:
    assert pool.data.shape == (pool.capacity, 3, 2, 2, 16, 64)
    assert pool.data.is_contiguous()
    assert pool.capacity == (4 << 20) // BLOCK_BYTES


def test_tables_grow_and_shrink_and_memory_follows(pool: KVPool, memory: DeviceMemory) -> None:
    pool.resize(7, 5)
    pool.resize(8, 3)
    before = pool.table(7)
    pool.resize(7, 9)
    assert pool.table(7)[:5].tolist() == before.tolist()
    assert len(before) == 5, "a table that was handed out does not change"
    assert sorted([*pool.table(7), *pool.table(8)]) == list(range(12))
    fill(pool, 7)
    fill(pool, 8)
    assert memory.committed_bytes == pool.committed_bytes == needed(pool)
    pool.resize(7, 2)
    check(pool, 7, 2)
    check(pool, 8, 3)
    assert pool.blocks == 5
    pool.resize(9, 1)
    assert pool.table(9).tolist() == [2], "the lowest free block is taken first"
    for key in (7, 8, 9, 10):
        pool.free(key)
    assert pool.blocks == pool.committed_bytes == memory.committed_bytes == 0
    with pytest.raises(ValueError, match="read-only"):
        before[0] = 1


def test_a_failed_growth_changes_nothing(pool: KVPool, memory: DeviceMemory) -> None:
    other = memory.reserve(2 << 20)
    other.commit(0, 2 << 20)
    pool.resize(1, 30)
    fill(pool, 1)
    pool.resize(2, 4)
    pool.resize(1, 10)
    state = (pool.blocks, pool.committed_bytes, pool.table(1).tolist(), pool.table(2).tolist())
    with pytest.raises(OutOfDeviceMemory):
        pool.resize(2, 120)
    assert state == (
        pool.blocks,
        pool.committed_bytes,
        pool.table(1).tolist(),
        pool.table(2).tolist(),
    )
    check(pool, 1, 10)
    other.decommit(0, 2 << 20)
    pool.resize(2, 120)
    assert len({*pool.table(1).tolist(), *pool.table(2).tolist()}) == 130
    other.close()


def test_a_pool_has_no_more_blocks_than_its_capacity(memory: DeviceMemory) -> None:
    pool = make_pool(memory, capacity=4)
    pool.resize(1, 3)
    with pytest.raises(MmrlError, match="no more than 4 blocks"):
        pool.resize(2, 2)
    pool.resize(2, 1)
    with pytest.raises(MmrlError, match="does not hold one KV block"):
        make_pool(DeviceMemory(CPU, 1000))


def test_compaction_closes_holes_but_leaves_what_must_stay(pool: KVPool) -> None:
    for key in range(40):
        pool.resize(key, 1 + key % 4)
        fill(pool, key)
    for key in range(0, 40, 2):
        pool.free(key)
    kept = {key: 1 + key % 4 for key in range(1, 40, 2)}
    fixed = {key: pool.table(key).tolist() for key in (37, 39)}
    assert pool.committed_bytes > pool.blocks * BLOCK_BYTES + pool.slack_bytes
    movable = set(kept) - set(fixed)
    assert pool.compact(movable) > 0
    assert {key: pool.table(key).tolist() for key in fixed} == fixed
    for key, blocks in kept.items():
        check(pool, key, blocks)
    pool.compact(set(kept))
    assert pool.committed_bytes <= pool.blocks * BLOCK_BYTES + pool.slack_bytes
    assert pool.compact(set(kept)) == 0
    for key, blocks in kept.items():
        check(pool, key, blocks)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_any_history_keeps_every_block_once(seed: int) -> None:
    draw = random.Random(seed)
    memory = DeviceMemory(CPU, 3 << 20)
    pool = make_pool(memory)
    host = HostKV(1 << 20, page_locked=False)
    sizes: dict[int, int] = {}
    saved: dict[int, int] = {}
    for _ in range(60):
        key = draw.randrange(10)
        match draw.choice(["resize", "resize", "free", "compact", "save", "restore"]):
            case "resize" if key not in saved:
                blocks = draw.randint(0, 20)
                try:
                    pool.resize(key, blocks)
                except (OutOfDeviceMemory, MmrlError):
                    continue
                sizes[key] = blocks
                fill(pool, key)
            case "free" if key not in saved:
                pool.free(key)
                sizes.pop(key, None)
            case "compact":
                movable = {k for k in sizes if draw.random() < 0.8}
                fixed = {k: pool.table(k).tolist() for k in sizes if k not in movable}
                pool.compact(movable)
                assert all(pool.table(k).tolist() == fixed[k] for k in fixed)
                if len(movable) == len(sizes):
                    assert pool.committed_bytes <= pool.blocks * BLOCK_BYTES + pool.slack_bytes
            case "save" if sizes.get(key) and key not in saved:
                try:
                    host.save(pool, key)
                except HostFull:
                    assert (host.used_bytes + sizes[key] * BLOCK_BYTES) > host.limit_bytes
                    continue
                saved[key] = sizes.pop(key)
                pool.free(key)
            case "restore" if key in saved:
                try:
                    pool.resize(key, saved[key])
                except (OutOfDeviceMemory, MmrlError):
                    continue
                host.restore(pool, key)
                host.free(key)
                sizes[key] = saved.pop(key)
        tables = np.concatenate([pool.table(k) for k in range(10)])
        assert len(set(tables.tolist())) == len(tables) == pool.blocks == sum(sizes.values())
        assert memory.committed_bytes == pool.committed_bytes == needed(pool)
        assert host.used_bytes == sum(saved.values()) * BLOCK_BYTES
        for k, blocks in sizes.items():
            check(pool, k, blocks)
    pool.close()
    assert memory.committed_bytes == 0


def test_a_sequence_returns_into_other_blocks(pool: KVPool) -> None:
    host = HostKV(10 * BLOCK_BYTES, page_locked=False)
    pool.resize(1, 4)
    pool.resize(2, 2)
    fill(pool, 1)
    host.save(pool, 1)
    assert 1 in host and 2 not in host
    pool.free(1)
    pool.resize(3, 3)
    pool.resize(1, 6)  # with room to grow
    assert pool.table(1).tolist() != [0, 1, 2, 3]
    host.restore(pool, 1)
    pool.resize(1, 4)
    check(pool, 1, 4)
    assert host.used_bytes == 4 * BLOCK_BYTES
    host.free(1)
    host.free(1)
    assert host.used_bytes == 0 and 1 not in host


def test_every_byte_of_the_host_can_be_used(pool: KVPool, memory: DeviceMemory) -> None:
    """Blocks of two sizes leave gaps that fit neither; they are used in parts."""
    small = KVPool(memory, layers=1, kv_heads=1, head_dim=80, dtype=torch.float16)
    limit = 7 * BLOCK_BYTES + 5 * small.block_bytes
    host = HostKV(limit, page_locked=False)
    for key, (which, blocks) in enumerate(
        [(small, 1), (pool, 2), (small, 2), (pool, 1), (small, 2), (pool, 4)]
    ):
        which.resize(key, blocks)
        fill(which, key)
        host.save(which, key)
    assert host.used_bytes == limit
    for key in (1, 3, 4):
        host.free(key)
    pool.resize(9, 3)
    fill(pool, 9)
    host.save(pool, 9)
    small.resize(10, 2)
    fill(small, 10)
    host.save(small, 10)
    assert host.used_bytes == limit
    small.resize(11, 1)
    with pytest.raises(HostFull, match=r"0 of .* free"):
        host.save(small, 11)
    for which, keys in ((pool, (5, 9)), (small, (0, 2, 10))):
        for key in keys:
            which.data[torch.from_numpy(which.table(key).astype(np.int64))] = 0
            host.restore(which, key)
            check(which, key, len(which.table(key)))
            host.free(key)
    assert host.used_bytes == 0
    pool.resize(12, 7)
    host.save(pool, 12)


def test_adjacent_blocks_are_one_copy(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.resize(1, 3)
    pool.resize(2, 1)
    pool.resize(1, 8)
    sizes = []
    copy = kv.copy_all_async

    def counted(dst: Sequence[torch.Tensor], src: Sequence[torch.Tensor]) -> None:
        sizes.extend(len(part) // BLOCK_BYTES for part in dst)
        copy(dst, src)

    monkeypatch.setattr(kv, "copy_all_async", counted)
    HostKV(1 << 20, page_locked=False).save(pool, 1)
    assert sizes == [3, 5]


def test_misuse_of_the_host_is_refused(pool: KVPool) -> None:
    host = HostKV(0, page_locked=False)
    pool.resize(1, 1)
    with pytest.raises(HostFull):
        host.save(pool, 1)
    assert 1 not in host
    host = HostKV(1 << 20, page_locked=False)
    host.save(pool, 1)
    with pytest.raises(ValueError, match="already"):
        host.save(pool, 1)
    pool.free(1)
    with pytest.raises(ValueError, match="1 blocks are saved"):
        host.restore(pool, 1)
    host.close()
