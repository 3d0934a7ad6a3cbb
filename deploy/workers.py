"""`Worker`: a thread that does one slow thing at a time and reports its end.

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
    """

    worker: str
    result: Any
    error: BaseException | None
    begun_ns: int
    ended_ns: int


class Worker:
    """One thread, one job at a time.

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
        self.busy = False
        self._device, self._inbox, self._high_priority = device, inbox, high_priority
        self._jobs: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Any]) -> None:
        """Start a job; the worker must not be busy. The loop clears ``busy`` on `Done`."""
        assert not self.busy, f"{self.name} is busy"
        self.busy = True
        self._jobs.put(job)

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
            while (job := self._jobs.get()) is not None:
                begun, result, error = time.monotonic_ns(), None, None
                try:
                    result = job()
                except Exception as caught:  # the loop decides what it means
                    error = caught
                self._inbox.put(Done(self.name, result, error, begun, time.monotonic_ns()))
