"""Why a decision was taken, in words that an operator can read: what the node looked like.

A reason begins with ``idle`` where nobody asks for the model and nobody gains: the live page folds
runs of these.
"""

from collections.abc import Sequence

from mmrl.deploy.node import LiveNode
from mmrl.node.actions import FOCUS, LEVEL_0, LEVELS, OUT, PAUSE, RESUME
from mmrl.node.memory import has_work

SHARES = (
    "only its base weights",
    "25% of its layers",
    "50% of its layers",
    "75% of its layers",
    "all its layers",
)


def reason(node: LiveNode, names: Sequence[str], m: int, verb: int) -> str:
    """Describe the state in which ``verb`` (index into VERBS) on model ``m`` was chosen."""
    s, own = node.state, _demand(node, m)
    if verb == RESUME:
        return f"goes on: {own}"
    if verb == FOCUS:
        return f"{'gives the device back' if s.focus == m else 'goes first on the device'}: {own}"
    others = [k for k in range(s.n_models) if k != m and has_work(s, k)]
    if verb == PAUSE:
        alone, way = "pauses", "gives way to"
    elif verb == OUT:
        others = [k for k in others if s.target[k] == 0]
        alone, way = "frees its memory", "makes room for"
    else:
        share, words = LEVELS[verb - LEVEL_0], SHARES[verb - LEVEL_0]
        alone, way = f"keeps {words}", f"keeps {words}, makes room for"
        if (s.target[m] - 1) / (s.pieces[m] - 1) <= share:
            alone, others = f"wants {words}", []
    if others:
        wanted = "; ".join(f"{names[k]} ({_demand(node, k)})" for k in others)
        return f"{way} {wanted} · itself: {own}"
    return f"{alone}: {own}" if has_work(s, m) else own


def _demand(node: LiveNode, m: int) -> str:
    """Say who waits for a model and what it does."""
    s = node.state
    parts = []
    if s.queue_len[m] > 0:
        oldest = node.requests[s.queue[m, 0]]
        age_s, target_s = (s.now_ns - oldest["arrival_ns"]) / 1e9, oldest["ttft_ns"] / 1e9
        waits = "1 waits" if s.queue_len[m] == 1 else f"{s.queue_len[m]} wait, the oldest"
        parts.append(f"{waits} for {age_s:.1f} s, target {target_s:g} s")
    if s.begun_len[m] > 0:
        parts.append(f"{s.begun_len[m]} under way")
    if not parts:
        since = (s.now_ns - s.used_ns[m]) / 1e9
        parts.append(f"idle for {since:.1f} s" if s.used_ns[m] >= 0 else "idle since the start")
    return ", ".join(parts)
