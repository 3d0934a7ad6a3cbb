"""Device memory is committed exactly within its budget; host memory is found, taken, given back."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrl.deploy import memory as memory_module
from mmrl.deploy.frames import DriverOutOfMemory, Frames, frame_size
from mmrl.deploy.memory import (
    BudgetExceeded,
    DeviceMemory,
    HostArena,
    OutOfDeviceMemory,
    copy_async,
    host_available_bytes,
    wait_for_stream,
)
from mmrl.errors import MmrlError

CPU = torch.device("cpu")
G = DeviceMemory(CPU, 0).granule


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_reserved_addresses_cost_nothing_and_stay() -> None:
    memory = DeviceMemory(CPU, 4 * G)
    space = memory.reserve(100 * G - 5)
    address = space.tensor.data_ptr()
    assert (space.nbytes, space.tensor.numel(), space.tensor.dtype) == (
        100 * G,
        100 * G,
        torch.uint8,
    )
    assert memory.committed_bytes == 0
    space.commit(98 * G, 100 * G)
    space.tensor[98 * G :] = 7
    assert space.tensor[-1] == 7
    assert memory.committed_bytes == space.committed_bytes == 2 * G
    assert memory.free_bytes == 2 * G
    space.decommit(98 * G, 100 * G)
    space.commit(0, G)
    assert space.tensor.data_ptr() == address
    assert (memory.committed_bytes, memory.peak_bytes) == (G, 2 * G)
    space.close()
    space.close()
    assert memory.committed_bytes == 0
    assert space.tensor.numel() == 0


def test_the_budget_is_over_all_ranges_and_nothing_is_taken_beyond_it() -> None:
    memory = DeviceMemory(CPU, 5 * G)
    one, two = memory.reserve(4 * G), memory.reserve(4 * G)
    one.commit(0, 3 * G)
    with pytest.raises(BudgetExceeded, match=r"budget .* free") as caught:
        two.commit(0, 3 * G)
    assert isinstance(caught.value, OutOfDeviceMemory)
    assert caught.value.remedy
    assert (memory.committed_bytes, two.committed_bytes) == (3 * G, 0)
    two.commit(G, 3 * G)
    assert memory.committed_bytes == memory.peak_bytes == memory.budget_bytes


def test_pages_given_back_return_to_the_machine() -> None:
    nbytes = 1024 * G  # 64 MiB
    memory = DeviceMemory(CPU, nbytes)
    space = memory.reserve(nbytes)
    empty = rss()
    space.commit(0, nbytes, part=nbytes // 2)
    space.tensor.fill_(1)
    assert rss() - empty > 0.9 * nbytes
    space.decommit(0, nbytes // 2)
    assert rss() - empty < 0.6 * nbytes
    assert space.tensor[nbytes // 2] == 1
    space.close()
    assert rss() - empty < 0.1 * nbytes


@given(st.data())
def test_any_committed_granules_can_be_given_back_but_a_whole_part_only_as_one(
    data: st.DataObject,
) -> None:
    """Compared with a plain list: the owner of each granule, 0 for none."""
    granules, budget = 12, 8
    memory = DeviceMemory(CPU, budget * G)
    space = memory.reserve(granules * G)
    owner = [0] * granules
    for number in range(1, 15):
        start = data.draw(st.integers(0, granules))
        stop = data.draw(st.integers(start, granules))
        parts = set(owner[start:stop])
        if data.draw(st.booleans()):
            part = data.draw(st.sampled_from([None, G]))
            if parts - {0}:
                with pytest.raises(ValueError, match="committed already"):
                    space.commit(start * G, stop * G, part=part)
            elif sum(map(bool, owner)) + stop - start > budget:
                with pytest.raises(BudgetExceeded):
                    space.commit(start * G, stop * G, part=part)
            else:
                space.commit(start * G, stop * G, part=part)
                # A whole part has one owner, each granule of another its own.
                owner[start:stop] = [
                    100 * number + i if part else number for i in range(stop - start)
                ]
        else:
            outside = set(owner[:start]) | set(owner[stop:])
            if 0 in parts or parts & outside:
                with pytest.raises(ValueError, match="whole committed parts"):
                    space.decommit(start * G, stop * G)
            else:
                space.decommit(start * G, stop * G)
                owner[start:stop] = [0] * (stop - start)
        assert space.committed_bytes == memory.committed_bytes == sum(map(bool, owner)) * G
    space.close()
    assert memory.committed_bytes == 0


class FakeDriver:
    """Stands in for the CUDA driver: checks that its rules are kept, and fails on demand."""

    granule = 2 << 20

    def __init__(self) -> None:
        self.next = 1 << 44
        self.reserved: dict[int, int] = {}
        self.sizes: dict[object, int] = {}  # of the frames that exist
        self.mapped: dict[int, tuple[int, object]] = {}
        self.opened: set[tuple[int, int]] = set()
        self.calls = 0  # of map and unmap
        self.room = 1 << 40  # bytes

    def reserve(self, nbytes: int) -> int:
        assert nbytes % self.granule == 0
        self.next += 1 << 40
        self.reserved[self.next] = nbytes
        return self.next

    def free(self, address: int, nbytes: int) -> None:
        assert not any(address <= at < address + nbytes for at in self.mapped)
        assert self.reserved.pop(address) == nbytes

    def create(self, nbytes: int) -> object:
        if sum(self.sizes.values()) + nbytes > self.room:
            raise DriverOutOfMemory("cuMemCreate failed")
        handle = object()
        self.sizes[handle] = nbytes
        return handle

    def release(self, handle: object) -> None:
        assert handle not in [mapped for _, mapped in self.mapped.values()]
        del self.sizes[handle]

    def map(self, address: int, nbytes: int, handle: object) -> None:
        ends = [(at, at + size) for at, (size, _) in self.mapped.items()]
        assert all(stop <= address or address + nbytes <= start for start, stop in ends)
        assert self.sizes[handle] == nbytes
        assert handle not in [mapped for _, mapped in self.mapped.values()]
        self.mapped[address] = nbytes, handle
        self.calls += 1

    def open(self, address: int, nbytes: int) -> None:
        self.opened.add((address, nbytes))

    def unmap(self, address: int, nbytes: int) -> None:
        assert self.covers(address, nbytes)
        for at in [at for at in self.mapped if address <= at < address + nbytes]:
            del self.mapped[at]
        self.calls += 1

    def covers(self, address: int, nbytes: int) -> bool:
        """Whether there is memory behind all of some addresses."""
        at = address
        while at < address + nbytes:
            if at not in self.mapped:
                return False
            at += self.mapped[at][0]
        return at == address + nbytes


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeDriver, DeviceMemory]:
    """Device memory as on CUDA, without a GPU: the tensor over it has no bytes."""
    driver = FakeDriver()
    memory = DeviceMemory(CPU, 100 * driver.granule)
    memory.granule = driver.granule
    frame_bytes = 16 * driver.granule
    monkeypatch.setattr(memory, "_frames", Frames(driver, memory.budget_bytes, frame_bytes))

    def as_tensor(array: memory_module._CudaArray, device: torch.device) -> torch.Tensor:
        address, _ = array.__cuda_array_interface__["data"]
        assert driver.covers(address, driver.granule)  # or torch could not tell its device
        shape = array.__cuda_array_interface__["shape"]
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    return driver, memory


def base_of(space: memory_module.VirtualRange) -> int:
    return int(space._address)  # type: ignore[attr-defined]


def test_there_is_memory_behind_what_is_committed(cuda: tuple[FakeDriver, DeviceMemory]) -> None:
    driver, memory = cuda
    g = driver.granule
    space = memory.reserve(50 * g - 1)
    base = base_of(space)
    assert driver.reserved == {base: 50 * g}
    assert space.tensor.shape == (50 * g,)
    space.commit(0, 39 * g)  # frames of 32, 8 and 2 MiB
    assert driver.covers(base, 39 * g) and (base, 39 * g) in driver.opened
    assert sorted(size // g for size, _ in driver.mapped.values()) == [1, 1, 1, 4, 16, 16]
    space.commit(40 * g, 45 * g, later=True)
    assert not driver.covers(base + 40 * g, 5 * g) and memory.committed_bytes == 44 * g
    space.materialise(40 * g, 45 * g)
    assert driver.covers(base + 40 * g, 5 * g)
    with pytest.raises(ValueError, match="not a committed part"):
        space.materialise(45 * g, 46 * g)
    space.close()
    memory.close()
    assert not driver.mapped and not driver.reserved and not driver.sizes
    assert memory.committed_bytes == 0


def test_what_comes_back_before_anybody_needs_it_is_not_mapped_again(
    cuda: tuple[FakeDriver, DeviceMemory],
) -> None:
    driver, memory = cuda
    g = driver.granule
    space = memory.reserve(50 * g)
    space.commit(0, 40 * g)
    calls = driver.calls
    for _ in range(3):
        space.decommit(0, 40 * g)
        space.commit(0, 40 * g)
    assert driver.calls == calls and driver.covers(base_of(space), 40 * g)


def test_what_kv_gives_back_fits_weights_and_the_other_way_round(
    cuda: tuple[FakeDriver, DeviceMemory],
) -> None:
    driver, memory = cuda
    g = driver.granule
    blocks, weights = memory.reserve(96 * g), memory.reserve(96 * g)
    blocks.commit(0, 96 * g, part=16 * g)
    made = set(driver.sizes)
    for _ in range(2):
        blocks.decommit(0, 96 * g)
        weights.commit(0, 96 * g)
        assert made == set(driver.sizes) and driver.covers(base_of(weights), 96 * g)
        weights.decommit(0, 96 * g)
        blocks.commit(0, 96 * g, part=16 * g)
        assert made == set(driver.sizes) and driver.covers(base_of(blocks), 96 * g)


@pytest.mark.parametrize(("budget_gb", "mib"), [(0.5, 8), (8, 8), (10, 16), (48, 32), (140, 32)])
def test_the_size_of_a_frame_follows_the_budget(budget_gb: float, mib: int) -> None:
    assert frame_size(int(budget_gb * 1e9), 2 << 20) == mib << 20
    assert frame_size(int(budget_gb * 1e9), 64 << 20) == 64 << 20


def test_parts_side_by_side_are_opened_and_unmapped_at_once(
    cuda: tuple[FakeDriver, DeviceMemory],
) -> None:
    driver, memory = cuda
    g = driver.granule
    space, other = memory.reserve(50 * g), memory.reserve(100 * g)
    base = base_of(space)
    space.commit(0, 12 * g, part=4 * g)
    space.decommit(4 * g, 12 * g)
    calls = driver.calls
    space.commit(4 * g, 16 * g, part=4 * g)  # two that are still there, and a new one
    assert driver.opened == {(base, 12 * g), (base + 12 * g, 4 * g), (base, g), (base_of(other), g)}
    assert driver.calls == calls + 1
    space.commit(16 * g, 31 * g)  # of six frames
    space.decommit(16 * g, 31 * g)
    calls = driver.calls
    other.commit(0, 84 * g)  # needs them: one call unmaps, 5 frames of 16 and one of 4 granules
    assert driver.calls - calls <= 1 + 7
    assert driver.covers(base, 16 * g) and not driver.covers(base + 16 * g, g)


def test_frames_move_and_never_exceed_the_budget(cuda: tuple[FakeDriver, DeviceMemory]) -> None:
    driver, memory = cuda
    g = driver.granule
    rng = np.random.default_rng(0)
    spaces = [memory.reserve(90 * g) for _ in range(3)]
    parts = [
        [(0, 36), (36, 60), (60, 67)],
        [(0, 33), (33, 66)],
        [(k, k + 4) for k in range(0, 88, 4)],
    ]
    held: set[tuple[int, int, int]] = set()
    for _ in range(2_000):
        k = int(rng.integers(3))
        start, stop = parts[k][int(rng.integers(len(parts[k])))]
        part = (k, start, stop)
        if part in held:
            spaces[k].decommit(start * g, stop * g)
            held.remove(part)
        else:
            try:
                spaces[k].commit(start * g, stop * g)
            except BudgetExceeded:
                continue
            held.add(part)
        assert sum(driver.sizes.values()) <= memory.budget_bytes
        for k, start, stop in held:
            assert driver.covers(base_of(spaces[k]) + start * g, (stop - start) * g)
    for space in spaces:
        space.close()
    memory.close()
    assert not driver.sizes


def test_a_device_that_runs_out_below_the_budget_gives_back_what_it_gave(
    cuda: tuple[FakeDriver, DeviceMemory],
) -> None:
    driver, memory = cuda
    g = driver.granule
    space = memory.reserve(20 * g)
    space.commit(0, 2 * g)
    driver.room = 5 * g
    with pytest.raises(OutOfDeviceMemory, match="out of memory") as caught:
        space.commit(2 * g, 8 * g, part=g)
    assert not isinstance(caught.value, BudgetExceeded)
    assert caught.value.remedy
    assert memory.committed_bytes == space.committed_bytes == 2 * g
    space.commit(7 * g, 10 * g, part=g)
    space.decommit(0, 2 * g)
    assert memory.committed_bytes == 3 * g


@pytest.mark.parametrize("bounds", [(0, 1), (1, G), (-G, G), (2 * G, G), (0, 5 * G)])
def test_only_granules_within_the_range_are_committed(bounds: tuple[int, int]) -> None:
    memory = DeviceMemory(CPU, 10 * G)
    space = memory.reserve(4 * G)
    with pytest.raises(ValueError, match="multiples"):
        space.commit(*bounds)
    with pytest.raises(ValueError, match="multiples"):
        space.decommit(*bounds)
    assert memory.committed_bytes == 0


def test_more_addresses_than_a_machine_has_are_refused_in_words() -> None:
    with pytest.raises(MmrlError, match="does not give") as caught:
        DeviceMemory(CPU, 1).reserve(1 << 60)
    assert caught.value.remedy


@pytest.mark.parametrize("nbytes", [0, -1])
def test_nothing_cannot_be_reserved(nbytes: int) -> None:
    with pytest.raises(ValueError):
        DeviceMemory(CPU, 1).reserve(nbytes)
    with pytest.raises(ValueError):
        HostArena(nbytes, page_locked=False)


def test_an_arena_has_exactly_the_size_asked_for_and_gives_it_back() -> None:
    nbytes = (48 << 20) + 1234
    empty = rss()
    arena = HostArena(nbytes, page_locked=False)
    assert (arena.tensor.numel(), arena.tensor.dtype) == (nbytes, torch.uint8)
    assert rss() - empty < 0.1 * nbytes  # pages come with what is written
    part = arena.tensor[-(40 << 20) :]
    part.fill_(3)
    assert (40 << 20) < rss() - empty < nbytes + (4 << 20)
    arena.close()
    arena.close()
    assert rss() - empty < 0.1 * nbytes


def test_an_arena_larger_than_the_machine_is_refused_in_words() -> None:
    with pytest.raises(MmrlError, match="does not give") as caught:
        HostArena(1 << 60, page_locked=False)
    assert caught.value.remedy


def test_bytes_are_copied_between_equal_tensors_only() -> None:
    source = torch.arange(100, dtype=torch.uint8)
    target = torch.zeros(100, dtype=torch.uint8)
    copy_async(target[:40], source[20:60])
    wait_for_stream(CPU)
    assert target.tolist() == [*range(20, 60)] + [0] * 60
    for dst, src in [
        (target, source[:1]),  # would be broadcast
        (target.float(), source.float()),
        (target[::2], source[::2]),
        (target.view(10, 10), source),
    ]:
        with pytest.raises(ValueError):
            copy_async(dst, src)


class Machine:
    """Files as the kernel shows them, in a folder of the test's own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(memory_module, "PROC", folder / "proc")
        monkeypatch.setattr(memory_module, "CGROUPS", folder / "cgroup")
        self.write("proc/meminfo", "MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")

    def write(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def group2(self, path: str, limit: str, used: int, cache: int) -> None:
        self.write(f"{path}/memory.max", f"{limit}\n")
        self.write(f"{path}/memory.current", f"{used}\n")
        self.write(f"{path}/memory.stat", f"anon 5\ninactive_file {cache}\n")

    def group1(self, path: str, limit: int, used: int, cache: int) -> None:
        self.write(f"{path}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{path}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{path}/memory.stat", f"inactive_file 1\ntotal_inactive_file {cache}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_without_control_groups_the_kernels_estimate_counts(machine: Machine) -> None:
    assert host_available_bytes() == 3000 << 10
    machine.write("proc/self/cgroup", "0::/some/where\n")
    assert host_available_bytes() == 3000 << 10


def test_the_tightest_group_of_version_2_counts_its_cache_excepted(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/outer/inner\n")
    machine.group2("cgroup/outer/inner", "max", 7, 0)
    assert host_available_bytes() == 3000 << 10
    machine.group2("cgroup/outer", "1000000", 700000, 50000)
    assert host_available_bytes() == 350000
    machine.group2("cgroup/outer/inner", "400000", 390000, 0)
    assert host_available_bytes() == 10000
    machine.group2("cgroup/outer/inner", "400000", 500000, 0)
    assert host_available_bytes() == 0


def test_a_group_of_version_1_counts_also_where_a_container_sees_only_its_own(
    machine: Machine,
) -> None:
    machine.write("proc/self/cgroup", "3:cpu,memory:/docker/abc\n2:cpu:/x\n0::/\n")
    machine.group1("cgroup/memory", 2000000, 600000, 100000)
    assert host_available_bytes() == 1500000
    machine.group1("cgroup/memory/docker/abc", 900000, 100000, 0)
    assert host_available_bytes() == 800000
    machine.group2("cgroup/unified", "300000", 0, 0)
    assert host_available_bytes() == 300000


def test_this_machine_has_some_memory_left_but_not_more_than_it_has() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < host_available_bytes() < total
