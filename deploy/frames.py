"""The physical memory of a GPU, in frames that are mapped where they are needed.

`Driver` are the calls of the CUDA driver for virtual memory. `Frames` keeps what is given back for
the next taker, and leaves it mapped until somebody needs it: the driver would wipe what is released
to it, at a cost of 2 ms for each GB that slows copies down meanwhile, and unmapping takes time too.
Weights and KV are made of frames of the same size, so that what one gives back fits the other.
"""

import importlib
from collections.abc import Iterable
from typing import Any

import torch

from mmrl.errors import MmrlError


class DriverOutOfMemory(MmrlError):
    """The driver said CUDA_ERROR_OUT_OF_MEMORY."""


class Driver:
    """The calls of the CUDA driver for virtual memory, each with its result checked.

    Args:
        index: Of the device.
    """

    def __init__(self, index: int) -> None:
        try:
            self._api: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise MmrlError(
                "the Python bindings of the CUDA driver are missing", "pip install cuda-bindings"
            ) from error
        api = self._api
        with torch.cuda.device(index):
            torch.cuda.synchronize()  # makes torch's context, and makes it current here
            self._context = self._result(api.cuCtxGetCurrent())
        self._kind = api.CUmemAllocationProp()
        self._kind.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._kind.location.id = index
        self._access = api.CUmemAccessDesc()
        self._access.location = self._kind.location
        self._access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granule = int(self._result(api.cuMemGetAllocationGranularity(self._kind, minimum)))

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses and return the first."""
        return int(self._call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def free(self, address: int, nbytes: int) -> None:
        """Give reserved addresses back; nothing is mapped there."""
        self._call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int) -> Any:
        """Take memory and return its handle."""
        return self._call("cuMemCreate", nbytes, self._kind, 0)

    def release(self, handle: Any) -> None:
        """Give memory back that is mapped nowhere."""
        self._call("cuMemRelease", handle)

    def map(self, address: int, nbytes: int, handle: Any) -> None:
        """Put memory behind addresses; it may be used once they are opened."""
        self._call("cuMemMap", address, nbytes, 0, handle, 0)

    def open(self, address: int, nbytes: int) -> None:
        """Let the device read and write mapped addresses."""
        self._call("cuMemSetAccess", address, nbytes, [self._access], 1)

    def unmap(self, address: int, nbytes: int) -> None:
        """Take the memory behind addresses away, of one mapping or of several side by side."""
        self._call("cuMemUnmap", address, nbytes)

    def _call(self, name: str, *arguments: Any) -> Any:
        # A thread that has not used CUDA yet has no context.
        self._result(self._api.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")
        return self._result(getattr(self._api, name)(*arguments), name)

    def _result(self, answer: tuple[Any, ...], name: str = "the CUDA driver") -> Any:
        code, *values = answer
        if code == self._api.CUresult.CUDA_SUCCESS:
            return values[0] if values else None
        kind: type[MmrlError] = MmrlError
        if code == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            kind = DriverOutOfMemory
        raise kind(
            f"{name} failed: {code.name}", "restart the server; is the GPU sound (nvidia-smi)?"
        )


def frame_size(budget_bytes: int, granule: int) -> int:
    """Return the bytes of a frame: a power of two, 8 to 32 MiB, about a 512th of the budget.

    Each call of the driver takes .1 to .2 ms beside models that compute, so that frames of 8 MiB
    can just be mapped as fast as a link brings them; but KV blocks leave gaps in larger ones.
    """
    wanted = 1 << (max(budget_bytes, 1) // 512).bit_length() >> 1
    return max(granule, min(max(wanted, 8 << 20), 32 << 20))


class Frames:
    """The physical memory of a device, in frames that go from one place to the next.

    A part is backed by as few frames as its size allows: all of one size, and for the rest some of
    a quarter of it and of the granule. When a part is dropped its frames stay where they are, for
    it may come back first; they are unmapped when another needs them.

    Args:
        driver: Of the device.
        limit_bytes: Most bytes of frames.
        frame_bytes: Of a frame, from `frame_size`.

    Attributes:
        driver: As given.
        total_bytes: Of all frames, in use or not.
    """

    def __init__(self, driver: Driver, limit_bytes: int, frame_bytes: int) -> None:
        self.driver = driver
        self.total_bytes = 0
        self._limit_bytes = limit_bytes
        sizes = {frame_bytes, max(frame_bytes // 4, driver.granule), driver.granule}
        self._sizes = tuple(sorted(sizes, reverse=True))
        self._free: dict[int, list[Any]] = {size: [] for size in self._sizes}
        self._used: dict[int, list[tuple[int, Any]]] = {}  # address -> sizes and handles
        self._stale: dict[int, list[tuple[int, Any]]] = {}  # the same, in order of dropping
        # Addresses of the stale parts that have a frame of a size, in order of dropping.
        self._stale_with: dict[int, dict[int, None]] = {size: {} for size in self._sizes}

    def map(self, parts: Iterable[tuple[int, int]]) -> None:
        """Back parts with memory, all or none; what is, or whose frames are still there, stays.

        Args:
            parts: First address and bytes of each. Those side by side are opened together, which
                is what takes most of the time.
        """
        missing = [(at, nbytes) for at, nbytes in parts if at not in self._used]
        kept = [(at, nbytes) for at, nbytes in missing if self._bytes_stale(at) == nbytes]
        made: list[tuple[int, int]] = []
        for at, _ in kept:
            self._used[at] = self._pop_stale(at)
        try:
            for at, nbytes in missing:
                if at not in self._used:
                    self.unmap_within(at, nbytes)
                    made.append((at, nbytes))
                    self._back(at, nbytes)
            for at, nbytes in _side_by_side(made):
                self.driver.open(at, nbytes)
        except BaseException:
            for at, _ in made:
                self._unmap(at, self._used.pop(at))
            for at, _ in kept:
                self.drop(at)
            raise

    def _back(self, address: int, nbytes: int) -> None:
        """Map frames behind a part; what there is of them is noted even if one is missing."""
        frames = self._used[address] = []
        for size in self._cut(nbytes):
            handle = self._take(size)
            try:
                self.driver.map(address, size, handle)
            except BaseException:
                self._free[size].append(handle)
                raise
            frames.append((size, handle))
            address += size

    def _bytes_stale(self, address: int) -> int:
        return sum(size for size, _ in self._stale.get(address, ()))

    def drop(self, address: int) -> None:
        """Let the frames of a part go, if it has any."""
        frames = self._used.pop(address, None)
        if frames is not None:
            self._stale[address] = frames
            for size, _ in frames:
                self._stale_with[size][address] = None

    def _pop_stale(self, address: int) -> list[tuple[int, Any]]:
        frames = self._stale.pop(address)
        for size, _ in frames:
            self._stale_with[size].pop(address, None)
        return frames

    def unmap_within(self, address: int, nbytes: int) -> None:
        """Unmap what has been dropped within some addresses."""
        for start in [start for start in self._stale if address <= start < address + nbytes]:
            self._unmap(start, self._pop_stale(start))

    def _cut(self, nbytes: int) -> list[int]:
        sizes = []
        for size in self._sizes:
            count, nbytes = divmod(nbytes, size)
            sizes += [size] * count
        return sizes

    def _take(self, size: int) -> Any:
        """Return an unmapped frame of a size."""
        while not self._free[size]:
            if self.total_bytes + size > self._limit_bytes and self._find(size):
                continue
            try:
                handle = self.driver.create(size)
            except DriverOutOfMemory:  # others use the device too
                if not self._find(size):
                    raise
                continue
            self.total_bytes += size
            return handle
        return self._free[size].pop()

    def _find(self, size: int) -> bool:
        """Make one step towards a free frame of a size; return whether there was one to make."""
        at = next(iter(self._stale_with[size]), None)
        spare = next((other for other in self._sizes if self._free[other]), None)
        if at is None and spare is not None:
            self._release(spare)  # makes room for one of the other size
            return True
        if at is None:
            at = next(iter(self._stale), None)
        if at is None:
            return False
        self._unmap(at, self._pop_stale(at))
        return True

    def limit(self, nbytes: int) -> None:
        """Set the most bytes of frames, and give back those that are not in use."""
        self._limit_bytes = nbytes
        self.close()

    def close(self) -> None:
        """Give all frames back to the driver that are not in use."""
        for at in list(self._stale):
            self._unmap(at, self._pop_stale(at))
        for size in self._sizes:
            while self._free[size]:
                self._release(size)

    def _release(self, size: int) -> None:
        self.driver.release(self._free[size].pop())
        self.total_bytes -= size

    def _unmap(self, address: int, frames: list[tuple[int, Any]]) -> None:
        if frames:
            self.driver.unmap(address, sum(size for size, _ in frames))
        for size, handle in frames:
            self._free[size].append(handle)


def _side_by_side(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join parts, each an address and bytes, where one ends and another begins."""
    joined: list[tuple[int, int]] = []
    for at, nbytes in sorted(parts):
        if joined and sum(joined[-1]) == at:
            joined[-1] = joined[-1][0], joined[-1][1] + nbytes
        else:
            joined.append((at, nbytes))
    return joined
