"""The reference against cases worked by hand, its invariants, and liveness."""

from typing import Any

import numpy as np
import pytest

from mmrl.node import state as st
from mmrl.node.state import new_nodes, new_requests
from mmrl.sim.reference import CORE, FULL, LEVELS, ReferenceNode
from tests.sim.scenes import MS, decode_table, prefill_table, random_scene

WAIT = 0


def node_of(requests: list[tuple[int, int, int, int]], n_models: int = 1, **numbers: Any) -> Any:
    """A node of equal models whose prefill takes 30 ms, decode step 10 ms, load 5 + 10 + 20 L ms.

    requests are (arrival in ms, model, prompt, output). A stream of one layer takes 7 ms and 1 ms
    more for the first; a KV move 1 ms and half a millisecond a block.
    """
    node = new_nodes(1)[0]
    node.n_models, node.n_requests = n_models, len(requests)
    node.horizon_ns, node.interval_ns, node.budget_bytes = 100_000 * MS, 50 * MS, 10**9
    node.host_kv_limit_bytes = 10**9
    node.pieces[:n_models], node.base_bytes[:n_models], node.layer_bytes[:n_models] = 3, 100, 100
    node.block_bytes[:n_models] = 50
    node.load_fixed_ns[:n_models], node.load_base_ns[:n_models] = 5 * MS, 10 * MS
    node.load_layer_ns[:n_models] = 20 * MS
    node.stream_fixed_ns[:n_models], node.stream_layer_ns[:n_models] = MS, 7 * MS
    node.save_fixed_ns[:n_models], node.save_block_ns[:n_models] = MS, MS / 2
    node.restore_fixed_ns[:n_models], node.restore_block_ns[:n_models] = MS, MS / 2
    node.decode_scale[:n_models] = node.prefill_scale[:n_models] = 1.0
    for name, value in numbers.items():
        if node[name].shape:
            node[name][:n_models] = value
        else:
            node[name] = value
    table = new_requests(1, len(requests))[0]
    for i, (arrival_ms, model, prompt, output) in enumerate(requests):
        row = table[i]
        row.arrival_ns, row.model, row.prompt, row.output = arrival_ms * MS, model, prompt, output
        row.ttft_ns, row.tpot_ns, row.isolated_ns = 1_000 * MS, 50 * MS, 500 * MS
    tables = decode_table(0.01, 0.0, 0.0)[None], prefill_table(0.03, 0.0, 0.0)[None]
    return ReferenceNode(node, table, *tables)


def act(sim: ReferenceNode, m: int, verb: str) -> None:
    assert sim.legal(m, verb), (sim.now_ns, m, verb)
    sim.act(1 + m * len(sim.verbs) + sim.verbs.index(verb))
    sim.check()


def wait_until(sim: ReferenceNode, ms: int) -> None:
    while sim.now_ns < ms * MS:
        sim.act(WAIT)
        sim.check()
    assert sim.now_ns == ms * MS and not sim.done


def finish(sim: ReferenceNode) -> None:
    while not sim.done:
        sim.act(WAIT)
        sim.check()


def times_ms(sim: ReferenceNode) -> list[tuple[float, float]]:
    return [(r.first_ns / MS, r.finish_ns / MS) for r in sim.requests]


def test_one_request_waits_for_decision_and_load() -> None:
    sim = node_of([(90, 0, 20, 3)], latency_ns=2 * MS)
    sim.advance()  # the interval ends at 50, but no verb is legal before the request is there
    assert sim.now_ns == 92 * MS
    act(sim, 0, "level100")
    finish(sim)
    # 92: base on the device at 107, layers at 127 and 147; the prefill computes 107..137 and
    # waits for the last layer; then two steps of 10 ms.
    assert times_ms(sim) == [(147.0, 167.0)]
    assert sim.done == 1
    model = sim.models[0]
    assert (model.loads, model.load_bytes, model.loaded_ns) == (1, 300, 147 * MS)
    assert (model.gpu_busy_ns, sim.h2d_busy_ns) == (50 * MS, 55 * MS)
    assert (model.prefill_tokens, model.decode_tokens) == (20, 2)


