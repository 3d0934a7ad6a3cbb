"""Rules act legally on any node, do what their names say on cases worked by hand, and are found."""

from typing import Any

import numpy as np
import pytest

from mmrl.errors import InputError
from mmrl.node.actions import LEVEL_0, LEVEL_100, OUT, VERBS, WAIT, decode, legal
from mmrl.node.state import NODE, REQUEST, new_nodes, new_requests
from mmrl.rollout import run_nodes
from mmrl.rules import Rule, get_rule, rule_class, rule_names
from mmrl.rules.base import MAX_PARAMS
from mmrl.rules.dispatch import act
from mmrl.rules.registry import tuned_for, tuned_params, tuned_rule
from mmrl.sim.kernel import advance, start, step
from mmrl.tuning import draw_rule
from tests.sim.scenes import MS, decode_table, prefill_table, random_scene

LOAD_MS = 100  # of each model of ``small_node``
PREFILL_MS = 10
STEP_MS = 5


def small_node(
    requests: list[tuple[int, int, int]], n_models: int, room: int, **numbers: Any
) -> tuple[Any, Any, Any, Any]:
    """Equal models of which ``room`` fit, each with room for KV; decisions every 20 ms.

    requests are (arrival in ms, model, output tokens); their targets are 1 s to the first token
    and none after, unless given in ``numbers``.
    """
    s = new_nodes(1)[0]
    r = new_requests(1, len(requests))[0]
    s.n_models, s.n_requests = n_models, len(requests)
    s.horizon_ns, s.interval_ns = 60_000 * MS, 20 * MS
    s.budget_bytes = room * 1_100_000
    s.host_kv_limit_bytes = 10**9
    s.pieces[:n_models], s.base_bytes[:n_models], s.layer_bytes[:n_models] = 2, 500_000, 500_000
    s.block_bytes[:n_models] = 100
    s.load_base_ns[:n_models] = s.load_layer_ns[:n_models] = LOAD_MS // 2 * MS
    s.save_block_ns[:n_models] = s.restore_block_ns[:n_models] = 10.0
    s.decode_scale[:n_models] = s.prefill_scale[:n_models] = 1.0
    for i, (arrival_ms, model, output) in enumerate(requests):
        r[i].arrival_ns, r[i].model, r[i].output = arrival_ms * MS, model, output
        r[i].prompt, r[i].ttft_ns, r[i].isolated_ns = 16, 1000 * MS, 100 * MS
    for name, value in numbers.items():
        (s if name in NODE.names else r)[name] = value
    assert set(numbers) <= set(NODE.names) | set(REQUEST.names)
    tables = decode_table(STEP_MS / 1e3, 0, 0)[None], prefill_table(PREFILL_MS / 1e3, 0, 0)[None]
    start(s, r)
    advance(s, r, *tables)
    return s, r, *tables


def decisions(rule: Rule, s: Any, r: Any, *tables: Any) -> Any:
    """Let a rule drive a node; yield (now in ms, action) before each action is done."""
    rule.prepare(s)
    while not s.done:
        action = act(rule, s, r, *tables)
        yield s.now_ns / MS, action
        step(s, r, *tables, action)


def play(rule: Rule, s: Any, r: Any, *tables: Any) -> None:
    for _ in decisions(rule, s, r, *tables):
        pass


# --- every rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rule_names())
def test_a_rule_only_takes_legal_actions_and_leaves_nothing_undecided(name: str) -> None:
    rng = np.random.default_rng(7)
    acted = 0
    for seed in range(60):
        s, r, *tables = random_scene(seed)
        rule = draw_rule(rule_class(name), rng)
        start(s, r)
        advance(s, r, *tables)
        nodes, requests = s.reshape(1).view(np.recarray), r.reshape(1, -1)
        rule.prepare(nodes)
        run_nodes(rule.number, rule.params, nodes, requests, *tables)
        assert nodes[0].done and nodes[0].illegal_actions == 0
        acted += int(nodes[0].actions.sum())
    assert acted > 100


