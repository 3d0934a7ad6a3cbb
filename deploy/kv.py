"""The KV cache of a model in blocks of 16 tokens, on the device (`KVPool`) and saved (`HostKV`).

A pool is one long array of blocks over reserved addresses, ``[block, layer, 2, kv_head, token,
head_dim]``: the keys and values of 16 tokens in all layers lie together, so that a sequence goes to
the host and back in few large copies, which wait for no kernel. Memory is put behind *units* of a
frame each when a block of them is taken, and given back when none is; since the lowest free block
is always taken first, little lies idle between. What does can be closed up (`KVPool.compact`).

Pools and tables are changed by one thread. A table that was handed out never changes: a change
makes a new one, so that an iteration in flight keeps what it was given.
"""

import heapq
import threading
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from mmrl.deploy.memory import (
    DeviceMemory,
    HostArena,
    OutOfDeviceMemory,
    copy_all_async,
    wait_for_stream,
)
from mmrl.errors import MmrlError

BLOCK_TOKENS = 16
Table = npt.NDArray[np.int32]
Blocks = TypeVar("Blocks", int, npt.NDArray[np.int64])

_MOVES = 64  # blocks that are moved at once, before it is known whether more have to be


class HostFull(MmrlError):
    """The host memory for saved KV is used up."""


