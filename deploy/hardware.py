"""What this machine is and can do: its device, driver and link, and a rough platform.

`rough_platform` is what costs are derived from where nobody has measured this kind of GPU: memory
and link bandwidth and the rate of a matrix product, found in a second and called derived.
"""

import contextlib
import functools
import platform as host
import re
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import mmrl
from mmrl.deploy.memory import HostArena, copy_async, host_available_bytes, wait_for_stream
from mmrl.errors import InputError
from mmrl.profiles.schema import Limits, Platform, Provenance, Transfer

USABLE = 0.94  # of a GPU's free memory; the rest is for the driver and fragments
CPU_SHARE = 0.5  # of the available host memory plays the device on a machine without one
PROBE_BYTES = 256 << 20
PROBE_SIDE = 2048
FIXED_S = 1e-4  # of a transfer, where nothing was measured
IDLE_MIB = 1024  # of a GPU's memory that its driver may hold without anybody

# TB/s of memory and dense bf16 TFLOP/s, from data sheets (half of what holds "with sparsity").
DATA_SHEETS = {
    "NVIDIA H200": (4.8, 989.0),
    "NVIDIA H100 80GB HBM3": (3.35, 989.0),
    "NVIDIA H100 PCIe": (2.0, 756.0),
    "NVIDIA A100-SXM4-80GB": (2.039, 312.0),
    "NVIDIA A100-SXM4-40GB": (1.555, 312.0),
    "NVIDIA L40S": (0.864, 362.0),
    "NVIDIA L4": (0.3, 121.0),
    "NVIDIA RTX A6000": (0.768, 155.0),
    "NVIDIA GeForce RTX 4090": (1.008, 165.0),
}


def find_device(name: str, field: str = "node.device") -> torch.device:
    """Return the device that a configuration names.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        field: Where the name stands, for errors.

    Raises:
        InputError: It does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                f"{field}: '{name}', but torch {torch.__version__} sees no GPU",
                "install the GPU driver and a CUDA build of torch, or choose the device cpu",
            )
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise InputError(
                f"{field}: '{name}', but there are {torch.cuda.device_count()} GPUs",
                "the first is cuda:0",
            )
    return device


def used_bytes(device: torch.device) -> int:
    """Return how much memory of a GPU is in use, by anybody; torch's spare memory is not."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def usable_bytes(device: torch.device) -> int:
    """Return how much memory a node can have on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * USABLE)
    return int(host_available_bytes() * CPU_SHARE)


def device_name(device: torch.device) -> str:
    """Return what the device is called: the GPU, or the processor where there is none."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return host.processor() or host.machine()


def library_versions() -> dict[str, str]:
    """Return the versions of what costs depend on."""
    versions = {"mmrl": mmrl.__version__, "torch": torch.__version__}
    for name in ("transformers", "accelerate", "triton"):
        with contextlib.suppress(PackageNotFoundError):  # triton is there only with a GPU
            versions[name] = version(name)
    return versions


def driver_and_link(device: torch.device) -> tuple[str | None, str]:
    """Return the version of the GPU's driver and what links it to the host, as far as known."""
    if device.type != "cuda":
        return None, "host memory"
    fields = "driver_version,pcie.link.gen.max,pcie.link.width.max"
    lines = _smi(f"--query-gpu={fields}", f"--id={device.index or 0}")
    if lines and len(words := [word.strip() for word in lines[0].split(",")]) == 3:
        return words[0], f"PCIe {words[1]} x{words[2]}, page-locked host memory"
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None, "PCIe, page-locked host memory"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", first)
    return found and found[0], "PCIe, page-locked host memory"


def gpu_users(device: torch.device) -> list[str]:
    """Return what else computes on a GPU, a line each; to be called before this process does.

    From within a container the processes outside cannot be seen, only the memory that they hold.
    """
    if device.type != "cuda":
        return []
    fields, place = "pid,process_name,used_memory", f"--id={device.index or 0}"
    users = _smi(f"--query-compute-apps={fields}", place)
    if users:
        return users
    used = _smi("--query-gpu=memory.used", place)
    mib = used[0].partition(" ")[0] if used else ""
    if mib.isdigit() and int(mib) > IDLE_MIB:
        return [f"processes that cannot be seen from here, {mib} MiB"]
    return []


def data_sheet(device: torch.device) -> Limits | None:
    """Return what the data sheet of a GPU says it cannot exceed, or None for an unknown one."""
    if device.type != "cuda" or (known := DATA_SHEETS.get(device_name(device))) is None:
        return None
    return Limits(memory_bytes_per_s=known[0] * 1e12, compute_flop_per_s=known[1] * 1e12)


def _smi(*arguments: str) -> list[str]:
    """Return the lines that nvidia-smi answers; none where it is not there."""
    command = ["nvidia-smi", *arguments, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


@functools.cache
def rough_platform(device: torch.device) -> Platform:
    """Measure this machine roughly, in a second: memory, link, and the rate of a product."""
    name = device_name(device)
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
