"""What is measured once for a machine: its link, memory and arithmetic, and reading from disk."""

import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mmrl.deploy.checkpoint import CHUNK_BYTES, READERS, Checkpoint
from mmrl.deploy.hardware import usable_bytes
from mmrl.deploy.memory import HostArena, copy_async, host_available_bytes, wait_for_stream
from mmrl.deploy.profiler.raw import Section
from mmrl.deploy.profiler.timing import Patience
from mmrl.deploy.sources import FileSource, Stored
from mmrl.deploy.weights import host_buffers, host_bytes
from mmrl.deploy.workers import Inbox, Task, Worker

CUDA_BYTES, CPU_BYTES = 1 << 30, 64 << 20  # of one copy
CUDA_SIDE, CPU_SIDE = 8192, 256  # of a matrix product
BOTH_COPIES = 8  # each way at the same time
DISK_BYTES, SMALL_DISK_BYTES = 1 << 30, 64 << 20
PATIENCE = Patience(5, 12, 1.0)


def memory(device: torch.device, section: Section) -> None:
    """Note the memory of the device and the host; the first use of the device makes its context."""
    if device.type == "cuda":
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info(device)
        section.values |= {"memory_bytes": total, "free_bytes": free}
    section.values["usable_bytes"] = usable_bytes(device)
    section.values["host_available_bytes"] = host_available_bytes()


def link(device: torch.device, section: Section) -> None:
    """Measure large copies: each way, both at once, and from and to pageable memory."""
    size = CUDA_BYTES if device.type == "cuda" else CPU_BYTES
    there, back = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    arenas = [HostArena(size, page_locked=device.type == "cuda") for _ in range(2)]
    here, home = (arena.tensor for arena in arenas)
    here.fill_(1)
    pageable = torch.ones(size, dtype=torch.uint8)
    copies = {
        "h2d": (there, here),
        "d2h": (home, back),
        "pageable_h2d": (there, pageable),
        "pageable_d2h": (pageable, back),
    }
    try:
        for kind, (to, of) in copies.items():
            job = functools.partial(_copy, to, of, device)
            section.measure(job, PATIENCE, kind=kind, bytes=size)
        _both(device, section, copies["h2d"], copies["d2h"], size)
    finally:
        del here, home, copies
        for arena in arenas:
            arena.close()


def _copy(to: torch.Tensor, of: torch.Tensor, device: torch.device) -> float:
    begun = time.perf_counter()
    copy_async(to, of)
    wait_for_stream(device)
    return time.perf_counter() - begun


def _both(
    device: torch.device,
    section: Section,
    down: tuple[torch.Tensor, torch.Tensor],
    up: tuple[torch.Tensor, torch.Tensor],
    size: int,
) -> None:
    """Copy both ways at once, on two workers as the engine does."""
    inbox = Inbox()
    workers = {way: Worker(way, device, inbox) for way in ("h2d", "d2h")}
    copies = {"h2d": down, "d2h": up}
    tasks = [(way, Task()) for _ in range(BOTH_COPIES) for way in workers]
    for way, task in tasks:
        workers[way].submit(functools.partial(_copy, *copies[way], device), task)
    inbox.wait(lambda: all(task.done is not None for _, task in tasks))
    for way, worker in workers.items():
        worker.close()
        ends = [task.done for name, task in tasks if name == way and task.done is not None]
        for end in ends:
            if end.error is not None:
                raise end.error
        times = [end.result for end in ends]
        section.add(times[1:-1], kind=f"both_{way}", bytes=size)  # while both surely ran


def rates(device: torch.device, section: Section) -> None:
    """Measure the bandwidth of a copy on the device and the rate of a matrix product."""
    size = 4 * CUDA_BYTES if device.type == "cuda" else CPU_BYTES
    one = torch.ones(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    copy = functools.partial(_copy, other, one, device)
    section.measure(copy, PATIENCE, kind="memory", bytes=2 * size)
    del one, other, copy
    if device.type == "cuda":  # or a library's workspace would hold all of it
        torch.cuda.empty_cache()
    side = CUDA_SIDE if device.type == "cuda" else CPU_SIDE
    a = torch.randn(side, side, device=device).to(torch.bfloat16)

    def product() -> float:
        begun = time.perf_counter()
        torch.matmul(a, a)
        wait_for_stream(device)
        return time.perf_counter() - begun

    section.measure(product, PATIENCE, kind="product", flop=2 * side**3)


def disk(folder: Path, section: Section, small: bool) -> None:
    """Measure reading a file that is not in the page cache, as checkpoints are read."""
    size = SMALL_DISK_BYTES if small else DISK_BYTES
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".disk-{os.getpid()}.tmp"
    block = os.urandom(CHUNK_BYTES)
    try:
        with path.open("wb") as file:
            for _ in range(size // CHUNK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        section.measure(lambda: _read_cold(path, size), Patience(3, 5, 3.0), warm=0, bytes=size)
    finally:
        path.unlink(missing_ok=True)


def _read_cold(path: Path, size: int) -> float:
    """Read a file of bf16 values as the weights of a checkpoint are read."""
    drop_from_cache(path)
    values = torch.empty(size // 2, dtype=torch.bfloat16)
    source = FileSource({"file": Stored(path, 0, values.dtype, tuple(values.shape))})
    step = CHUNK_BYTES // 2

    def read(first: int) -> None:
        source.read("file", first, values[first : first + step])

    begun = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(0, len(values), step)))
    return time.perf_counter() - begun


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget what it holds of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def checkpoint_on_disk(checkpoint: Checkpoint, section: Section) -> None:
    """Measure reading a checkpoint whose files are not in the page cache, converted as needed."""
    folder, needed = checkpoint.path, host_bytes(checkpoint.pieces)
    assert folder is not None
    if needed > host_available_bytes():
        section.skip({"bytes": needed}, "no host memory to read it into a second time")
        return
    arena = HostArena(needed, page_locked=False)
    buffers = host_buffers(arena, checkpoint.pieces)

    def read() -> float:
        for path in folder.glob("*.safetensors"):
            drop_from_cache(path)
        begun = time.perf_counter()
        checkpoint.read_into(buffers)
        return time.perf_counter() - begun

    try:
        section.measure(read, Patience(1, 3, 10.0), warm=0, bytes=checkpoint.tensor_bytes)
    finally:
        buffers.clear()
        arena.close()