class KVPool:
    """Blocks of one model's KV cache on the device.

    Args:
        memory: The device's memory; what is committed counts against its budget.
        layers: Decoder layers.
        kv_heads: Heads of keys and values.
        head_dim: Their size.
        dtype: Of keys and values.
        capacity: Most blocks; by default as many as the budget holds.

    Attributes:
        data: The pool, ``[capacity, layers, 2, kv_heads, 16, head_dim]``; only blocks that are in
            a table have memory behind them, and their content is undefined until it is written.
        block_bytes: Size of a block.
        capacity: Most blocks.
        blocks: Blocks in tables.
        committed_bytes: Device memory behind the pool.
        slack_bytes: By how much committed_bytes is at most above the blocks' own bytes after
            `compact`, if every sequence may be moved.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        capacity: int | None = None,
    ) -> None:
        shape = (layers, 2, kv_heads, BLOCK_TOKENS, head_dim)
        self.device = memory.device
        self.block_bytes = int(np.prod(shape)) * dtype.itemsize
        self.capacity = memory.budget_bytes // self.block_bytes if capacity is None else capacity
        if self.capacity < 1:
            raise MmrlError(
                f"the device budget of {memory.budget_bytes:,} bytes does not hold one KV block of "
                f"{self.block_bytes:,}",
                "raise the budget",
            )
        self._range = memory.reserve(self.capacity * self.block_bytes)
        self._unit = memory.frame_bytes
        self._bytes = self._range.tensor[: self.capacity * self.block_bytes]
        self.data = self._bytes.view(dtype).view(self.capacity, *shape)
        units = -(-self._range.nbytes // self._unit)
        self._users = np.zeros(units, np.int64)  # blocks that lie, in part, in each unit
        self._committed = np.zeros(units, np.bool_)
        self._tables: dict[int, Table] = {}
        self._free: list[int] = []  # heap of free blocks below _top
        self._top = 0
        self.blocks = 0
        self.slack_bytes = 2 * self._unit
        if self.device.type == "cuda":
            # Triton refuses an address without memory behind it, and a pool is passed by its first.
            first = self._units(0)
            self._commit([first])
            self._users[first] += 1
            self.slack_bytes += (first.stop - first.start) * self._unit

    @property
    def committed_bytes(self) -> int:
        """Return the device memory behind the pool."""
        return self._range.committed_bytes

    def table(self, key: int) -> Table:
        """Return the blocks of a sequence in order, read-only; none for an unknown key."""
        return self._tables.get(key, _NO_BLOCKS)

    def resize(self, key: int, blocks: int) -> None:
        """Give a sequence so many blocks; the first ones stay.

        Args:
            key: Of the sequence; new keys are welcome.
            blocks: 0 forgets it.

        Raises:
            OutOfDeviceMemory: No memory for them; nothing has changed then.
            MmrlError: The pool has no more blocks.
        """
        table = self.table(key)
        if blocks < len(table):
            self._release(table[blocks:])
            table = table[:blocks]
        elif blocks > len(table):
            table = np.append(table, self._take(blocks - len(table)))
        self._set_table(key, table)

    def free(self, key: int) -> None:
        """Forget a sequence, known or not."""
        self.resize(key, 0)

    def compact(self, movable: Container[int]) -> int:
        """Move blocks from the end into holes and give back the memory that becomes idle.

        Does nothing while idle memory is within `slack_bytes`. The copies run on the current
        stream and have ended on return.

        Args:
            movable: Keys of the sequences that no iteration or transfer uses now.

        Returns:
            Number of blocks moved.
        """
        moved = 0
        while self._scattered and (closed := self._close_holes(movable)):
            moved += closed
        self._trim()
        return moved

    def close(self) -> None:
        """Give all memory and the addresses back."""
        self._tables.clear()
        del self.data, self._bytes
        self._range.close()

    def block_run(self, start: int, count: int) -> torch.Tensor:
        """Return adjacent blocks as bytes, uint8 ``[count * block_bytes]``."""
        return self._bytes[start * self.block_bytes : (start + count) * self.block_bytes]

    def _units(self, block: int) -> slice:
        """Return the units that a block lies in."""
        return slice(*self._unit_bounds(block))

    def _unit_bounds(self, block: Blocks) -> tuple[Blocks, Blocks]:
        """Return the first unit that a block, or each of several, lies in, and the one after."""
        first = block * self.block_bytes // self._unit
        return first, ((block + 1) * self.block_bytes - 1) // self._unit + 1

    def _set_table(self, key: int, table: Table) -> None:
        if len(table):
            table.flags.writeable = False
            self._tables[key] = table
        else:
            self._tables.pop(key, None)

    def _take(self, count: int) -> Table:
        missing = count - len(self._free)
        if self._top + missing > self.capacity:
            raise MmrlError(f"the KV pool has no more than {self.capacity:,} blocks")
        taken = [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]
        taken += range(self._top, self._top + max(0, missing))
        places = [self._units(block) for block in taken]
        try:
            self._commit(places)
        except BaseException:
            for block in taken:
                if block < self._top:
                    heapq.heappush(self._free, block)
            self._trim()
            raise
        for units in places:
            self._users[units] += 1
        self._top = max(self._top, taken[-1] + 1)
        self.blocks += count
        return np.array(taken, np.int32)

    def _release(self, blocks: Table) -> None:
        for block in blocks.tolist():
            self._users[self._units(block)] -= 1
            heapq.heappush(self._free, block)
        self.blocks -= len(blocks)
        self._trim()

    @property
    def _scattered(self) -> bool:
        return self.committed_bytes > self.blocks * self.block_bytes + self.slack_bytes

    def _close_holes(self, movable: Container[int]) -> int:
        """Move the last blocks into the first holes: first those that have memory behind them.

        Memory is put behind the others a unit at a time, as far as it goes and as it is needed.

        Returns:
            Number of blocks moved.
        """
        places = sorted(
            (
                (block, key, place)
                for key, table in self._tables.items()
                if key in movable
                for place, block in enumerate(table.tolist())
            ),
            reverse=True,
        )
        holes = np.sort(np.array(self._free, np.int64))
        first, end = self._unit_bounds(holes)
        committed = np.concatenate([[0], np.cumsum(self._committed)])
        ready = committed[end] - committed[first] == end - first
        backed, bare = holes[ready], holes[~ready]
        batches = np.split(backed, range(_MOVES, len(backed), _MOVES))
        batches += np.split(bare, np.flatnonzero(np.diff(first[~ready])) + 1)  # one for each unit
        taken: dict[int, int] = {}  # hole -> the block that was moved there
        for batch in batches:
            both = zip(places[len(taken) :], batch.tolist(), strict=False)
            pairs = [(place, hole) for place, hole in both if hole < place[0]]
            if not pairs:
                continue
            try:
                self._commit([self._units(hole) for _, hole in pairs])
            except OutOfDeviceMemory:
                break
            self._move(pairs)
            taken |= {hole: place[0] for place, hole in pairs}
            if not self._scattered:
                break
        self._free = [block for block in holes.tolist() if block not in taken] + [*taken.values()]
        heapq.heapify(self._free)
        return len(taken)

    def _move(self, pairs: list[tuple[tuple[int, int, int], int]]) -> None:
        """Move blocks, each known by (block, key, place in the table of the key), into holes."""
        changed: dict[int, Table] = {}
        copy_all_async(
            [self.block_run(hole, 1) for _, hole in pairs],
            [self.block_run(block, 1) for (block, _, _), _ in pairs],
        )
        for (_, key, place), hole in pairs:
            if key not in changed:
                changed[key] = self._tables[key].copy()
            changed[key][place] = hole
        wait_for_stream(self.device)
        for (block, _, _), hole in pairs:
            self._users[self._units(block)] -= 1
            self._users[self._units(hole)] += 1
        for key, table in changed.items():
            self._set_table(key, table)
        self._trim()

    def _commit(self, places: Iterable[slice]) -> None:
        """Put memory behind units; those side by side at once, which is quicker."""
        wanted = np.zeros_like(self._committed)
        for units in places:
            wanted[units] = True
        for first, count in _runs(np.flatnonzero(wanted & ~self._committed)):
            start, stop = self._unit_bytes(first)[0], self._unit_bytes(first + count - 1)[1]
            self._range.commit(start, stop, part=self._unit)
            self._committed[first : first + count] = True

    def _trim(self) -> None:
        """Give back units that no block lies in."""
        for unit in np.flatnonzero(self._committed & (self._users == 0)).tolist():
            self._range.decommit(*self._unit_bytes(unit))
            self._committed[unit] = False
        if not self.blocks:
            self._free, self._top = [], 0

    def _unit_bytes(self, unit: int) -> tuple[int, int]:
        return unit * self._unit, min((unit + 1) * self._unit, self._range.nbytes)


@dataclass(frozen=True, slots=True)
class _Saved:
    blocks: int
    extents: tuple[tuple[int, int], ...]  # (start, stop) in the arena, in order


class HostKV:
    """KV of preempted sequences in host memory.

    A sequence lies in one extent of the arena if there is one, else in several: as long as the
    bytes are free at all, they can be used. Safe to use from several threads, a key from one at a
    time.

    Args:
        limit_bytes: Size of the arena; 0 for none.
        page_locked: For copies from and to a GPU.

    Attributes:
        limit_bytes: As given.
        used_bytes: Bytes of saved sequences.
    """

    def __init__(self, limit_bytes: int, page_locked: bool) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._arena = HostArena(limit_bytes, page_locked) if limit_bytes else None
        self._gaps = [(0, limit_bytes)] if limit_bytes else []  # in order, never adjacent
        self._saved: dict[int, _Saved] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: object) -> bool:
        return key in self._saved

    def save(self, pool: KVPool, key: int) -> None:
        """Copy the blocks of a sequence to the host, on the current stream; returns when done.

        Raises:
            HostFull: There is no room; nothing has changed then.
            ValueError: The key is saved already.
        """
        if key in self._saved:
            raise ValueError(f"sequence {key} is saved already")
        table = pool.table(key)
        saved = _Saved(len(table), self._take(len(table) * pool.block_bytes))
        try:
            self._copy(pool, table, saved, to_host=True)
        except BaseException:
            self._give(saved)
            raise
        self._saved[key] = saved

    def restore(self, pool: KVPool, key: int) -> None:
        """Copy a saved sequence into its first blocks in the pool, as many as were saved.

        On the current stream; returns when done. The host copy stays until it is freed.
        """
        saved = self._saved[key]
        self._copy(pool, pool.table(key)[: saved.blocks], saved, to_host=False)

    def free(self, key: int) -> None:
        """Forget a saved sequence; unknown keys are ignored."""
        saved = self._saved.pop(key, None)
        if saved is not None:
            self._give(saved)

    def close(self) -> None:
        """Give the arena back."""
        if self._arena is not None:
            self._arena.close()

    def _take(self, nbytes: int) -> tuple[tuple[int, int], ...]:
        with self._lock:
            if self.used_bytes + nbytes > self.limit_bytes:
                raise HostFull(
                    f"{nbytes:,} bytes of KV to save, "
                    f"{self.limit_bytes - self.used_bytes:,} of {self.limit_bytes:,} free",
                    "raise the limit of host memory for saved KV",
                )
            whole = [gap for gap in self._gaps if gap[1] - gap[0] >= nbytes]
            # The tightest gap that holds all of it; or else as few gaps as possible.
            if whole:
                order = [min(whole, key=lambda gap: gap[1] - gap[0])]
            else:
                order = sorted(self._gaps, key=lambda gap: gap[0] - gap[1])
            extents = []
            left = nbytes
            for start, stop in order:
                if not left:
                    break
                taken = min(left, stop - start)
                extents.append((start, start + taken))
                left -= taken
                self._gaps.remove((start, stop))
                if start + taken < stop:
                    self._gaps.append((start + taken, stop))
            self._gaps.sort()
            self.used_bytes += nbytes
            return tuple(extents)

    def _give(self, saved: _Saved) -> None:
        with self._lock:
            merged: list[tuple[int, int]] = []
            for start, stop in sorted([*self._gaps, *saved.extents]):
                if merged and merged[-1][1] == start:
                    merged[-1] = (merged[-1][0], stop)
                else:
                    merged.append((start, stop))
            self._gaps = merged
            self.used_bytes -= sum(stop - start for start, stop in saved.extents)

    def _copy(self, pool: KVPool, table: Table, saved: _Saved, *, to_host: bool) -> None:
        if len(table) != saved.blocks:
            raise ValueError(f"{saved.blocks} blocks are saved, the table has {len(table)}")
        if not saved.blocks:
            return
        assert self._arena is not None
        blocks = [pool.block_run(*run) for run in _runs(table)]
        extents = [self._arena.tensor[start:stop] for start, stop in saved.extents]
        there, here = zip(*_paired(blocks, extents), strict=True)
        if to_host:
            copy_all_async(here, there)
        else:
            copy_all_async(there, here)
        wait_for_stream(pool.device)


_NO_BLOCKS = np.empty(0, np.int32)
_NO_BLOCKS.flags.writeable = False


def _runs(numbers: npt.NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of adjacent numbers, such as the blocks of a table, in order."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    for run in np.split(numbers, cuts):
        if len(run):
            yield int(run[0]), len(run)


def _paired(
    left: list[torch.Tensor], right: list[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut two lists of bytes, as long in all, into pairs of equal length, in order."""
    left, right = left[::-1], right[::-1]
    while left and right:
        one, other = left.pop(), right.pop()
        length = min(len(one), len(other))
        yield one[:length], other[:length]
        if length < len(one):
            left.append(one[length:])
        if length < len(other):
            right.append(other[length:])
