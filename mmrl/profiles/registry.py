"""Platforms and profiles by name (those that mmrl ships) or by path (the user's own).

A platform is a folder with ``platform.json`` and one file for each measured model. A derived
platform needs no model files: its profiles are made by rule from the platform it names.
"""

from pathlib import Path

from mmrl.errors import InputError, unknown
from mmrl.profiles.derive import scale_profile
from mmrl.profiles.schema import Platform, Profile, load_platform, load_profile

DATA = Path(__file__).parent / "data"
PLATFORM_FILE = "platform.json"


def platforms() -> list[str]:
    """Return the names of the shipped platforms, the measured ones first."""
    names = [path.parent.name for path in DATA.glob(f"*/{PLATFORM_FILE}")]
    return sorted(names, key=lambda name: (get_platform(name).kind != "measured", name))


def get_platform(platform: str | Path) -> Platform:
    """Return a platform by its name or by the path of its folder.

    Raises:
        InputError: There is none, or its file is wrong.
    """
    return load_platform(_folder(platform) / PLATFORM_FILE)


def models(platform: str | Path) -> list[str]:
    """Return the models with a profile on this platform, the smallest first.

    Raises:
        InputError: The platform or one of its profiles is wrong.
    """
    folders = [_folder(platform)]
    if (source := get_platform(platform).derived_from) is not None:
        folders.append(_folder(source))
    sizes = {}
    for folder in folders:
        for path in _profile_files(folder):
            sizes[path.stem] = load_profile(path).parameters
    return sorted(sizes, key=lambda name: (sizes[name], name))


def get_profile(platform: str | Path, model: str | Path) -> Profile:
    """Return the profile of a model on a platform, measured where there is one, else derived.

    Args:
        platform: Name of a shipped platform, or path of a folder with ``platform.json``.
        model: Name of a model, or path of a profile file (``.json``) for this platform.

    Raises:
        InputError: There is no such platform or model, or a file is wrong.
    """
    target = get_platform(platform)
    if str(model).endswith(".json"):
        path = Path(model)
    else:
        path = _folder(platform) / f"{model}.json"
        if not path.exists() and target.derived_from is not None:
            source = get_platform(target.derived_from)
            if str(model) in models(platform):
                return scale_profile(get_profile(target.derived_from, model), source, target)
        if not path.exists() or path.name == PLATFORM_FILE:
            raise unknown(f"model on platform {target.name}:", str(model), models(platform))
    profile = load_profile(path)
    if profile.platform != target.name:
        raise InputError(
            f"{path}: platform: '{profile.platform}', wanted '{target.name}'",
            "name the platform that the profile was made for",
        )
    return profile


def _folder(platform: str | Path) -> Path:
    folder = DATA / platform  # an absolute path stands for itself
    if not (folder / PLATFORM_FILE).exists():
        folder = Path(platform)
    if not (folder / PLATFORM_FILE).exists():
        if folder.exists() and len(folder.parts) > 1:
            raise InputError(f"{folder}: no {PLATFORM_FILE} in it", "name a platform's folder")
        raise unknown("platform", str(platform), [p.parent.name for p in _platform_files()])
    return folder


def _platform_files() -> list[Path]:
    return sorted(DATA.glob(f"*/{PLATFORM_FILE}"))


def _profile_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.name != PLATFORM_FILE)
