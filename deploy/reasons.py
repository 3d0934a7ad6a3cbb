"""Why a decision was taken, in words that an operator can read: what the node looked like."""

from collections.abc import Sequence

from mmrl.deploy.node import LiveNode
from mmrl.node.actions import FOCUS, LEVEL_0, LEVEL_100, LEVELS, OUT, PAUSE, RESUME
from mmrl.node.memory import has_work


def reason(node: LiveNode, names: Sequence[str], m: int, verb: int) -> str:
    """Describe the state in which ``verb`` (index into VERBS) on model ``m`` was chosen."""
    s = node.state
    if verb == RESUME:
        return f"{names[m]} goes on; {_demand(node, m)}"
    if verb == FOCUS:
        given = "gives the device back" if s.focus == m else "goes first on the device"
        return f"{names[m]} {given}; {_demand(node, m)}"
    if verb in (OUT, PAUSE):
        waiting = [k for k in range(s.n_models) if k != m and s.target[k] == 0 and has_work(s, k)]
        others = "; ".join(f"{names[k]}: {_demand(node, k)}" for k in waiting)
        return f"{_demand(node, m)}; {others or 'no other model lacks weights'}"
    share = LEVELS[verb - LEVEL_0]
    change = "all layers" if verb == LEVEL_100 else f"{share:.0%} of the layers"
    return f"{change} wanted on the device; {_demand(node, m)}"


def _demand(node: LiveNode, m: int) -> str:
    """Say who waits for a model and what it does."""
    s = node.state
    parts = []
    if s.queue_len[m] > 0:
        oldest = node.requests[s.queue[m, 0]]
        age = (s.now_ns - oldest["arrival_ns"]) / 1e9
        target = oldest["ttft_ns"] / 1e9
        parts.append(f"{s.queue_len[m]} waiting, the oldest for {age:.1f} s of {target:g} s")
    if s.begun_len[m] > 0:
        parts.append(f"{s.begun_len[m]} begun")
    if not parts:
        since = (s.now_ns - s.used_ns[m]) / 1e9
        parts.append(f"idle for {since:.1f} s" if s.used_ns[m] >= 0 else "not used yet")
    return ", ".join(parts)
