"""`side_by_side`: pieces of work in processes that leave Ctrl-C to the one that started them."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from mmrl.agents.play import interrupts_ignored, prepare_process

Piece = TypeVar("Piece")
Found = TypeVar("Found")


def side_by_side(
    work: Callable[[Piece], Found], pieces: Sequence[Piece], workers: int
) -> Iterator[tuple[Piece, Found]]:
    """Yield each piece with what its work returned, as soon as it is done.

    With one worker the work is done here, in order. Where something fails or interrupts, what has
    not begun is dropped and what runs is told to end (SIGTERM).
    """
    if workers == 1:
        for piece in pieces:
            yield piece, work(piece)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, prepare_process) as pool:
        try:
            with interrupts_ignored():
                futures = {pool.submit(work, piece): piece for piece in pieces}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
