"""Memory of the device and of the host, taken and given back in pieces at addresses that stay.

Device memory is address space first and memory second. A `VirtualRange` reserves addresses once;
pages are put behind parts of it (`VirtualRange.commit`) and taken away again
(`VirtualRange.decommit`) while every tensor and every captured CUDA graph that names the addresses
stays valid. Nothing fragments, and a page given back by one model can be taken by any other. On
CUDA this is the driver's virtual memory management (`mmrl.deploy.frames`); on a machine without a
GPU the same interface stands on an anonymous mapping, whose pages the kernel takes back on request.
`DeviceMemory` counts what is committed against the budget of the node.

The host copy of the weights and the saved KV lie in a `HostArena`: a mapping of exactly the size
asked for, page-locked where a GPU copies from it. (torch's own page-locked allocator rounds each
allocation up to a power of two, and keeps what is freed.)
"""

import errno
import mmap
import os
import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mmrl.deploy.frames import Driver, DriverOutOfMemory, Frames, frame_size
from mmrl.errors import MmrlError

CPU_GRANULE = 64 << 10  # bytes; a multiple of the page size
MAP_NORESERVE = 0x4000  # Linux; Python names it only from 3.13 on
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]


class OutOfDeviceMemory(MmrlError):
    """The device has no memory left for what was asked."""


class BudgetExceeded(OutOfDeviceMemory):
    """What was asked goes beyond the budget, whatever the device may still have."""


class DeviceMemory:
    """The memory of one device that the node may use, and what of it is committed.

    Safe to use from several threads.

    Args:
        device: A CUDA device, or the CPU, whose memory then plays the device's.
        budget_bytes: Most bytes that may be committed at once.

    Attributes:
        device: As given, with its index.
        budget_bytes: As given.
        granule: Bytes; every range is committed in multiples of it.
        frame_bytes: What is best committed at once, and in multiples of it from the start.
        committed_bytes: Committed now, over all ranges.
        peak_bytes: Most that were ever committed.

    Raises:
        MmrlError: The CUDA driver cannot be used.
    """

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self._frames: Frames | None = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            driver = Driver(index)
            self.granule = driver.granule
            self.frame_bytes = frame_size(budget_bytes, driver.granule)
            self._frames = Frames(driver, budget_bytes, self.frame_bytes)
        else:
            self.granule = self.frame_bytes = CPU_GRANULE
        self.device = device
        self.budget_bytes = budget_bytes
        self.committed_bytes = 0
        self.peak_bytes = 0
        self._lock = threading.RLock()

    @property
    def free_bytes(self) -> int:
        """Return what of the budget is not committed."""
        return self.budget_bytes - self.committed_bytes

    def round_up(self, nbytes: int) -> int:
        """Return the bytes that a part of nbytes takes: the next multiple of the granule."""
        return -(-nbytes // self.granule) * self.granule

    def reserve(self, nbytes: int) -> "VirtualRange":
        """Reserve addresses without memory behind them; they cost nothing of the budget.

        Args:
            nbytes: At least 1; rounded up to whole granules.

        Raises:
            MmrlError: There are not so many addresses.
        """
        if nbytes < 1:
            raise ValueError(f"cannot reserve {nbytes} bytes")
        if self._frames is None:
            return _CpuRange(self, self.round_up(nbytes))
        return _CudaRange(self, self.round_up(nbytes), self._frames)

    @property
    def held_bytes(self) -> int:
        """Return what is taken of the device: committed, or kept for the next taker."""
        return self.committed_bytes if self._frames is None else self._frames.total_bytes

    def set_budget(self, budget_bytes: int) -> None:
        """Set the budget anew; what is kept for the next taker is given back.

        Raises:
            BudgetExceeded: More is committed.
        """
        if self.committed_bytes > budget_bytes:
            raise BudgetExceeded(
                f"{size_text(self.committed_bytes)} of device memory are committed, the budget "
                f"is {size_text(max(0, budget_bytes))}",
                "raise the memory budget",
            )
        self.budget_bytes = budget_bytes
        if self._frames is not None:
            self._frames.limit(budget_bytes)

    def close(self) -> None:
        """Give the memory back that is kept for the next taker."""
        if self._frames is not None:
            self._frames.close()

    def _take(self, nbytes: int) -> None:
        if self.committed_bytes + nbytes > self.budget_bytes:
            raise BudgetExceeded(
                f"{size_text(nbytes)} of device memory asked for, {size_text(self.free_bytes)} of "
                f"the budget of {size_text(self.budget_bytes)} free",
                "raise the memory budget, or serve fewer or smaller models",
            )
        self.committed_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.committed_bytes)

    def _give(self, nbytes: int) -> None:
        self.committed_bytes -= nbytes


