"""Measuring what a server is about to serve, for models of which there is no measured profile.

In a process of its own: what CUDA takes of the device goes back with it before the server starts.
"""

import contextlib
import multiprocessing
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path

from mmrl.deploy.config import ServeConfig
from mmrl.deploy.hardware import find_device
from mmrl.deploy.known import find_profiles, unmeasured, user_profiles
from mmrl.deploy.profiler.run import Report, Request, profile_models
from mmrl.deploy.rig import open_checkpoints
from mmrl.errors import InputError, MmrlError
from mmrl.profiles.registry import PLATFORM_FILE

Reporter = Callable[[], AbstractContextManager[Report]]


def measure_first(config: ServeConfig, reporter: Reporter) -> None:
    """Measure the unmeasured models of a fleet, where the next start finds their profiles.

    Args:
        config: What will be served.
        reporter: Makes who is told how it goes, in the other process.

    Raises:
        InputError: See `profile_models`.
        MmrlError: A model could not be measured.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, config, reporter))
    process.start()
    theirs.close()
    answer = None
    with contextlib.suppress(EOFError):
        answer = ours.recv()
    process.join()
    if answer is None:
        raise MmrlError(f"measuring ended with code {process.exitcode}", "run it again")
    if answer:
        wrong_input, message, remedy = answer
        raise (InputError if wrong_input else MmrlError)(message, remedy)


def _measure(pipe: Connection, config: ServeConfig, reporter: Reporter) -> None:
    """Measure, and send what went wrong, or nothing."""
    try:
        with reporter() as report:
            measure_missing(config, report)
    except MmrlError as error:
        pipe.send((isinstance(error, InputError), error.message, error.remedy))
    else:
        pipe.send(())


def measure_missing(config: ServeConfig, report: Report) -> list[str]:
    """Measure the models of a fleet whose costs would be derived; return their names.

    Raises:
        InputError: See `profile_models`.
        MmrlError: One could not be measured.
    """
    device = find_device(config.node.device)
    found = find_profiles(config, open_checkpoints(config.models), device)
    missing = unmeasured(found)
    if not missing:
        return []
    folder = config.node.profiles or user_profiles()
    request = Request(
        [model for model in config.models if model.name in missing],
        device=config.node.device,
        memory=None if config.node.memory is None else int(config.node.memory),
        out=_place(folder) if config.node.profiles else None,
        command="mmrl serve --measure",
    )
    failed = [outcome for outcome in profile_models(request, report) if outcome.profile is None]
    if failed:
        raise MmrlError(
            "; ".join(outcome.error for outcome in failed), "start again, or without --measure"
        )
    return missing


def _place(folder: Path) -> Path:
    """Return the folder of the platform within a folder of profiles."""
    return folder if (folder / PLATFORM_FILE).exists() else folder / "here"