def test_resident_prompt_goes_in_chunks_with_decode_steps_between() -> None:
    sim = node_of([(0, 0, 20, 20), (61, 0, 5_000, 1)])
    sim.advance()
    act(sim, 0, "level100")
    finish(sim)
    # First token at 55, steps from then on. The long prompt waits for the end of a step at 65; its
    # chunks start at 65, 105 and 145, with a step after each of the first two.
    assert times_ms(sim)[1] == (175.0, 175.0)
    # tokens: 1 at 55, 2 at 65, 3 at 105, 4 at 145, and 16 steps from 175 on
    assert times_ms(sim)[0] == (55.0, 335.0)


def test_out_saves_and_a_new_level_resumes() -> None:
    sim = node_of([(0, 0, 20, 40)], full_verbs=1)
    sim.advance()
    act(sim, 0, "level100")
    wait_until(sim, 55)  # loaded, first token
    wait_until(sim, 105)  # the interval is over; 6 tokens
    act(sim, 0, "out")
    request, model = sim.requests[0], sim.models[0]
    assert (request.state, request.blocks, request.generated) == (st.SAVING, 2, 6)
    assert (model.granted, model.landed) == (0, 0)
    wait_until(sim, 107)  # 25 tokens in two blocks: 1 ms + 2 * 0.5 ms
    assert (request.state, model.kv_blocks, sim.host_kv_bytes) == (st.SAVED, 0, 100)
    act(sim, 0, "level100")
    assert request.state == st.RESTORING
    wait_until(sim, 109)  # KV goes before weights
    assert (request.state, sim.host_kv_bytes) == (st.DECODE, 0)
    finish(sim)
    # The load starts at 109: base at 124, then a step that waits for the layers until 164.
    assert times_ms(sim) == [(55.0, (164 + 33 * 10))]
    assert (request.generated, request.preemptions) == (40, 1)
    assert (model.kv_save_bytes, model.kv_restore_bytes, model.outs) == (100, 100, 1)


def test_dropped_kv_is_recomputed() -> None:
    sim = node_of([(0, 0, 20, 40)], full_verbs=1, host_kv_limit_bytes=99)
    sim.advance()
    act(sim, 0, "level100")
    wait_until(sim, 105)
    act(sim, 0, "out")
    assert sim.requests[0].state == st.QUEUED
    wait_until(sim, 155)
    act(sim, 0, "level100")
    finish(sim)
    # Loaded at 210; the prefill of 26 tokens yields the 7th token then, 33 steps follow.
    assert times_ms(sim) == [(55.0, 210 + 330)]
    assert (sim.models[0].kv_dropped, sim.models[0].prefill_tokens) == (1, 46)


def test_link_bound_iterations_share_the_link_with_the_load() -> None:
    sim = node_of([(0, 0, 20, 4)], full_verbs=1, pieces=5)
    sim.advance()
    act(sim, 0, "level50")
    finish(sim)
    # Base until 15, then the prefill streams 2 layers in turn with the 2 layers of the load:
    # stream 15..23, load ..43, stream ..50, load ..70; its compute is over at 45.
    # A step is max(10, 1 + 7 + 7) ms.
    assert times_ms(sim) == [(70.0, 115.0)]
    assert sim.models[0].stream_bytes == (2 + 3 * 2) * 100
    assert sim.models[0].gpu_busy_ns == 60 * MS


def test_the_first_step_of_a_segment_takes_longer() -> None:
    sim = node_of([(0, 0, 20, 40)], settle_ns=3 * MS)
    sim.advance()
    act(sim, 0, "level100")
    finish(sim)
    # The prompt ends at 55; the 39 steps after it are segments of 16, 16 and 7.
    assert times_ms(sim) == [(55.0, 55 + 39 * 10 + 3 * 3)]


