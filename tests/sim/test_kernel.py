"""The compiled kernel equals the reference simulator, bit for bit, and keeps the invariants."""

from typing import Any

import numpy as np
import pytest

from mmrl.node import state as st
from mmrl.node.actions import VERBS, decode, legal_actions, verb_count
from mmrl.node.memory import free_bytes
from mmrl.node.requests import flush_steps
from mmrl.node.state import Nodes, Record, new_nodes, new_requests
from mmrl.sim.kernel import advance, start, step
from mmrl.sim.reference import ReferenceNode
from tests.sim.scenes import random_scene

ASKINGS = 400
REQUEST_FIELDS = ("state", "generated", "blocks", "first_ns", "finish_ns", "preemptions", "miss")
QUEUES = ("grant", "load", "restore", "save")
ELSEWHERE = {"queue", "begun", "misses", "latency_area", *(f"{name}_queue" for name in QUEUES)}


class Kernel:
    """A node advanced by the compiled kernel."""

    def __init__(self, seed: int, **kwargs: Any) -> None:
        node, requests, self.decode_tables, self.prefill_tables = random_scene(seed, **kwargs)
        self.nodes, self.requests = new_nodes(1), new_requests(1, len(requests))
        self.nodes[0], self.requests[0] = node, requests
        self.s: Record = self.nodes[0]
        self.r: Nodes = self.requests[0]
        start(self.s, self.r)
        advance(self.s, self.r, self.decode_tables, self.prefill_tables)

    def mask(self) -> np.ndarray:
        mask = np.zeros(1 + self.s.n_models * verb_count(self.s.full_verbs), bool)
        legal_actions(self.s, self.r, mask)
        return mask

    def act(self, action: int) -> None:
        step(self.s, self.r, self.decode_tables, self.prefill_tables, action)

    def random_action(self, rng: np.random.Generator) -> int:
        return 0 if rng.random() < 0.4 else int(rng.choice(np.flatnonzero(self.mask())))


def unlike(s: Record, r: Nodes, reference: ReferenceNode) -> dict[str, tuple[Any, Any]]:
    """Return every quantity on which kernel and reference differ: name -> (kernel, reference).

    Copies are compared: to write down the steps of a running segment is the kernel's own business,
    and what it has not written yet must be right when it does.
    """
    nodes, table = new_nodes(1), new_requests(1, len(r))
    nodes[0], table[0] = s, r
    s, r = nodes[0], table[0]
    theirs = reference.state()
    mine: dict[str, Any] = {}
    requests = theirs.pop("requests")
    for m in range(s.n_models):
        flush_steps(s, r, m)
        theirs[f"queue {m}"] = theirs["queue"][m]
        theirs[f"begun {m}"] = [i for i, _ in theirs["begun"][m]]
        mine[f"queue {m}"] = s.queue[m, : s.queue_len[m]].tolist()
        mine[f"begun {m}"] = s.begun[m, : s.begun_len[m]].tolist()
    for name in QUEUES:
        theirs[name] = theirs[f"{name}_queue"]
        mine[name] = s[f"{name}_queue"][: s[f"{name}_len"]].tolist()
    for name in REQUEST_FIELDS:
        theirs[f"request {name}"] = requests[name]
        mine[f"request {name}"] = r[name][: s.n_requests].tolist()
    meaningless = set(ELSEWHERE)
    if s.gpu_kind == st.IDLE:
        meaningless |= {"gpu_model"}
    if s.lb_kind == st.IDLE:
        meaningless |= {"lb_model", "lb_computed", "lb_abandoned", "lb_need"}
    if s.lb_kind == st.IDLE or s.lb_abandoned:
        meaningless |= {"lb_layers"}
    if s.h2d_kind == st.LINK_IDLE:
        meaningless |= {"h2d_model"}
    if s.h2d_kind != st.LINK_RESTORE:
        meaningless |= {"h2d_request"}
    for name in set(theirs) - set(mine) - meaningless:
        value = s[name][: s.n_models] if np.ndim(s[name]) else s[name]
        mine[name] = value.tolist()
    return {
        name: (value, theirs[name])
        for name, value in mine.items()
        if value != np.asarray(theirs[name]).tolist()
    }


@pytest.mark.parametrize("seed", range(24))
def test_kernel_equals_reference(seed: int) -> None:
    kernel = Kernel(seed, n_requests=40)
    reference = ReferenceNode(
        kernel.nodes[0].copy(), kernel.r.copy(), kernel.decode_tables, kernel.prefill_tables
    )
    reference.advance()
    rng = np.random.default_rng(seed)
    for _ in range(ASKINGS):
        assert unlike(kernel.s, kernel.r, reference) == {}
        if kernel.s.done:
            break
        assert kernel.mask().tolist() == reference.legal_actions()
        action = kernel.random_action(rng)
        kernel.act(action)
        reference.act(action)
        assert kernel.s.misses == reference.misses
        assert kernel.s.latency_area == reference.latency_area