@pytest.mark.parametrize("name", rule_names())
def test_a_rule_is_a_function_of_the_state(name: str) -> None:
    ends = []
    for _ in range(2):
        s, r, *tables = random_scene(3, n_models=4, tight=True, n_requests=39)
        start(s, r)
        advance(s, r, *tables)
        play(get_rule(name), s, r, *tables)
        ends.append((s.tobytes(), r.tobytes()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", [n for n in rule_names() if n != "static"])
def test_a_model_that_fits_is_loaded_at_once(name: str) -> None:
    s, r, *tables = small_node([(0, 0, 4), (0, 0, 4)], 1, 1)
    assert decode(0, act(get_rule(name), s, r, *tables)) == (0, LEVEL_100)


def test_numbers_and_parameters_are_distinct_and_fit() -> None:
    classes = [rule_class(name) for name in rule_names()]
    assert sorted(rule.number for rule in classes) == list(range(len(classes)))
    assert all(len(rule.tunables()) <= MAX_PARAMS for rule in classes)
    assert get_rule("slack", margin=3).params[1] == 3.0


# --- one by one -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("used_last", "evicted"), [(0, 1), (1, 0)])
def test_lru_evicts_the_least_recently_used(used_last: int, evicted: int) -> None:
    requests = [(0, 0, 4), (400, 1, 4), (800, used_last, 4), (1200, 2, 4)]
    s, r, *tables = small_node(requests, 3, 2)
    play(get_rule("lru"), s, r, *tables)
    assert s.done == 1 and s.outs[evicted] == 1 and s.outs[:3].sum() == 1


def test_keep_alive_protects_an_idle_model() -> None:
    s, r, *tables = small_node([(0, 0, 4), (400, 1, 4)], 2, 1)
    rule = get_rule("lru", keep_alive_s=5.0)
    used_ms, out_ms = 0.0, 0.0
    for now_ms, action in decisions(rule, s, r, *tables):
        if action != WAIT and decode(0, action) == (0, OUT):
            used_ms, out_ms = s.used_ns[0] / MS, now_ms
    assert 5000 <= out_ms - used_ms <= 5020


def test_ollama_offloads_a_part_of_what_can_never_fit() -> None:
    s, r, *tables = small_node([(0, 0, 4)], 1, 1, full_verbs=1, budget_bytes=900_000)
    model, verb = decode(1, act(get_rule("lru"), s, r, *tables))
    assert model == 0 and verb == LEVEL_0 and not legal(s, r, 0, LEVEL_100)
    play(get_rule("lru"), s, r, *tables)
    assert s.done == 1 and s.stream_bytes[0] > 0


def test_gdsf_keeps_the_model_with_more_uses() -> None:
    requests = [(0, 0, 4), (200, 0, 4), (400, 0, 4), (600, 1, 4), (1000, 2, 4)]
    s, r, *tables = small_node(requests, 3, 2)
    play(get_rule("gdsf"), s, r, *tables)
    assert s.idle_evictions[:3].tolist() == [0, 1, 0] and s.outs.sum() == 0


def test_idle_cost_weighs_idle_time_against_load_time() -> None:
    requests = [(0, 0, 4), (500, 1, 4), (1500, 2, 4)]
    for factor, evicted in ((1, 0), (10, 1)):
        s, r, *tables = small_node(requests, 3, 2)
        s.load_layer_ns[0] *= factor  # model 0 is idle for about twice as long as model 1
        play(get_rule("idle-cost"), s, r, *tables)
        assert s.outs[evicted] == 1 and s.outs.sum() == 1


def test_full_swap_holds_one_model_and_serves_in_order_of_arrival() -> None:
    requests = [(0, 0, 40), (20, 1, 4), (30, 0, 200), (2500, 1, 4)]
    s, r, *tables = small_node(requests, 2, 2)
    for _ in decisions(get_rule("full-swap"), s, r, *tables):
        assert (s.target[:2] > 0).sum() <= 1
    assert s.done == 1
    # the third came after the second, so that its model went before it was done
    assert r.finish_ns[0] < r.finish_ns[1] < r.finish_ns[2] and r[2].preemptions == 1


def test_static_never_changes_after_its_warm_up() -> None:
    requests = [(200 * k, int(k % 5 == 0), 4) for k in range(60)]
    s, r, *tables = small_node(requests, 2, 1)
    loaded = []
    for now_ms, action in decisions(get_rule("static", warm_up_s=5, kv_share=0.05), s, r, *tables):
        if now_ms > 5000 and action != WAIT and decode(0, action)[1] == LEVEL_100:
            loaded.append(decode(0, action)[0])
    assert set(loaded) <= {0} and len(loaded) <= 1 and s.target[0] > 0


def test_drain_first_waits_for_its_threshold_and_for_what_came_before() -> None:
    requests = [(0, 0, 200), (200, 1, 4), (400, 1, 4), (500, 0, 200)]
    s, r, *tables = small_node(requests, 2, 1)
    rule = get_rule("drain-first", threshold=2, longest_wait_s=30)
    out_ms = [t for t, a in decisions(rule, s, r, *tables) if a and decode(0, a) == (0, OUT)]
    assert len(out_ms) == 1 and out_ms[0] * MS >= r.finish_ns[0]
    assert out_ms[0] * MS < r.finish_ns[3]


def test_setup_index_prefers_the_longer_queue() -> None:
    requests = [(0, 0, 4), *[(0, 1, 4) for _ in range(5)]]
    s, r, *tables = small_node(requests, 2, 1)
    assert decode(0, act(get_rule("setup-index"), s, r, *tables)) == (1, LEVEL_100)


# --- the champion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [0.2, 0.5])
def test_slack_preempts_when_the_slack_falls_below_its_patience(patience: float) -> None:
    # batch work, which can lose no target, runs; a request with 1 s to its first token waits
    s, r, *tables = small_node([(0, 0, 2000), (1000, 1, 4)], 2, 1)
    rule = get_rule("slack", patience=patience)
    slack_ms = None
    for now_ms, action in decisions(rule, s, r, *tables):
        before = slack_ms
        slack_ms = 1000 + 1000 - now_ms - PREFILL_MS - LOAD_MS
        if action != WAIT and decode(0, action) == (0, OUT):
            break
    assert before is not None and slack_ms is not None
    assert slack_ms < 1000 * patience <= before
    play(rule, s, r, *tables)
    assert s.done == 1 and not r.miss.any() and r[0].preemptions == 1


def test_slack_does_not_preempt_who_would_lose_as_much() -> None:
    # tokens come every 5 ms and are due every 6: never far enough ahead for a swap of two loads
    s, r, *tables = small_node([(0, 0, 1000), (1000, 1, 4)], 2, 1, tpot_ns=6 * MS)
    play(get_rule("slack", margin=1.0, longest_wait=100), s, r, *tables)
    assert s.outs.sum() == 0 and r.miss.astype(bool).tolist() == [False, True]


def test_slack_lets_a_victim_reside_first() -> None:
    requests = [(0, 0, 2000), (120, 1, 4)]
    s, r, *tables = small_node(requests, 2, 1)
    rule = get_rule("slack", patience=2.0, residency=4.0)
    out_ms = next(t for t, a in decisions(rule, s, r, *tables) if a and decode(0, a) == (0, OUT))
    assert 4 * LOAD_MS <= out_ms - s.loaded_ns[0] / MS <= 4 * LOAD_MS + 20


def test_slack_puts_out_as_many_as_it_needs_and_no_more() -> None:
    requests = [(0, 0, 2000), (0, 1, 2000), (0, 2, 2000), (1000, 3, 4)]
    s, r, *tables = small_node(requests, 4, 3)
    s.layer_bytes[3] = 1_300_000  # as much as nearly two of the others
    rule = get_rule("slack", patience=2.0)
    out = [
        decode(0, a)[0] for _, a in decisions(rule, s, r, *tables) if a and decode(0, a)[1] == OUT
    ]
    assert len(out) >= 2 and len(set(out[:2])) == 2 and 3 not in out[:2]
    assert r.first_ns[3] - r.arrival_ns[3] < 1000 * MS and s.outs[:3].sum() == 2


def test_slack_puts_nothing_out_when_it_would_not_help() -> None:
    # both must go to make room; they are loaded at 100 and 200 ms and reside for 800 ms at least
    s, r, *tables = small_node([(0, 0, 2000), (0, 1, 2000), (300, 2, 4)], 3, 2)
    s.layer_bytes[2] = 1_300_000
    rule = get_rule("slack", patience=2.0, residency=8.0)
    out_ms = [t for t, a in decisions(rule, s, r, *tables) if a and decode(0, a)[1] == OUT]
    assert len(out_ms) == 2 and out_ms[0] == out_ms[1] >= 1000


def test_slack_lets_a_tiny_model_reside_for_an_interval() -> None:
    # one of two fits, loads take 2 us: without a floor they would be swapped at every instant
    requests = [(20 * k, k % 2, 200) for k in range(40)]
    s, r, *tables = small_node(requests, 2, 1, interval_ns=250 * MS, latency_ns=MS)
    s.load_base_ns[:2] = s.load_layer_ns[:2] = 1000
    out_ms = [
        t for t, a in decisions(get_rule("slack", patience=2.0), s, r, *tables) if a and a % 4 == 1
    ]
    assert len(out_ms) >= 3 and min(np.diff(out_ms)) >= 250


# --- levels ---------------------------------------------------------------------------------------


def wide(s: Any, layers: int = 4) -> None:
    """Spread the weights of the models of a small node over more layers, in full verbs."""
    models = slice(0, int(s.n_models))
    s.full_verbs, s.pieces[models] = 1, layers + 1
    s.base_bytes[models], s.layer_bytes[models] = 100_000, 900_000 // layers
    s.load_base_ns[models] = 0
    s.load_layer_ns[models] = s.stream_layer_ns[models] = LOAD_MS // layers * MS


def taken(rule: Rule, s: Any, r: Any, *tables: Any) -> list[tuple[float, int, str]]:
    """Play to the end; return (ms, model, verb) of each action."""
    found = []
    for now_ms, action in decisions(rule, s, r, *tables):
        if action != WAIT:
            m, verb = decode(int(s.full_verbs), action)
            found.append((now_ms, m, VERBS[verb]))
    return found


def test_partial_lowers_an_idle_model_by_no_more_than_is_needed() -> None:
    # 2.2 MB for two models of 1 MB and one of 0.45 MB: a half of an idle one is enough
    s, r, *tables = small_node([(0, 0, 4), (500, 1, 4), (1500, 2, 4)], 3, 2)
    wide(s)
    s.layer_bytes[2] = 87_500
    actions = taken(get_rule("partial", spare=0.5), s, r, *tables)
    lowered = [(m, verb) for ms, m, verb in actions if ms >= 1500 and m != 2]
    assert len(lowered) == 1 and lowered[0][1] in ("level50", "level75")
    assert s.done == 1 and not r.miss.any() and s.idle_evictions.sum() == 0


def test_partial_makes_room_for_kv_that_a_loaded_model_lacks() -> None:
    # both are loaded, but the KV of a long prompt does not fit beside them; a quarter of the layers
    # streams in 25 ms, within the TPOT target of who runs, and going out would break it
    s, r, *tables = small_node([(0, 0, 3000), (0, 1, 4), (250, 1, 4)], 2, 2, tpot_ns=26 * MS)
    wide(s)
    r.prompt[2] = 40_000
    s.budget_bytes = 2_000_000 + 40_000
    actions = taken(get_rule("partial", patience=2.0, link=0.05), s, r, *tables)
    assert [verb for _, m, verb in actions if m == 0][:2] == ["level100", "level75"]
    assert r.first_ns[2] - r.arrival_ns[2] < 1000 * MS
    assert s.done == 1 and not r.miss[0] and r[0].preemptions == 0


def test_partial_comes_back_to_the_full_level() -> None:
    s, r, *tables = small_node([(0, 0, 4), (500, 1, 4), (1500, 2, 4)], 3, 2)
    wide(s)
    s.layer_bytes[2] = 87_500
    s.horizon_ns = 10_000 * MS
    s.n_requests = 3
    rule = get_rule("partial", spare=0.0)
    for _ in decisions(rule, s, r, *tables):
        room = s.budget_bytes - s.base_bytes[:3].sum() - (s.landed[:3] - 1) @ s.layer_bytes[:3]
    assert (s.target[:3] > 0).all() and room < s.layer_bytes[0] + 10_000


# --- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("slak", {}, "did you mean 'slack'"),
        ("slack", {"patiense": 1}, "did you mean 'patience'"),
        ("slack", {"patience": -1}, "patience"),
        ("slack", {"dispatch": "fifo"}, "dispatch"),
    ],
)
def test_what_does_not_exist_is_named(name: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        get_rule(name, **params)


def test_every_tuned_entry_makes_a_rule() -> None:
    for scenario, rules in tuned_params().items():
        for name, params in rules.items():
            assert tuned_rule(name, scenario).model_dump(include=set(params)) == params
            assert tuned_for(scenario, name) == params
            assert tuned_for("one's own", name) == tuned_params()["universal"].get(name)
