"""`profile_models`: measure models one after the other within a time, and write their profiles.

What is worth most is measured first and in any case; finer grids come while time is left. After
each section everything is on disk: the same command goes on where an interrupted one stopped, and
a section that fails takes no other with it.
"""

import functools
import gc
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mmrl.deploy.checkpoint import Checkpoint
from mmrl.deploy.config import ModelConfig
from mmrl.deploy.fleet import LEAST_TOKENS
from mmrl.deploy.hardware import (
    device_name,
    find_device,
    gpu_users,
    library_versions,
    usable_bytes,
)
from mmrl.deploy.known import user_profiles
from mmrl.deploy.memory import size_text
from mmrl.deploy.profiler import computing, machine, moving
from mmrl.deploy.profiler.fit import Machine, combine, make_profile
from mmrl.deploy.profiler.raw import Raw, Section
from mmrl.deploy.profiler.subject import NotResident, Subject
from mmrl.deploy.profiler.timing import Deadline
from mmrl.deploy.rig import open_checkpoints
from mmrl.errors import InputError, MmrlError
from mmrl.files import refuse_foreign
from mmrl.profiles.derive import estimate_workspace_bytes
from mmrl.profiles.registry import PLATFORM_FILE
from mmrl.profiles.schema import Profile, load_platform, load_profile, save

RAW = "raw"  # folder of all single measurements
BUDGET_S = 180.0  # for each model, unless told otherwise
HOST_KV_BYTES, CPU_HOST_KV_BYTES = 4 * 10**9, 64 * 2**20
MORE_S = 5.0  # that must be left for a finer grid to be begun

Job = Callable[[Subject, Section], None]
SECTIONS: dict[str, Job] = {
    "memory": computing.memory,
    "decode": computing.decode,
    "prefill": computing.prefill,
    "load": moving.load,
    "stream": moving.stream,
    "kv": moving.kv,
    "slowdown": moving.slowdown,
    "overhead": moving.overhead,
    "host": computing.host,
}
FINER: dict[str, Job] = {
    "other_prefill": computing.other_prefill,
    "more_decode": computing.more_decode,
}


class Report(Protocol):
    """Who is told how it goes."""

    def say(self, text: str) -> None:
        """Hear a line that stays."""

    def section(self, model: str, name: str, done: int, total: int) -> None:
        """Hear which section of a model begins."""

    def reading(self, model: str, done: int, total: int) -> None:
        """Hear how many bytes of a model's weights have been read."""


