"""`side_by_side`: pieces of work in processes that leave Ctrl-C to the one that started them."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

Piece = TypeVar("Piece")
Found = TypeVar("Found")

THREADS = "OMP_NUM_THREADS"


def side_by_side(
    work: Callable[[Piece], Found], pieces: Sequence[Piece], workers: int
) -> Iterator[tuple[int, Found]]:
    """Yield what the work returned for each piece, with its index, as soon as it is done.

    With one worker, or one piece, the work is done here, in order. Where something fails or
    interrupts, what has not begun is dropped and what runs is told to end (SIGTERM).
    """
    if workers == 1 or len(pieces) <= 1:
        for k, piece in enumerate(pieces):
            yield k, work(piece)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            with _starting_processes():
                futures: dict[Future[Found], int] = {
                    pool.submit(work, piece): k for k, piece in enumerate(pieces)
                }
            for future in as_completed(futures):
                # Taken out: what has been handed on need not be kept until the end.
                yield futures.pop(future), future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextmanager
def _starting_processes() -> Iterator[None]:
    """Start processes that ignore Ctrl-C and have one thread each: there is one for each core.

    They inherit both; NumPy reads the variable once, before any code of ours runs there.
    """
    handler, threads = signal.signal(signal.SIGINT, signal.SIG_IGN), os.environ.get(THREADS)
    os.environ[THREADS] = "1"
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if threads is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = threads
