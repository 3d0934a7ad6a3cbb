"""`Worker`: a thread that does one slow thing after the other and reports the end of each.

A job is a plain function that returns when its work is done on the device, so that the engine's
loop sees only beginnings and ends. On CUDA each worker has a stream of its own for its whole life.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a job.

    Attributes:
        worker: Name of the worker.
        result: What the job returned; None where it raised.
        error: What it raised, or None.
        begun_ns: When it began, on the clock of ``time.monotonic_ns``.
        ended_ns: When it ended.
        tag: What the job was submitted with.
    """

    worker: str
    result: Any
    error: BaseException | None
    begun_ns: int
    ended_ns: int
    tag: Any = None


class Worker:
    """One thread; jobs are done in the order in which they come.

    Args:
        name: Of the worker; its `Done` messages carry it.
        device: On CUDA, the thread gets a stream on it.
        inbox: Receives a `Done` for each job.
        high_priority: Whether its stream goes before others.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        inbox: "queue.SimpleQueue[Any]",
        high_priority: bool = False,
    ) -> None:
        self.name = name
        self._device, self._inbox, self._high_priority = device, inbox, high_priority
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Any], tag: Any = None) -> None:
        """Have a job done; its `Done` carries the tag."""
        self._jobs.put((job, tag))

    def close(self) -> None:
        """Let the thread end after its job and wait for it, at most some seconds."""
        self._jobs.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            priority = -1 if self._high_priority else 0
            torch.cuda.set_stream(torch.cuda.Stream(self._device, priority))  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            while (order := self._jobs.get()) is not None:
                job, tag = order
                begun, result, error = time.monotonic_ns(), None, None
                try:
                    result = job()
                except Exception as caught:  # the loop decides what it means
                    error = caught
                ended = time.monotonic_ns()
                self._inbox.put(Done(self.name, result, error, begun, ended, tag))
                del job, order, result, error