def test_iterations_take_longer_while_another_model_loads() -> None:
    requests = [(0, 0, 20, 40), (55, 1, 20, 1), (56, 0, 20, 1)]
    sim = node_of(requests, n_models=2, beside_load=0.5, beside_save=0.3)
    sim.advance()
    act(sim, 0, "level100")
    wait_until(sim, 55)  # loaded; its own load has slowed nothing
    act(sim, 1, "level100")
    finish(sim)
    # The load of model 1 goes from 55 to 110 (base at 70). Model 0: a step of 15 until 70. Then
    # the link-bound prefill of model 1 computes 30, as ever, and waits. At 100 the other prompt of
    # model 0: 30 and half a step. When its next step starts, at 135, the link rests.
    assert times_ms(sim) == [(55.0, 135 + 38 * 10), (110.0, 110.0), (135.0, 135.0)]
    assert sim.models[0].gpu_busy_ns == (30 + 15 + 35 + 38 * 10) * MS


def test_steps_take_longer_while_another_model_streams() -> None:
    requests = [(0, 0, 20, 30), (0, 1, 20, 2)]
    sim = node_of(requests, n_models=2, full_verbs=1, beside_stream=0.2, stream_layer_ns=27 * MS)
    sim.advance()
    act(sim, 0, "level100")
    act(sim, 1, "level50")
    finish(sim)
    # Model 0 is there at 55 and decodes at 65 and 75. Model 1 (base at 70, layer at 90) computes
    # its prefill 75..105 and streams 90..118; beside it steps of 12 end at 117 and 129. Its step
    # computes 129..139 and streams until 157; beside it steps of 12 end at 151 and 163.
    assert times_ms(sim) == [(55.0, 163 + 23 * 10), (118.0, 157.0)]


def test_level_change_abandons_what_waits_for_the_link() -> None:
    sim = node_of([(0, 0, 20, 2)], full_verbs=1, pieces=5, interval_ns=48 * MS)
    sim.advance()
    act(sim, 0, "level50")
    wait_until(sim, 48)  # compute over at 45, a streamed layer is on the link until 50
    act(sim, 0, "level0")
    finish(sim)
    # The load ends with one piece. A new prefill starts at once and computes until 78; its layers
    # follow the lost one: 50 + 1 + 4 * 7. The step after it: 1 + 4 * 7.
    assert times_ms(sim) == [(79.0, 108.0)]
    assert sim.models[0].abandoned == 1
    assert sim.models[0].stream_bytes == (2 + 4 + 4) * 100


def test_two_models_alternate() -> None:
    sim = node_of([(0, 0, 20, 6), (0, 1, 20, 3)], n_models=2)
    sim.advance()
    act(sim, 0, "level100")
    act(sim, 1, "level100")
    finish(sim)
    # Model 0 is loaded at 55, model 1 from 70 (base) to 110. Device: model 0 55..75, model 1
    # prefill 75..105 (waits for its layers until 110), then 0, 1, 0, 1, 0.
    assert times_ms(sim) == [(55.0, 155.0), (110.0, 145.0)]


def test_focus_goes_first_until_its_work_ends() -> None:
    sim = node_of([(0, 0, 20, 6), (0, 1, 20, 3)], n_models=2, full_verbs=1)
    sim.advance()
    act(sim, 0, "level100")
    act(sim, 1, "level100")
    act(sim, 0, "focus")
    finish(sim)
    # Model 0 keeps the device 55..105; model 1 prefills 105..135 on landed base, resident by then
    # but for a layer that comes at 110.
    assert times_ms(sim) == [(55.0, 105.0), (135.0, 155.0)]
    assert sim.focus is None


def test_grant_waits_for_a_kv_save() -> None:
    sim = node_of(
        [(0, 0, 20, 12), (60, 1, 1, 1)],
        n_models=2,
        budget_bytes=450,
        layer_bytes=(100, 150),
        block_bytes=(50, 10),
    )
    sim.advance()
    act(sim, 0, "level100")
    wait_until(sim, 60)
    act(sim, 0, "out")  # computes until 65
    assert sim.legal(1, "level100")  # 400 + 2 * 10 of 300 + 3 * 50 that is on its way out
    act(sim, 1, "level100")
    assert (sim.models[1].target, sim.models[1].granted) == (3, 0)
    sim.act(WAIT)
    assert sim.now_ns == 67 * MS  # at 65 two of three blocks are left: 100 too many
    assert sim.models[1].granted == 3 and sim.requests[0].state == st.SAVED
    wait_until(sim, 122)
    assert times_ms(sim)[1] == (122.0, 122.0)  # granted at 67, then 5 + 10 + 2 * 20
    act(sim, 0, "level100")  # evicts model 1, idle now
    assert (sim.models[1].idle_evictions, sim.models[1].granted) == (1, 0)
    finish(sim)
    assert sim.requests[0].generated == 12


