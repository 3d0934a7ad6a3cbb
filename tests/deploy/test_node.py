"""The live node's instants are the simulator's, and what only a live node has."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.deploy.node import LiveNode
from mmrl.node.actions import OUT, decode, some_verb_legal
from mmrl.node.memory import free_bytes
from mmrl.node.state import (
    CANCELLED,
    DECODE,
    DONE,
    IDLE,
    MAX_MODELS,
    NEVER,
    PREFILL,
    QUEUED,
    REFUSED,
    REQUEST,
    RESTORING,
    SAVED,
    SAVING,
)
from mmrl.sim.kernel import act, next_decision, settle_reward, start
from tests.sim.scenes import random_scene

# Of a piece that lands unseen the simulator keeps the start; the reward is the simulator's alone.
NOT_COMPARED = {"h2d_start_ns", "gpu_start_ns", "urgency", "urgency_since_ns", "latency_area"}
NOT_COMPARED |= {"misses", "next_miss_ns", "h2d_busy_ns", "done", "head", "head_until_ns"}


def live(scene: Any) -> LiveNode:
    node, requests, decode_tables, prefill_tables = scene
    nodes = np.zeros(1, node.dtype)
    nodes[0] = node
    return LiveNode(nodes, np.asarray(requests)[None].copy(), decode_tables, prefill_tables)


def instant(node: LiveNode) -> bool:
    """Go to the next foreseen instant; return whether a decision is due."""
    s, now = node.state, node.next_event_ns()
    compute = s.gpu_end_ns == now
    node.advance(now, h2d=s.h2d_end_ns == now, d2h=s.d2h_end_ns == now)
    if compute:
        node.end_compute()
    if node.link_bound_complete:
        node.end_link_bound()
    return node.settle()


def next_asking(node: LiveNode) -> bool:
    """Let time pass to the next decision; False when the episode is over."""
    s = node.state
    while True:
        node.start_work()
        if node.next_event_ns() >= s.horizon_ns:
            return False
        due = instant(node)
        if s.in_system == 0 and s.next_arrival >= s.n_requests:
            return False
        if due and node.begin_decision():
            return True


def compare(simulated: Any, node: LiveNode, requests: Any) -> None:
    for field in simulated.dtype.names:
        if field not in NOT_COMPARED:
            a, b = simulated[field], node.state[field]
            assert np.array_equal(a, b), (field, a, b, simulated.now_ns)
    for field in REQUEST.names:
        if field not in ("miss",):
            assert np.array_equal(requests[field], node.requests[field]), field


@pytest.mark.parametrize("seed", range(60))
def test_the_instants_are_the_simulators(seed: int) -> None:
    scene = random_scene(seed)
    node = live(scene)
    s, r, decode_tables, prefill_tables = scene
    ready = np.zeros(MAX_MODELS, np.int8)
    start(s, r)
    rng = np.random.default_rng(seed)
    asked = 0
    while asked < 200:
        next_decision(s, r, ready, decode_tables, prefill_tables)
        while not s.done and not some_verb_legal(s, r):
            next_decision(s, r, ready, decode_tables, prefill_tables)
        settle_reward(s, r)
        assert next_asking(node) == (not s.done)
        if s.done:
            break
        compare(s, node, r)
        more = True
        while more:
            _, mask = node.look()
            action = int(rng.choice(np.flatnonzero(mask))) if rng.random() < 0.7 else 0
            more = act(s, r, action)
            assert node.act(action) == more
            asked += 1
    assert asked or s.done


def drive(node: LiveNode, rng: np.random.Generator, each: Any) -> None:
    """Random decisions to the end of the episode; ``each`` is called at every instant."""
    s = node.state
    for _ in range(20_000):
        node.start_work()
        if s.in_system == 0 and s.next_arrival >= s.n_requests:
            return
        due = instant(node)
        each()
        if due and node.begin_decision():
            more = True
            while more:
                _, mask = node.look()
                more = node.act(int(rng.choice(np.flatnonzero(mask))))
    raise AssertionError("the node does not come to an end")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_cancelled_requests_leave_nothing_behind(seed: int) -> None:
    scene = random_scene(seed, tight=True)
    scene[0].horizon_ns = NEVER
    node, rng = live(scene), np.random.default_rng(seed)
    s, r = node.state, node.requests
    wanted: set[int] = set()
    states: set[int] = set()

    def each() -> None:
        arrived = int(s.next_arrival)
        if arrived and rng.random() < 0.3:
            wanted.add(int(rng.integers(arrived)))
        for i in list(wanted):
            before = int(r[i]["state"])
            if before >= DONE or node.cancel(i):
                wanted.discard(i)
                states.add(before)
                assert before >= DONE or r[i]["state"] == CANCELLED
        assert free_bytes(s) >= 0
        assert 0 <= s.host_kv_bytes <= s.host_kv_limit_bytes

    drive(node, rng, each)
    assert (s.kv_blocks == 0).all() and s.host_kv_bytes == 0 and s.in_system == 0
    assert set(np.unique(r["state"])) <= {DONE, REFUSED, CANCELLED}
    assert not s.begun_len.any() and not s.queue_len.any()


def test_cancelling_works_in_every_state() -> None:
    wanted, seen = {QUEUED, PREFILL, DECODE, SAVING, SAVED, RESTORING}, set[int]()
    for seed in range(200):
        scene = random_scene(seed, tight=True, n_models=3)
        scene[0].horizon_ns = NEVER
        node, rng = live(scene), np.random.default_rng(seed)

        def each(node: LiveNode = node, rng: Any = rng) -> None:
            for i in range(int(node.state.next_arrival)):
                state = int(node.requests[i]["state"])
                if state < DONE and rng.random() < 0.02 and node.cancel(i):
                    seen.add(state)

        drive(node, rng, each)
        if seen >= wanted:
            break
    assert seen >= wanted


@pytest.mark.parametrize("seed", range(10))
def test_compacting_changes_nothing_but_the_rows(seed: int) -> None:
    plain, compacted = (live(random_scene(seed, n_requests=30)) for _ in range(2))
    rng = np.random.default_rng(seed)
    for node in (plain, compacted):
        node.state.horizon_ns = NEVER
    for _ in range(2_000):
        for node in (plain, compacted):
            node.start_work()
        s, c = plain.state, compacted.state
        if s.in_system == 0 and s.next_arrival >= s.n_requests:
            break
        due = instant(plain)
        assert instant(compacted) == due
        if due:
            more = plain.begin_decision()
            assert compacted.begin_decision() == more
            while more:
                _, mask = plain.look()
                assert np.array_equal(mask, compacted.look()[1])
                action = int(rng.choice(np.flatnonzero(mask)))
                more = plain.act(action)
                assert compacted.act(action) == more
        if rng.random() < 0.2:
            moved = compacted.compact()
            assert (moved[moved >= 0] == np.arange((moved >= 0).sum())).all()
        assert s.now_ns == c.now_ns and np.array_equal(s.kv_blocks, c.kv_blocks)
    assert plain.state.outputs_tokens.tolist() == compacted.state.outputs_tokens.tolist()


def test_an_output_that_ends_early_is_done_with_its_next_token() -> None:
    scene = random_scene(3, n_models=1, n_requests=4, tight=False)
    scene[0].horizon_ns = NEVER
    scene[1].output[:] = 100
    node = live(scene)
    s, r = node.state, node.requests
    ended: list[int] = []
    for _ in range(5_000):
        node.start_work()
        if s.gpu_kind != IDLE and not ended and s.gpu_kind == 2 and s.decoding[0] > 1:
            batch = node.decoding(0)
            ended.append(batch[0])
            before = int(r[batch[0]]["generated"] + s.seg_steps[0])
            node.end_output(batch[0])
        due = instant(node)
        if ended and r[ended[0]]["state"] == DONE:
            assert r[ended[0]]["generated"] == before + 1
            return
        if due and node.begin_decision():
            _, mask = node.look()
            loads = [a for a in np.flatnonzero(mask)[1:] if decode(int(s.full_verbs), a)[1] == 5]
            node.act(int(loads[0]) if loads else 0)
    raise AssertionError("no sequence was ended")


def test_a_pinned_model_stays() -> None:
    for seed in range(20):
        scene = random_scene(seed, n_models=3, full=True, tight=True)
        scene[0].horizon_ns = NEVER
        node, rng = live(scene), np.random.default_rng(seed)
        s = node.state
        node.start_work()
        if not node.preload(0):
            continue
        s.pinned[0] = 1

        def each(s: Any = s, node: LiveNode = node) -> None:
            assert s.target[0] == s.pieces[0]
            assert not node.legal(0, OUT)

        for _ in range(300):
            node.start_work()
            if s.in_system == 0 and s.next_arrival >= s.n_requests:
                break
            due = instant(node)
            each()
            if due and node.begin_decision():
                _, mask = node.look()
                node.act(int(rng.choice(np.flatnonzero(mask))))
        return
    raise AssertionError("no scene has room to preload its first model")
