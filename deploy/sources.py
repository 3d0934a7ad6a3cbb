"""Where the values of a checkpoint's tensors come from: safetensors files, or a generator.

Both give any run of a tensor's elements straight into memory that the caller holds, from several
threads at once, so that weights reach their place in host memory in one copy. Random weights are
windows of one block of random numbers: filling memory, or a file, costs a copy.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mmrl.errors import InputError, MmrlError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AGAIN = "copy or download the checkpoint again"
LARGEST_HEADER = 100_000_000  # the format's own limit, bytes

# Lengths of the block of random numbers. Primes: in a table whose rows are windows of the block,
# no two rows start at the same place, so that no two tokens have the same embedding.
BLOCKS = (65_521, 1_048_573, 16_777_213)


class Source(Protocol):
    """Values of named tensors."""

    def read(self, name: str, first: int, out: torch.Tensor) -> None:
        """Fill out, a flat tensor, with elements ``first .. first + len(out)`` of a tensor.

        Values are converted to the data type of out. May be called from several threads.

        Raises:
            MmrlError: They cannot be had, or out's type cannot hold them.
        """

    def close(self) -> None:
        """Give back what reading took; a later read takes it again."""


class Stored(NamedTuple):
    """A tensor in a file: ``offset`` is its first byte, from the start of the file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileSource:
    """Tensors of safetensors files, by the names that the caller knows them by."""

    tensors: Mapping[str, Stored]

    def read(self, name: str, first: int, out: torch.Tensor) -> None:
        """See `Source.read`."""
        stored = self.tensors[name]
        offset = stored.offset + first * stored.dtype.itemsize
        if stored.dtype == out.dtype:
            _read_bytes(stored.path, offset, out)
            return
        values = torch.empty(out.shape, dtype=stored.dtype)
        _read_bytes(stored.path, offset, values)
        out.copy_(values)
        if out.dtype == torch.float16 and not torch.isfinite(out).all():
            raise InputError(
                f"{stored.path}: tensor '{name}' has values that fp16 cannot hold", "use bf16"
            )

    def close(self) -> None:
        """Nothing stays open between reads."""


def _read_bytes(path: Path, offset: int, out: torch.Tensor) -> None:
    # NumPy does not know bfloat16; bytes are all that the file system needs.
    whole: npt.NDArray[np.uint8] = out.view(torch.uint8).numpy()
    rest = whole.data
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while rest:
                count = os.preadv(descriptor, [rest], offset)
                if count == 0:
                    raise MmrlError(f"{path}: shorter than when it was opened", AGAIN)
                rest, offset = rest[count:], offset + count
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise MmrlError(f"cannot read {path}: {reason}", AGAIN) from error


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Read the headers of a folder's weight files, and check that the files are whole.

    Returns:
        The floating-point tensors by their names in the files.

    Raises:
        InputError: There are no safetensors files, or one is missing, cut off or damaged.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return dict(_header(single))
    if index.is_file():
        return _sharded(folder, index)
    pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    if pickled:
        raise InputError(
            f"{folder}: its weights are pickled ({min(pickled)}), which are not read",
            "convert them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    raise InputError(f"{folder}: holds no {SINGLE_FILE} and no {INDEX_FILE}", AGAIN)


def _sharded(folder: Path, index: Path) -> dict[str, Stored]:
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of weights", AGAIN) from error
    found: dict[str, Stored] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise InputError(f"{index}: '{shard}' is not a file of this folder", AGAIN)
        if not (folder / shard).is_file():
            raise InputError(f"{folder}: {shard} is missing ({len(shards)} files in all)", AGAIN)
        found |= _header(folder / shard)
    return found


def _header(path: Path) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of a file: eight bytes of length, a JSON header, then the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise InputError(f"{path}: a git-lfs pointer, not the file itself", "run git lfs pull")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > LARGEST_HEADER:
            raise InputError(f"{path}: not a safetensors file", AGAIN)
        text = file.read(length)
    if len(text) < length:
        raise InputError(f"{path}: cut off within its header", AGAIN)
    try:
        header: dict[str, dict[str, Any]] = json.loads(text)
        header.pop("__metadata__", None)
        spans = {name: tuple(map(int, field["data_offsets"])) for name, field in header.items()}
        shapes = {name: tuple(map(int, field["shape"])) for name, field in header.items()}
        dtypes = {name: str(field["dtype"]) for name, field in header.items()}
        end = max((stop for _, stop in spans.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its header is damaged", AGAIN) from error
    data = 8 + length
    if size != data + end:
        what = "cut off" if size < data + end else "longer than its header says"
        raise InputError(f"{path}: {what} ({size:,} of {data + end:,} bytes)", AGAIN)
    for name, (first, stop) in spans.items():
        dtype = FLOATS.get(dtypes[name])
        if dtype is None:
            continue  # masks and the like; missing parameters are told by who needs them
        if first < 0 or stop - first != math.prod(shapes[name]) * dtype.itemsize:
            raise InputError(f"{path}: the place of tensor '{name}' is damaged", AGAIN)
        yield name, Stored(path, data + first, dtype, shapes[name])


class Spread(NamedTuple):
    """Mean and standard deviation of a tensor's random values."""

    mean: float
    std: float


class RandomSource:
    """Random tensors that depend on the seed and their names only.

    Args:
        seed: Every seed gives other values.
        spreads: How the values of each tensor are spread.
        largest: Elements of the largest tensor; sets the length of the block.
    """

    def __init__(self, seed: int, spreads: Mapping[str, Spread], largest: int) -> None:
        self._seed = seed
        self._spreads = spreads
        self._length = next((length for length in BLOCKS if length >= largest), BLOCKS[-1])
        self._blocks: dict[tuple[Spread, torch.dtype], torch.Tensor] = {}
        self._normal: torch.Tensor | None = None
        self._lock = threading.Lock()

    def read(self, name: str, first: int, out: torch.Tensor) -> None:
        """See `Source.read`."""
        block = self._block(self._spreads[name], out.dtype)
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        place = (int.from_bytes(digest, "little") + first) % self._length
        done = 0
        while done < len(out):
            count = min(len(out) - done, self._length - place)
            out[done : done + count].copy_(block[place : place + count])
            done, place = done + count, 0

    def close(self) -> None:
        """Drop the block of random numbers."""
        with self._lock:
            self._blocks.clear()
            self._normal = None

    def _block(self, spread: Spread, dtype: torch.dtype) -> torch.Tensor:
        with self._lock:
            if self._normal is None:
                generator = np.random.default_rng(self._seed)
                self._normal = torch.from_numpy(
                    generator.standard_normal(self._length, dtype=np.float32)
                )
            if (spread, dtype) not in self._blocks:
                values = self._normal * spread.std + spread.mean
                self._blocks[spread, dtype] = values.to(dtype)
            return self._blocks[spread, dtype]