@dataclass(frozen=True)
class Outcome:
    """What came of one model.

    Attributes:
        model: Its name.
        raw: Its measurements.
        profile: Its profile, or None where a section that it needs has failed.
        error: Why there is none.
    """

    model: str
    raw: Raw
    profile: Profile | None
    error: str = ""


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        models: Folders of checkpoints, or names of the testbed's shapes, which need no files.
        out: Folder of the platform; one of the user's own unless given.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        budget_s: Time for all models; some minutes for each unless given.
        memory: Bytes of the device for everything; all that is usable unless given.
        platform: Name of the platform; the device's own unless given.
        strict: Refuse a GPU that others use.
        command: What the user called, for the provenance.
    """

    models: Sequence[ModelConfig]
    out: Path | None = None
    device: str = "auto"
    budget_s: float | None = None
    memory: int | None = None
    platform: str | None = None
    strict: bool = False
    command: str = "mmrl profile run"


def profile_models(request: Request, report: Report) -> list[Outcome]:
    """Measure models and write ``platform.json``, a profile each, and all raw measurements.

    Raises:
        InputError: There is no such device or model, one fits not even streamed, the GPU is in use
            and the request is strict, or the folder holds measurements of something else.
    """
    device = find_device(request.device, "--device")
    _check_unused(device, request.strict, report)
    name = request.platform or re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    out = request.out or user_profiles() / name
    _check_folder(out, name, device)
    checkpoints = open_checkpoints(request.models)
    for model, checkpoint in zip(request.models, checkpoints, strict=True):
        _check_fits(model.name, checkpoint, request, device)
    deadline = Deadline(request.budget_s or BUDGET_S * len(checkpoints))
    here = Machine(name, device, _measure_machine(out, device, request, report))
    outcomes = []
    for i, (model, checkpoint) in enumerate(zip(request.models, checkpoints, strict=True)):
        share = Deadline(max(0.0, deadline.left_s) / (len(checkpoints) - i))
        raw = _raw(out, model, checkpoint, request, device)
        _measure_model(raw, model, checkpoint, request, device, share, report)
        outcomes.append(_write(out, model.name, raw, checkpoint, here))
        if outcomes[-1].error:
            report.say(outcomes[-1].error)
    return outcomes


def _check_unused(device: torch.device, strict: bool, report: Report) -> None:
    """Warn of others on the GPU, or refuse.

    Raises:
        InputError: Somebody uses it, and that is not to be.
    """
    users = gpu_users(device)
    if users and strict:
        raise InputError(
            f"the GPU is in use: {'; '.join(users)}", "stop that, or leave out --strict"
        )
    for user in users:
        report.say(f"warning: the GPU is also used by {user}; times may be too long")


def _check_folder(out: Path, name: str, device: torch.device) -> None:
    """Refuse a folder that holds profiles of another machine, or something else.

    Raises:
        InputError: It does.
    """
    if not (out / PLATFORM_FILE).exists():
        refuse_foreign(out, (out / RAW).is_dir(), "profiles")  # a run that was interrupted has it
        return
    there, here = load_platform(out / PLATFORM_FILE), device_name(device)
    if there.provenance.gpu != here or there.name != name:
        raise InputError(
            f"{out} holds profiles of '{there.name}' on {there.provenance.gpu}, "
            f"this is '{name}' on {here}",
            "choose another --out, or the same --platform",
        )


def _check_fits(name: str, checkpoint: Checkpoint, request: Request, device: torch.device) -> None:
    """Refuse a model that can never run here, even with all its layers streamed.

    Raises:
        InputError: It needs more.
    """
    workspace = estimate_workspace_bytes(checkpoint.architecture())
    kv = min(LEAST_TOKENS, checkpoint.max_context) * checkpoint.kv_bytes_per_token
    needed = checkpoint.base_bytes + 2 * checkpoint.layer_bytes + workspace + kv
    budget = request.memory or usable_bytes(device)
    if needed > budget:
        raise InputError(
            f"{name} does not fit even streamed: it needs {size_text(needed)} of device memory, "
            f"there are {size_text(budget)}",
            "choose a smaller model" + (", or raise --memory" if request.memory else ""),
        )


def _measure_machine(out: Path, device: torch.device, request: Request, report: Report) -> Raw:
    """Measure what belongs to no model."""
    identity = {"gpu": device_name(device), "libraries": library_versions()}
    raw = Raw(out / RAW / "machine.json", "machine", identity, request.command)
    jobs: dict[str, Callable[[Section], None]] = {
        "memory": functools.partial(machine.memory, device),
        "link": functools.partial(machine.link, device),
        "rates": functools.partial(machine.rates, device),
        "disk": functools.partial(machine.disk, out, small=device.type == "cpu"),
    }
    for i, (name, job) in enumerate(jobs.items()):
        if not raw.has(name):
            report.section("machine", name, i, len(jobs))
            with _kept(raw, name, report, "machine") as section:
                job(section)
            _free(device)
    if missing := raw.errors().keys() & {"memory", "link", "rates"}:
        why = "; ".join(f"{name}: {raw.errors()[name]}" for name in missing)
        raise MmrlError(f"the machine could not be measured: {why}", "run the same command again")
    return raw


def _raw(
    out: Path, model: ModelConfig, checkpoint: Checkpoint, request: Request, device: torch.device
) -> Raw:
    """Open the measurements of a model, which may have been begun."""
    identity: dict[str, Any] = {
        "gpu": device_name(device),
        "libraries": library_versions(),
        "architecture": checkpoint.architecture().model_dump(),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "weights": "random" if checkpoint.path is None else checkpoint.path.name,
        "memory_bytes": request.memory,
    }
    return Raw(out / RAW / f"{model.name}.json", model.name, identity, request.command)


def _measure_model(
    raw: Raw,
    model: ModelConfig,
    checkpoint: Checkpoint,
    request: Request,
    device: torch.device,
    deadline: Deadline,
    report: Report,
) -> None:
    """Measure the sections of a model that are still to do."""
    jobs = dict(SECTIONS)
    if checkpoint.path is not None and any(checkpoint.path.glob("*.safetensors")):
        jobs["disk"] = lambda subject, section: machine.checkpoint_on_disk(checkpoint, section)
    jobs |= FINER
    subject = Subject(
        model.path,
        checkpoint,
        request.device,
        request.memory,
        HOST_KV_BYTES if device.type == "cuda" else CPU_HOST_KV_BYTES,
        deadline,
        lambda _, done, total: report.reading(model.name, done, total),
    )
    to_do = [name for name in jobs if not raw.has(name)]
    try:
        for i, name in enumerate(to_do):
            if name in FINER and deadline.left_s < MORE_S:
                continue
            report.section(model.name, name, i, len(to_do))
            with _kept(raw, name, report, model.name) as section:
                _open(subject, section, model.name, report)
                jobs[name](subject, section)
            if name in raw.errors():
                subject.close()  # the next section opens it anew
    finally:
        subject.close()


def _open(subject: Subject, section: Section, model: str, report: Report) -> None:
    """Open the model if it is not, with a note of the time that took."""
    if subject.opened:
        return
    begun = time.monotonic()
    opened_s = subject.rig.opened_s
    section.values["opened_s"] = opened_s
    report.say(f"{model}: opened in {time.monotonic() - begun:.1f} s")


@contextmanager
def _kept(raw: Raw, name: str, report: Report, model: str) -> Iterator[Section]:
    """Keep what a section measures, and its error in place of passing it on."""
    section, error = Section(), None
    begun = time.monotonic()
    try:
        yield section
    except NotResident as reason:
        section.skipped.append(f"all: {reason}")
    except MmrlError as failure:
        error = str(failure)
    except Exception as failure:  # whatever a section runs into, the others go on
        error = f"{type(failure).__name__}: {failure}"
        section.values["traceback"] = traceback.format_exc()
    took_s = time.monotonic() - begun
    raw.keep(name, section, took_s, error)
    report.say(f"{model}: {name} {took_s:.1f} s" + ("" if error is None else f", FAILED: {error}"))


def _write(out: Path, name: str, raw: Raw, checkpoint: Checkpoint, here: Machine) -> Outcome:
    """Write a model's profile, and the platform of all profiles in the folder."""
    try:
        profile = make_profile(raw, checkpoint, here)
    except (MmrlError, ValueError) as error:
        return Outcome(name, raw, None, f"{name}: {error}")
    save(out / f"{name}.json", profile)
    profiles = [load_profile(path) for path in out.glob("*.json") if path.name != PLATFORM_FILE]
    same = [one for one in profiles if one.platform == here.name and one.kind == "measured"]
    save(out / PLATFORM_FILE, combine(here, same))
    return Outcome(name, raw, profile)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