def test_blocked_node_puts_a_model_out_by_itself() -> None:
    # Both fit with the KV of one head each, but not with what the other then takes.
    sim = node_of(
        [(0, 0, 16, 40), (0, 1, 16, 40)], n_models=2, budget_bytes=700, host_kv_limit_bytes=0
    )
    sim.advance()
    act(sim, 0, "level100")
    act(sim, 1, "level100")
    while not sim.done and not any(m.unblocked for m in sim.models):
        sim.act(WAIT)
        sim.check()
    assert [m.unblocked for m in sim.models] in ([1, 0], [0, 1])


def test_pause_keeps_weights_and_kv() -> None:
    sim = node_of([(0, 0, 20, 10)], full_verbs=1)
    sim.advance()
    act(sim, 0, "level100")
    wait_until(sim, 105)
    act(sim, 0, "pause")
    wait_until(sim, 155)
    act(sim, 0, "resume")
    finish(sim)
    assert times_ms(sim) == [(55.0, 155 + 40)]  # 4 of 10 tokens were left
    assert sim.requests[0].preemptions == 0


def test_area_and_misses_between_two_askings() -> None:
    sim = node_of([(100, 0, 20, 1), (150, 0, 20, 1)], interval_ns=1_000 * MS, full_verbs=1)
    sim.requests[0].ttft_ns, sim.requests[1].ttft_ns = 30 * MS, 200 * MS
    sim.advance()
    assert (sim.now_ns, sim.misses, sim.latency_area) == (100 * MS, 0, 0.0)
    sim.act(WAIT)
    assert (sim.now_ns, sim.misses) == (150 * MS, 1)  # certain since 130 ms, seen now
    assert sim.latency_area == pytest.approx(0.05 / 0.5)
    act(sim, 0, "level100")
    assert (sim.misses, sim.latency_area) == (0, 0.0)
    finish(sim)
    # The second goes first, for it can still be in time; the other is resident after it.
    assert times_ms(sim) == [(235.0, 235.0), (205.0, 205.0)]
    assert [r.miss for r in sim.requests] == [st.MISS_TTFT, st.MISS_NONE]
    assert sim.urgency == 0.0


def test_queue_refuses_and_ends() -> None:
    sim = node_of([(0, 0, 1, 1)] * (st.QUEUE_LIMIT + 2), interval_ns=10**12)
    sim.advance()
    assert sim.misses == 2
    assert [r.miss for r in sim.requests[-3:]] == [st.MISS_NONE] + [st.MISS_REFUSED] * 2
    act(sim, 0, "level100")
    finish(sim)
    assert sim.done == 1 and len([r for r in sim.requests if r.state == st.DONE]) == 256


def test_horizon_truncates() -> None:
    sim = node_of([(0, 0, 20, 3), (75, 0, 20, 3)], horizon_ns=75 * MS)
    sim.advance()
    act(sim, 0, "level100")
    finish(sim)
    assert (sim.done, sim.now_ns) == (2, 75 * MS)
    # the instant at the horizon is not processed: neither the last token nor the arrival
    assert [r.state for r in sim.requests] == [st.DECODE, st.UNARRIVED]
    assert sim.requests[0].generated == 2