class VirtualRange(ABC):
    """Addresses on the device, with memory behind the parts that are committed.

    Reading or writing outside of committed parts is an error that nothing catches: a fault on
    CUDA, zeros and untracked memory on the CPU. What is committed anew has no defined content.

    Attributes:
        tensor: uint8 [nbytes], the whole range; its address stays for life.
        nbytes: Size, a multiple of granule.
        granule: Bytes.
        committed_bytes: Committed now in this range.
    """

    tensor: torch.Tensor

    def __init__(self, memory: DeviceMemory, nbytes: int) -> None:
        self.nbytes = nbytes
        self.granule = memory.granule
        self.committed_bytes = 0
        self._memory = memory
        self._taken = bytearray(nbytes // self.granule)  # 1 for each committed granule
        self._parts: dict[int, int] = {}  # start -> stop of each part that is mapped as one

    def commit(
        self, start: int, stop: int, *, part: int | None = None, later: bool = False
    ) -> None:
        """Put memory behind the bytes from start to stop; all of it or, on an error, nothing.

        Args:
            start: A multiple of the granule.
            stop: A multiple of the granule.
            part: Bytes of each part, but for the last one; a multiple of the granule. A part can
                only be decommitted as a whole. Unless given, all of it is one part.
            later: Count it now, and put memory behind it by `materialise` before it is used.

        Raises:
            BudgetExceeded: It goes beyond the budget.
            OutOfDeviceMemory: The device itself has no such memory left.
            ValueError: The bounds are not aligned or outside, or a part is committed already.
        """
        with self._memory._lock:
            self._check(start, stop)
            if any(self._taken[start // self.granule : stop // self.granule]):
                raise ValueError(f"a part of {start}..{stop} is committed already")
            if start == stop:
                return
            self._memory._take(stop - start)
            parts = list(pairwise([*range(start, stop, part or stop - start), stop]))
            try:
                if not later:
                    self._map(parts)
            except BaseException:
                self._memory._give(stop - start)
                self._memory.close()  # others are short of memory too
                raise
            self._parts.update(parts)
            self._mark(start, stop, taken=True)

    def materialise(self, start: int, stop: int) -> None:
        """Put memory behind a part that was committed for later; does nothing twice.

        Raises:
            OutOfDeviceMemory: The device itself has no such memory left.
            ValueError: The bounds are not those of a committed part.
        """
        with self._memory._lock:
            if self._parts.get(start) != stop:
                raise ValueError(f"{start}..{stop} is not a committed part")
            self._map([(start, stop)])

    def decommit(self, start: int, stop: int) -> None:
        """Give the memory behind the bytes from start to stop back. Nothing may use it any more.

        Args:
            start: Where a committed part begins.
            stop: Where a committed part ends; everything between is committed.

        Raises:
            ValueError: The bounds are not such, nothing has changed then.
        """
        with self._memory._lock:
            self._check(start, stop)
            parts = []
            at = start
            while at < stop:
                end = self._parts.get(at)
                if end is None or end > stop:
                    raise ValueError(f"{start}..{stop} is not made of whole committed parts")
                parts.append((at, end))
                at = end
            for first, end in parts:
                self._unmap(first, end)
                del self._parts[first]
                self._mark(first, end, taken=False)
                self._memory._give(end - first)

    def close(self) -> None:
        """Give everything back, the addresses too. No tensor over them may be used any more."""
        with self._memory._lock:
            for start, stop in list(self._parts.items()):
                self.decommit(start, stop)
            if self.nbytes:
                self._free()
                self.nbytes = 0
                self.tensor = torch.empty(0, dtype=torch.uint8, device=self._memory.device)

    def _check(self, start: int, stop: int) -> None:
        aligned = start % self.granule == 0 == stop % self.granule
        if not (aligned and 0 <= start <= stop <= self.nbytes):
            raise ValueError(
                f"{start}..{stop} is not within 0..{self.nbytes} in multiples of {self.granule}"
            )

    def _mark(self, start: int, stop: int, *, taken: bool) -> None:
        granules = (stop - start) // self.granule
        first = start // self.granule
        self._taken[first : first + granules] = bytes([taken]) * granules
        self.committed_bytes += stop - start if taken else start - stop

    @abstractmethod
    def _map(self, parts: list[tuple[int, int]]) -> None:
        """Put memory behind parts, all or none; nothing to do where it is there already."""

    @abstractmethod
    def _unmap(self, start: int, stop: int) -> None:
        """Give the memory of a part back, if it has any."""

    @abstractmethod
    def _free(self) -> None:
        """Give the addresses back."""


class _CpuRange(VirtualRange):
    """An anonymous mapping: the kernel puts pages behind what is touched."""

    def __init__(self, memory: DeviceMemory, nbytes: int) -> None:
        self._mapping = _anonymous(nbytes, MAP_NORESERVE)
        super().__init__(memory, nbytes)
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)

    def _map(self, parts: list[tuple[int, int]]) -> None:
        pass

    def _unmap(self, start: int, stop: int) -> None:
        self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _free(self) -> None:
        del self._mapping  # unmapped with the last tensor over it


class _CudaRange(VirtualRange):
    """Addresses reserved with the driver, and frames behind each part."""

    def __init__(self, memory: DeviceMemory, nbytes: int, frames: Frames) -> None:
        super().__init__(memory, nbytes)
        self._frames = frames
        driver = frames.driver
        self._address = driver.reserve(nbytes)
        try:
            # torch asks the driver which device the first address belongs to, and it knows that
            # of mapped memory only. It never asks again.
            with memory._lock:
                frames.map([(self._address, self.granule)])
                try:
                    interface = _CudaArray(self._address, nbytes)
                    self.tensor = torch.as_tensor(interface, device=memory.device)
                finally:
                    frames.drop(self._address)
                    frames.unmap_within(self._address, nbytes)
        except BaseException:
            driver.free(self._address, nbytes)
            raise

    def _map(self, parts: list[tuple[int, int]]) -> None:
        memory = self._memory
        places = [(self._address + start, stop - start) for start, stop in parts]
        try:
            try:
                self._frames.map(places)
            except DriverOutOfMemory:
                torch.cuda.empty_cache()  # what torch keeps for later may be what is missing
                self._frames.map(places)
        except DriverOutOfMemory as error:
            asked = sum(nbytes for _, nbytes in places)
            raise OutOfDeviceMemory(
                f"{memory.device} is out of memory: {size_text(asked)} asked for while "
                f"{size_text(memory.committed_bytes)} of the budget of "
                f"{size_text(memory.budget_bytes)} were counted",
                "lower the memory budget, or stop what else uses the device",
            ) from error

    def _unmap(self, start: int, stop: int) -> None:
        self._frames.drop(self._address + start)

    def _free(self) -> None:
        with self._memory._lock:
            self._frames.unmap_within(self._address, self.nbytes)
            self._frames.driver.free(self._address, self.nbytes)


class _CudaArray:
    """A plain address as an array of bytes that torch understands."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class HostArena:
    """Host memory of exactly the size asked for, page-locked if a GPU shall copy from or to it.

    Args:
        nbytes: Size, at least 1.
        page_locked: Register it with CUDA; all of it is then taken from the machine at once.

    Attributes:
        tensor: uint8 [nbytes], zeros at first.

    Raises:
        MmrlError: The machine does not give so much.
    """

    def __init__(self, nbytes: int, page_locked: bool) -> None:
        if nbytes < 1:
            raise ValueError(f"cannot make an arena of {nbytes} bytes")
        self._mapping = _anonymous(nbytes, 0)
        try:
            # Fewer faults while it is filled, fewer pages to lock.
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages
                raise
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._registered = False
        if page_locked:
            self._touch()
            result = _cudart().cudaHostRegister(self.tensor.data_ptr(), nbytes, 0)
            if int(result) != 0:
                raise MmrlError(
                    f"cannot page-lock {size_text(nbytes)} of host memory: {result}",
                    "serve fewer models, or raise the limits on locked memory (ulimit -l) and on "
                    "the memory of the container",
                )
            self._registered = True

    def close(self) -> None:
        """Give the memory back; no tensor over it and no copy may use it any more."""
        if self._registered:
            result = _cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._registered = False
            if int(result) != 0:
                raise MmrlError(f"cannot release page-locked memory: {result}")
        if self.tensor.numel():
            self._mapping.madvise(mmap.MADV_DONTNEED)  # at once, even if a tensor is left over it
            self.tensor = torch.empty(0, dtype=torch.uint8)
            del self._mapping

    def _touch(self) -> None:
        """Have every page made by several threads; locking alone makes them one by one."""
        share = 256 << 20
        nbytes = self.tensor.numel()

        def touch(start: int) -> None:
            self.tensor[start : min(start + share, nbytes) : mmap.PAGESIZE].zero_()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(touch, range(0, nbytes, share)))


def copy_async(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Start a copy of bytes on the current stream; between CPU tensors it is done on return.

    To or from page-locked memory the call returns at once. (torch hands a non-blocking copy
    between contiguous tensors to cudaMemcpyAsync, and the driver itself knows which memory is
    locked, whoever locked it.)

    Args:
        dst: uint8 [n], contiguous.
        src: uint8 [n], contiguous, on the same or another device. It must stay unchanged, and
            dst unread, until the stream has passed the copy.

    Raises:
        ValueError: The tensors are not such.
    """
    plain = dst.dtype == src.dtype == torch.uint8 and dst.shape == src.shape
    if not (plain and dst.is_contiguous() and src.is_contiguous()):
        raise ValueError("only contiguous bytes of equal length are copied")
    dst.copy_(src, non_blocking=True)


def copy_all_async(dst: Tensors, src: Tensors) -> None:
    """Start copies as `copy_async` does, in one call: other threads of Python go on meanwhile.

    Args:
        dst: At least one; uint8 [n], contiguous.
        src: The same lengths, in the same order.
    """
    torch._foreach_copy_(dst, src, non_blocking=True)


def wait_for_stream(device: torch.device) -> None:
    """Return when everything on this thread's current stream of the device has been done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def host_available_bytes() -> int:
    """Return how many bytes of host memory can still be taken without swapping.

    This is what the kernel estimates, and no more than the control groups of this process
    (version 1 and 2: what limits a container) leave. File cache counts as available.
    """
    for line in (PROC / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
            break
    else:
        raise MmrlError(f"{PROC}/meminfo does not say how much memory is available")
    for folder, limit, usage, cache in _memory_groups():
        try:
            limit_bytes = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not there, or "max": no limit
            continue
        available = min(available, max(0, limit_bytes - used + int(stat.get(cache, 0))))
    return available


def _memory_groups() -> list[tuple[Path, str, str, str]]:
    """List the control groups that bound this process's memory.

    Returns:
        Folder, and the names of its limit, of its usage and of its reclaimable cache, for the
        group of this process and all above it.
    """
    groups = []
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts = [CGROUPS, CGROUPS / "unified"]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounts = [CGROUPS / "memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for mount in mounts:
            # In a container the path may be the host's, while the mount begins at its own group.
            own = mount / path.lstrip("/")
            above = [folder for folder in own.parents if folder.is_relative_to(mount)]
            groups += [(folder, *names) for folder in (own, *above)]
    return groups


def _anonymous(nbytes: int, flags: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
    except OSError as error:
        raise MmrlError(
            f"the machine does not give {size_text(nbytes)} of memory: "
            f"{os.strerror(error.errno or 0)}",
            "serve fewer or smaller models, or raise the limit on memory (ulimit -v)",
        ) from error


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def size_text(nbytes: float) -> str:
    """Return a size as a person reads it: GB, or MB below one GB."""
    return f"{nbytes / 1e9:.1f} GB" if abs(nbytes) >= 1e9 else f"{nbytes / 1e6:.1f} MB"
