"""Why a decision was taken, in words that an operator can read: what the node looked like."""

from collections.abc import Sequence

from mmrl.deploy.node import LiveNode
from mmrl.node.actions import FOCUS, LEVEL_0, LEVELS, OUT, PAUSE, RESUME
from mmrl.node.memory import has_work


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
        share = LEVELS[verb - LEVEL_0]
        if (s.target[m] - 1) / (s.pieces[m] - 1) <= share:
            return f"wants {'all' if share == 1 else f'{share:.0%}'} of its layers: {own}"
        alone = f"keeps {share:.0%} of its layers"
        way = f"{alone}, makes room for"
    wanted = "; ".join(f"{names[k]} ({_demand(node, k)})" for k in others)
    return f"{way} {wanted} · itself: {own}" if wanted else f"{alone}: {own}"


def _demand(node: LiveNode, m: int) -> str:
    """Say who waits for a model and what it does."""
    s = node.state
    parts = []
    if s.queue_len[m] > 0:
        oldest = node.requests[s.queue[m, 0]]
        age_s, target_s = (s.now_ns - oldest["arrival_ns"]) / 1e9, oldest["ttft_ns"] / 1e9
        waits = "waits" if s.queue_len[m] == 1 else "wait"
        parts.append(f"{s.queue_len[m]} {waits}, the oldest {age_s:.1f} s of {target_s:g} s")
    if s.begun_len[m] > 0:
        parts.append(f"{s.begun_len[m]} begun")
    if not parts:
        since = (s.now_ns - s.used_ns[m]) / 1e9
        parts.append(f"idle for {since:.1f} s" if s.used_ns[m] >= 0 else "not used yet")
    return ", ".join(parts)
