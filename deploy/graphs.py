"""`GraphPool`: CUDA graphs of several models that share one piece of device memory."""

import threading
from collections.abc import Callable
from typing import Any

import torch


class GraphPool:
    """Device memory that the CUDA graphs of all models of a device share.

    They may: no two of them run at once, and none leaves anything there for another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handle: Any = None
        self._stream: torch.cuda.Stream | None = None

    def capture(self, run: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
        """Return the graph of what a function launches; it is called a few times."""
        graph = torch.cuda.CUDAGraph()
        with self._lock:
            if self._stream is None:
                self._handle = torch.cuda.graph_pool_handle()
                # One for all graphs: cuBLAS keeps a workspace for each stream it has seen.
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                for _ in range(2):  # what is set up at a first call is not part of the graph
                    run()
                self._stream.synchronize()
            # Other threads go on using the device meanwhile.
            with torch.cuda.graph(
                graph,
                pool=self._handle,
                stream=self._stream,
                capture_error_mode="thread_local",
            ):
                run()
        return graph
