"""Which costs a model is served with: measured ones where there are any for this GPU, else derived.

In this order: the profile that the configuration names; a measured profile of the same
architecture on a platform with the same GPU, in the folder of the user's own profiles or among
those that mmrl ships; costs derived from the model's shape. What a user should know about the
choice is told in notes.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmrl.deploy.checkpoint import Checkpoint
from mmrl.deploy.config import ModelConfig, ServeConfig
from mmrl.deploy.hardware import device_name, library_versions, rough_platform
from mmrl.errors import InputError
from mmrl.profiles.derive import derive_profile
from mmrl.profiles.registry import DATA, PLATFORM_FILE
from mmrl.profiles.schema import Architecture, Platform, Profile, load_platform, load_profile

MEASURE = "mmrl serve --measure, or mmrl profile run, measures it here"


@dataclass(frozen=True)
class Found:
    """The costs of a model.

    Attributes:
        model: Its name.
        profile: The costs.
        changed: Versions of libraries that are others now than when it was measured.
    """

    model: str
    profile: Profile
    changed: tuple[str, ...] = ()


def user_profiles() -> Path:
    """Return the folder of the user's own profiles: one folder in it for each platform."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "mmrl" / "profiles"


def model_dtype(model: ModelConfig) -> torch.dtype | None:
    """Return the data type that a configuration asks for, or None for the checkpoint's own."""
    return None if model.dtype is None else getattr(torch, model.dtype)


def find_profiles(
    config: ServeConfig,
    opened: Sequence[Checkpoint],
    device: torch.device,
    real_time: bool = True,
) -> list[Found]:
    """Find the costs of each model of a fleet.

    Args:
        config: The fleet.
        opened: Its checkpoints.
        device: Where it will run.
        real_time: Whether it will run in real time; under a simulated clock a profile of any
            GPU may be named.

    Raises:
        InputError: A profile that the configuration names is of another GPU or architecture.
    """
    return [
        _named(m, model, checkpoint.architecture(), device, real_time)
        or _measured(model.name, checkpoint.architecture(), device, config.node.profiles)
        or _derived(model.name, checkpoint.architecture(), device, config.node.profiles)
        for m, (model, checkpoint) in enumerate(zip(config.models, opened, strict=True))
    ]


def notes_on(found: Sequence[Found]) -> tuple[str, ...]:
    """Tell what a user should know about the costs of a fleet."""
    notes = []
    derived = [one.model for one in found if one.profile.kind == "derived"]
    if derived:
        notes.append(
            f"costs of {', '.join(derived)} are derived from their shapes, not measured: "
            f"decisions may be worse than they could be ({MEASURE})"
        )
    for changed in dict.fromkeys(one.changed for one in found if one.changed):
        names = [one.model for one in found if one.changed == changed]
        notes.append(
            f"costs of {', '.join(names)} were measured with other versions ({', '.join(changed)}):"
            " measure again if decisions look wrong"
        )
    return tuple(notes)


def unmeasured(found: Sequence[Found]) -> list[str]:
    """Return the names of models whose costs are derived."""
    return [one.model for one in found if one.profile.kind == "derived"]


def platform_here(device: torch.device, own: Path | None = None) -> Platform:
    """Return the platform that costs are derived from: a measured one, or a rough measurement."""
    for folder in _platforms(device, own):
        return load_platform(folder / PLATFORM_FILE)
    return rough_platform(device)


def _named(
    m: int, model: ModelConfig, shape: Architecture, device: torch.device, real_time: bool
) -> Found | None:
    """Return the profile that the configuration names, if it names one."""
    if model.profile is None:
        return None
    profile, here = load_profile(model.profile), device_name(device)
    where, gpu = f"models.{m}.profile: {model.profile}", profile.provenance.gpu
    remedy = "leave the field out, or measure it here: mmrl profile run"
    if real_time and profile.kind == "measured" and gpu != here:
        raise InputError(f"{where} was measured on {gpu}, this is {here}", remedy)
    kept = "layers", "kv_heads", "head_dim", "bytes_per_value"
    if any(getattr(profile.architecture, field) != getattr(shape, field) for field in kept):
        raise InputError(f"{where} is of another architecture than {model.name}", remedy)
    return Found(model.name, profile, _changed(profile))


def _measured(
    name: str, shape: Architecture, device: torch.device, own: Path | None
) -> Found | None:
    """Return a measured profile of the same architecture and GPU, the model's own name first."""
    for folder in _platforms(device, own):
        files = [path for path in folder.glob("*.json") if path.name != PLATFORM_FILE]
        for path in sorted(files, key=lambda path: (path.stem != name, path.name)):
            profile = load_profile(path)
            if profile.kind == "measured" and profile.architecture == shape:
                return Found(name, profile, _changed(profile))
    return None


def _derived(name: str, shape: Architecture, device: torch.device, own: Path | None) -> Found:
    return Found(name, derive_profile(name, shape, platform_here(device, own)))


def _platforms(device: torch.device, own: Path | None) -> Iterator[Path]:
    """Yield the folders of measured platforms with this GPU: the user's own, then the shipped."""
    here = device_name(device)
    folder = own or user_profiles()
    for path in [
        *folder.glob(PLATFORM_FILE),  # one platform, written there with --out
        *sorted(folder.glob(f"*/{PLATFORM_FILE}")),
        *sorted(DATA.glob(f"*/{PLATFORM_FILE}")),
    ]:
        platform = load_platform(path)
        if platform.kind == "measured" and platform.provenance.gpu == here:
            yield path.parent


def _changed(profile: Profile) -> tuple[str, ...]:
    """Return which libraries have other versions now, as ``torch 2.11, now 2.13``."""
    now = library_versions()
    return tuple(
        f"{name} {version}, now {now.get(name, 'none')}"
        for name, version in profile.provenance.libraries.items()
        if profile.kind == "measured" and now.get(name) != version
    )
