"""`Worker`: a thread that does one slow thing after the other and reports the end of each.

A job is a function that returns when its work is done on the device, or when it is launched, with a
function that waits for its end (`Launched`): the next job is begun meanwhile, so that the device
does not wait for Python. The engine's loop sees only beginnings and ends. On CUDA each worker has a
stream of its own for its whole life.

The loop sees a worker as a `Lane`: the task that the state knows to be under way, and what has been
queued behind it before the state asks for it. The worker then goes on without waiting for the loop;
where the state decides otherwise after all, a task that came ahead is dropped.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from mmrl.deploy.memory import wait_for_stream

WAITING_S = 0.25  # between two signs of life of a loop that waits


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a job.

    Attributes:
        worker: Name of the worker.
        result: What the job returned; None where it raised.
        error: What it raised, or None.
        begun_ns: When it began, on the clock of ``time.monotonic_ns``; not before the end
            of the job before.
        ended_ns: When it ended.
        tag: What the job was submitted with.
    """

    worker: str
    result: Any
    error: BaseException | None
    begun_ns: int
    ended_ns: int
    tag: Any = None


@dataclass(eq=False)
class Task:
    """Something that a worker does.

    Attributes:
        done: Its end, once the loop has heard of it.
    """

    done: Done | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Launched:
    """What a job returns whose work the device has still to do.

    Attributes:
        wait: Waits for it and returns the result of the job; called on another thread.
    """

    wait: Callable[[], Any]


T = TypeVar("T", bound=Task)


class Inbox:
    """Where other threads leave messages for the loop.

    Attributes:
        calls: Functions that the loop is to call, in order.
        waiting: Called some times a second while the loop waits for a condition.
    """

    def __init__(self) -> None:
        self.waiting: Callable[[], None] = lambda: None
        self.calls: deque[Callable[[], None]] = deque()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, message: "Done | Callable[[], None] | None") -> None:
        """Leave a message, from any thread: an end, a function to call, or None to wake up."""
        self._queue.put(message)

    def receive(self, timeout_s: float) -> None:
        """Wait for a message at most so long, and take in all that are there."""
        try:
            message = (
                self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get(False)
            )
            while True:
                if isinstance(message, Done):
                    if isinstance(message.tag, Task):
                        message.tag.done = message
                elif message is not None:
                    self.calls.append(message)
                message = self._queue.get(False)
        except queue.Empty:
            return

    def wait(self, condition: Callable[[], bool]) -> None:
        """Take messages in until a condition holds."""
        while not condition():
            self.receive(WAITING_S)
            self.waiting()


class Worker:
    """A thread that begins jobs in the order in which they come, and one that waits for their ends.

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
        inbox: Inbox,
        high_priority: bool = False,
    ) -> None:
        self.name = name
        self._device, self._inbox, self._high_priority = device, inbox, high_priority
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Any] | None] = queue.SimpleQueue()
        self._ended_ns = 0  # of the last job
        self._launched: queue.SimpleQueue[tuple[Launched, int, Any] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=run, name=name + suffix, daemon=True)
            for run, suffix in ((self._begin, ""), (self._end, "-ends"))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], Any], tag: Any = None) -> None:
        """Have a job done; its `Done` carries the tag."""
        self._jobs.put((job, tag))

    def close(self) -> None:
        """Let the threads end after their job and wait for them, at most some seconds."""
        self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=10)

    def _begin(self) -> None:
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
                    self._wait_for_device()
                if isinstance(result, Launched):
                    self._launched.put((result, begun, tag))
                else:
                    self._report(result, error, begun, tag)
                del job, order, result, error, tag
        self._launched.put(None)

    def _wait_for_device(self) -> None:
        """Wait for what a job that raised had launched: its memory is given back after its end."""
        with contextlib.suppress(RuntimeError):  # a broken device: the job's own error says so
            wait_for_stream(self._device)

    def _end(self) -> None:
        while (one := self._launched.get()) is not None:
            launched, begun, tag = one
            result, error = None, None
            try:
                result = launched.wait()
            except Exception as caught:
                error = caught
            self._report(result, error, begun, tag)
            del one, launched, result, error, tag

    def _report(self, result: Any, error: BaseException | None, begun: int, tag: Any) -> None:
        """Tell the loop of an end."""
        begun, ended = max(begun, self._ended_ns), time.monotonic_ns()
        self._ended_ns = ended
        self._inbox.put(Done(self.name, result, error, begun, ended, tag))


class Lane(Generic[T]):
    """A worker as the loop sees it.

    Attributes:
        worker: Does the tasks in the order in which they come.
        current: What the state knows to be under way.
        ahead: What was queued before the state asks for it, in order; at most the last of them has
            not ended.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.current: T | None = None
        self.ahead: list[T] = []

    @property
    def ended(self) -> bool:
        """Whether what the state knows of has ended."""
        return self.current is not None and self.current.done is not None

    @property
    def unfinished(self) -> T | None:
        """The task queued ahead that has not ended, wanted or not."""
        return self.ahead[-1] if self.ahead and self.ahead[-1].done is None else None

    def start(self, job: Callable[[], Any], task: T) -> None:
        """Start what the state asks for."""
        self.current = task
        self.worker.submit(job, task)

    def queue(self, job: Callable[[], Any], task: T) -> None:
        """Queue what the state will ask for; nothing queued ahead may be unfinished."""
        assert self.unfinished is None
        self.ahead.append(task)
        self.worker.submit(job, task)

    def adopt(self, task: T) -> None:
        """Take a task that was queued ahead for what the state asks for."""
        self.ahead.remove(task)
        self.current = task

    def drop(self, unwanted: Callable[[T], bool]) -> None:
        """Forget tasks queued ahead that have ended and are not wanted any more."""
        self.ahead = [task for task in self.ahead if task.done is None or not unwanted(task)]

    def finish(self) -> tuple[T, Done]:
        """Return what has ended, and its end; nothing is under way then."""
        task, self.current = self.current, None
        assert task is not None and task.done is not None
        return task, task.done
