"""`Watchdog`: says where the threads of a process are while its node stands still.

A node that waits for a lock, for the driver of a GPU or for another thread looks from outside like
one with nothing to do. Who runs it finds in the log how long it stood still, and where.
"""

import logging
import sys
import threading
import time
import traceback
from itertools import islice

DEPTH = 12  # frames of a thread that are told, the innermost

log = logging.getLogger("mmrl.engine")


class Watchdog:
    """Logs an error when `see` has seen nothing new for long, and how long it was in the end.

    Args:
        after_s: How long, in seconds.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._progress: object = None
        self._last_s = time.monotonic()
        self._told_s: float | None = None  # since when it stood still, as far as that was told
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def see(self, progress: object, busy: bool) -> None:
        """Look how far the node has got; to be called some times a second.

        Args:
            progress: Another one whenever it has got on.
            busy: Whether it has something to do.
        """
        if busy and progress == self._progress:
            return
        self._progress = progress
        before, self._last_s = self._last_s, time.monotonic()
        if self._told_s == before:
            log.error("the node goes on, after %.1f s", self._last_s - before)

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._after_s / 4):
            last_s = self._last_s
            late_s = time.monotonic() - last_s
            if late_s < self._after_s or self._told_s == last_s:
                continue
            self._told_s = last_s
            fields = {"threads": where()}
            log.error("the node has stood still for %.1f s", late_s, extra={"fields": fields})


def where() -> dict[str, list[str]]:
    """Return where every other thread of Python is, by its name, the innermost call first."""
    frames = sys._current_frames()
    return {
        thread.name: [
            f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}"
            for frame, line in islice(traceback.walk_stack(frames[thread.ident]), DEPTH)
        ]
        for thread in threading.enumerate()
        if thread.ident in frames and thread is not threading.current_thread()
    }