def begun_places(s: Record, m: int) -> list[int]:
    return s.begun[m, : s.begun_len[m]].tolist()


def check_invariants(s: Record, r: Nodes) -> None:
    """Assert invariants 1, 3 and 5 of the semantics page, and the counters that mirror lists."""
    states = r.state[: s.n_requests]
    for m in range(s.n_models):
        mine = r.model[: s.n_requests] == m
        assert (
            s.queue[m, : s.queue_len[m]].tolist()
            == np.flatnonzero(mine & (states == st.QUEUED)).tolist()
        )
        begun = mine & (states >= st.PREFILL) & (states <= st.JOINING)
        assert begun_places(s, m) == np.flatnonzero(begun).tolist()
        assert s.decoding[m] == (mine & (states == st.DECODE)).sum()
        assert s.saved[m] == (mine & (states == st.SAVED)).sum()
        assert s.joining[m] == (mine & (states == st.JOINING)).sum()
        on_device = begun & (states != st.SAVED)
        assert s.kv_blocks[m] == r.blocks[: s.n_requests][on_device].sum()
        saving = mine & (states == st.SAVING)
        assert s.saving_blocks[m] == r.blocks[: s.n_requests][saving].sum()
        assert 0 <= s.landed[m] <= s.granted[m] <= s.pieces[m]
    assert s.next_arrival + (states == st.UNARRIVED).sum() == s.n_requests
    assert free_bytes(s) >= 0
    assert 0 <= s.host_kv_bytes <= s.host_kv_limit_bytes
    assert s.gpu_busy_ns.sum() <= s.now_ns
    assert max(s.h2d_busy_ns, s.d2h_busy_ns) <= s.now_ns


@pytest.mark.parametrize("seed", range(100, 110))
def test_invariants_1_3_5_and_time_2(seed: int) -> None:
    kernel = Kernel(seed)
    rng = np.random.default_rng(seed)
    now = 0
    for _ in range(300):
        check_invariants(kernel.s, kernel.r)
        assert kernel.s.now_ns >= now
        now = int(kernel.s.now_ns)
        if kernel.s.done:
            break
        kernel.act(kernel.random_action(rng))


@pytest.mark.parametrize("seed", range(5))
def test_invariant_6_same_seed_same_bytes(seed: int) -> None:
    first, second = Kernel(seed), Kernel(seed)
    for kernel in (first, second):
        rng = np.random.default_rng(seed)
        while not kernel.s.done and kernel.s.decisions < 200:
            kernel.act(kernel.random_action(rng))
    assert first.nodes.tobytes() == second.nodes.tobytes()
    assert first.requests.tobytes() == second.requests.tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_invariant_10_an_illegal_action_is_wait_but_for_its_counter(seed: int) -> None:
    kernel, other = Kernel(seed), Kernel(seed)
    rng = np.random.default_rng(seed)
    while not kernel.s.done and kernel.s.decisions < 100:
        illegal = np.flatnonzero(~kernel.mask())
        if len(illegal) and rng.random() < 0.5:
            kernel.act(int(rng.choice(illegal)))
            other.act(0)
            other.s.illegal_actions += 1
        else:
            action = kernel.random_action(rng)
            kernel.act(action)
            other.act(action)
    assert kernel.s.illegal_actions > 0
    for node in (kernel.s, other.s):
        node.head[:] = -1  # a cache, which looking at a verb may fill
        node.head_until_ns[:] = 0
    assert kernel.nodes.tobytes() == other.nodes.tobytes()


@pytest.mark.parametrize("seed", range(6))
def test_invariants_7_and_8_all_tokens_come_whatever_is_preempted(seed: int) -> None:
    """Random verbs for a while, then a policy that loads what waits: every request ends whole."""
    kernel = Kernel(seed, full=True, n_requests=30)
    s, r = kernel.s, kernel.r
    s.horizon_ns = st.NEVER - 1
    rng = np.random.default_rng(seed)
    level100 = VERBS.index("level100")
    while not s.done:
        legal = np.flatnonzero(kernel.mask())
        verbs = [decode(s.full_verbs, int(a)) for a in legal[1:]]
        if s.decisions < 300:
            kernel.act(kernel.random_action(rng))
            continue
        wanted = [
            a
            for a, (m, verb) in zip(legal[1:], verbs, strict=True)
            if (VERBS[verb] == "resume")
            or (verb == level100 and s.queue_len[m] + s.begun_len[m] > 0)
            or (VERBS[verb] == "out" and s.queue_len[m] + s.begun_len[m] == 0)
        ]
        kernel.act(int(rng.choice(wanted)) if wanted else 0)
    assert s.done == 1
    served = r.state[: s.n_requests] == st.DONE
    assert (served | (r.state[: s.n_requests] == st.REFUSED)).all()
    assert (r.generated == r.output)[: s.n_requests][served].all()
    assert s.preempted.sum() > 0
