"""What only a critic in training may see: the arrivals to come and the true lengths of outputs.

Never part of what a policy decides on: the block comes last in an observation, the actor slices it
off, and exported policies and deployed nodes do not have it.
"""

import numpy as np
import numpy.typing as npt

from mmrl.node.jit import jit
from mmrl.node.observe import squash
from mmrl.node.state import DECODE, Nodes, Record

HORIZONS_S = (1, 3, 8, 20, 40)
PRIVILEGED_FEATURES = (
    "arrivals_1s",  # arrivals within so many seconds, against 1, 2, 4, 8, 16
    "arrivals_3s",
    "arrivals_8s",
    "arrivals_20s",
    "arrivals_40s",
    "remaining_begun",  # output tokens that sequences begun still have to generate, against 400
    "remaining_queued",
)

_HORIZONS_NS = np.array(HORIZONS_S, dtype=np.int64) * 1_000_000_000
_SCALES = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
_N = len(PRIVILEGED_FEATURES)


@jit
def foresee(s: Record, r: Nodes, out: npt.NDArray[np.float32]) -> None:
    """Write the future of a node into ``out[: n_models * 7]``; ``out`` holds zeros."""
    for i in range(s.next_arrival, s.n_requests):
        ahead = r[i].arrival_ns - s.now_ns
        if ahead > _HORIZONS_NS[-1]:
            break
        for h in range(len(_HORIZONS_NS)):
            if ahead <= _HORIZONS_NS[h]:
                out[r[i].model * _N + h] += 1.0
    for m in range(s.n_models):
        block = out[m * _N : (m + 1) * _N]
        for h in range(len(_HORIZONS_NS)):
            block[h] = squash(block[h], _SCALES[h])
        left = 0
        for k in range(s.begun_len[m]):
            request = r[s.begun[m, k]]
            left += request.output - request.generated
            if request.state == DECODE:
                left -= s.seg_steps[m]
        block[5] = squash(left, 400.0)
        left = 0
        for k in range(s.queue_len[m]):
            request = r[s.queue[m, k]]
            left += request.output - request.generated
        block[6] = squash(left, 400.0)


@jit
def write_futures(nodes: Nodes, requests: Nodes, first: int, out: npt.NDArray[np.float32]) -> None:
    """Write the future of each node into ``out[i, first:]``, float32[N, observation size]."""
    for i in range(len(nodes)):
        foresee(nodes[i], requests[i], out[i, first:])