def test_illegal_action_is_wait_and_counted() -> None:
    one, two = (ReferenceNode(*random_scene(3, full=True)) for _ in range(2))
    one.advance()
    two.advance()
    while not one.done:
        illegal = [a for a, legal in enumerate(one.legal_actions()) if not legal]
        one.act(WAIT)
        two.act(illegal[0] if illegal else 10_000)
    first, second = one.state(), two.state()
    assert (first.pop("illegal_actions"), second.pop("illegal_actions") > 0) == (0, True)
    assert first == second


def test_verb_sets() -> None:
    for full, verbs in ((False, CORE), (True, FULL)):
        sim = ReferenceNode(*random_scene(0, n_models=3, full=full))
        assert sim.verbs == verbs and len(sim.legal_actions()) == 1 + 3 * len(verbs)


def reach(seed: int, steps: int) -> ReferenceNode:
    """Play random actions, checking each instant of the policy; WAIT more often in some seeds."""
    sim = ReferenceNode(*random_scene(seed, tight=True if seed % 2 else None))
    rng = np.random.default_rng(seed)
    wait = rng.choice([0.5, 0.5, 0.95])
    sim.advance()
    before = 0
    for _ in range(steps):
        assert sim.now_ns >= before
        before = sim.now_ns
        sim.check()
        if sim.done:
            break
        legal = np.flatnonzero(sim.legal_actions())
        sim.act(WAIT if rng.random() < wait else int(rng.choice(legal)))
    return sim


PATHS = (
    *("stream_bytes", "kv_restore_bytes", "kv_dropped"),
    *("idle_evictions", "abandoned", "unblocked"),
)


def test_invariants_under_random_actions() -> None:
    seen: set[str] = set()
    for seed in (*range(50), 84, 131):
        sim = reach(seed, 150)
        seen |= {name for name in PATHS if any(getattr(m, name) for m in sim.models)}
    assert seen == set(PATHS), "the scenes no longer reach every path"


def test_same_seed_same_state() -> None:
    assert reach(7, 200).state() == reach(7, 200).state()


def load_what_waits(sim: ReferenceNode, quantum_ns: int) -> int:
    """Resume, load what lacks weights, and for that put out what has had its time."""
    verbs = sim.verbs
    for m in sim.models:
        if sim.legal(m.index, "resume"):
            return 1 + m.index * len(verbs) + verbs.index("resume")
    waiting = [m for m in sim.models if m.lacks_weights]
    for m in waiting:
        if sim.legal(m.index, "level100"):
            return 1 + m.index * len(verbs) + verbs.index("level100")
    if waiting and all(m.granted >= m.target for m in sim.models):
        loaded = [m for m in sim.models if m.landed == m.pieces and sim.legal(m.index, "out")]
        loaded = [m for m in loaded if sim.now_ns >= m.loaded_ns + quantum_ns]
        if loaded:
            oldest = min(loaded, key=lambda m: m.loaded_ns)
            return 1 + oldest.index * len(verbs) + verbs.index("out")
    return WAIT


@pytest.mark.parametrize("tight", [False, True])
def test_every_request_ends_when_what_waits_is_loaded(tight: bool) -> None:
    for seed in range(100, 120):
        scene = random_scene(seed, tight=tight, n_requests=12)
        scene[0].horizon_ns = 100_000 * MS
        sim = ReferenceNode(*scene)
        sim.advance()
        for _ in range(1_500):
            sim.act(load_what_waits(sim, quantum_ns=2_000 * MS))
        assert sim.done == 1, f"seed {seed}"
        for request in sim.requests:
            assert request.generated == request.output


@pytest.mark.parametrize("level", LEVELS)
def test_preempted_and_resumed_yields_as_many_tokens(level: str) -> None:
    sim = node_of([(0, 0, 20, 40), (0, 0, 33, 17)], full_verbs=1, host_kv_limit_bytes=100, pieces=5)
    sim.advance()
    act(sim, 0, level)
    for ms in (1, 2, 3):
        while sim.now_ns < ms * 100 * MS:
            sim.act(WAIT)
        act(sim, 0, "out")
        sim.act(WAIT)
        act(sim, 0, level)
    finish(sim)
    assert [r.generated for r in sim.requests] == [40, 17]
    assert sum(r.preemptions for r in sim.requests) >= 1
