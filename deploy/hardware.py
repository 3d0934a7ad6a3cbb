"""What this machine can do, found in a second: a `Platform` to derive costs from.

A machine whose GPU mmrl ships measurements of is that platform. Any other is measured roughly
(memory and link bandwidth, rate of a matrix product) and called derived.
"""

import functools
import platform as host
import time
from collections.abc import Callable

import torch

from mmrl.deploy.memory import HostArena, copy_async, host_available_bytes, wait_for_stream
from mmrl.errors import InputError
from mmrl.profiles.registry import get_platform, platforms
from mmrl.profiles.schema import Limits, Platform, Provenance, Transfer

USABLE = 0.94  # of a GPU's free memory; the rest is for the driver and fragments
CPU_SHARE = 0.5  # of the available host memory plays the device on a machine without one
PROBE_BYTES = 256 << 20
PROBE_SIDE = 2048
FIXED_S = 1e-4  # of a transfer, where nothing was measured


def find_device(name: str) -> torch.device:
    """Return the device that a configuration names.

    Raises:
        InputError: It does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                f"node.device: '{name}', but torch {torch.__version__} sees no GPU",
                'install the GPU driver and a CUDA build of torch, or set device = "cpu"',
            )
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise InputError(
                f"node.device: '{name}', but there are {torch.cuda.device_count()} GPUs",
                "the first is cuda:0",
            )
    return device


def usable_bytes(device: torch.device) -> int:
    """Return how much memory a node can have on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * USABLE)
    return int(host_available_bytes() * CPU_SHARE)


def device_name(device: torch.device) -> str:
    """Return what the device is called."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return host.processor() or host.machine()


@functools.cache
def platform_here(device: torch.device) -> Platform:
    """Return the platform that costs are derived from: a shipped one, or a rough measurement."""
    name = device_name(device)
    for shipped in platforms():
        record = get_platform(shipped)
        if record.kind == "measured" and record.provenance.gpu == name:
            return record
    return _measure(device, name)


def _measure(device: torch.device, name: str) -> Platform:
    memory = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device).fill_(1)
    copy = torch.empty_like(memory)
    copy_s = _fastest(lambda: copy.copy_(memory), device)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(PROBE_SIDE, PROBE_SIDE, dtype=half, device=device)
    product_s = _fastest(lambda: a @ a, device)
    arena = HostArena(PROBE_BYTES, page_locked=device.type == "cuda")
    arena.tensor.fill_(1)
    link = PROBE_BYTES / _fastest(lambda: copy_async(copy, arena.tensor), device)
    back = PROBE_BYTES / _fastest(lambda: copy_async(arena.tensor, copy), device)
    arena.close()
    usable = usable_bytes(device)
    down, up = (Transfer(fixed_s=FIXED_S, bytes_per_s=rate) for rate in (link, back))
    return Platform(
        name="here",
        description=f"{name}, measured roughly at start",
        kind="derived",
        derived_from="a measurement of one second",
        memory_bytes=usable,
        usable_bytes=usable,
        host_kv_bytes=max(1, host_available_bytes() // 4),
        budgets_gb=(usable / 1e9,),
        link_bytes_per_s=link,
        limits=Limits(
            memory_bytes_per_s=2 * PROBE_BYTES / copy_s,  # read and written
            compute_flop_per_s=2 * PROBE_SIDE**3 / product_s,
        ),
        load=down,
        stream=down,
        kv_save=up,
        kv_restore=down,
        provenance=Provenance(
            source="a measurement of one second at start",
            command="mmrl serve",
            gpu=name,
            link="measured",
            libraries={"torch": torch.__version__},
        ),
    )


def _fastest(job: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of some runs."""
    job()
    wait_for_stream(device)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        job()
        wait_for_stream(device)
        times.append(time.perf_counter() - begun)
    return min(times)
