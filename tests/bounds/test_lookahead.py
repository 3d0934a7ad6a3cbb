"""Looking ahead keeps to what it may know, is the base rule where it has no choice, and pays."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmrl.bounds import PLANNERS, Lookahead, Planner
from mmrl.node.state import DECODE, DONE
from mmrl.rollout import run_rule
from mmrl.rules import Slack
from mmrl.rules.common import generated_tokens
from mmrl.rules.dispatch import act
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.seeds import episode_rng
from mmrl.sim.batch import Simulator

SHORT = {"load": 1.0, "utilisation_at_load_1": 6.0, "duration_s": 10, "drain_s": 4}


@pytest.fixture(scope="module")
def sampler() -> Any:
    return get_scenario("demo", **SHORT).sampler()


def started(sampler: Any, episodes: int) -> Simulator:
    simulator = Simulator(sampler, episodes)
    for i in range(episodes):
        simulator.reset(i, episode_rng("dev", i))
    return simulator


def rewards(simulator: Simulator, drive: Any) -> Any:
    """Return the summed reward of each episode, of which ``drive(i)`` gives the actions."""
    total = np.zeros(simulator.num_envs)
    while not simulator.done.all():
        live = np.flatnonzero(simulator.done == 0)
        actions = np.zeros(simulator.num_envs, np.int64)
        actions[live] = [drive(int(i)) for i in live]
        simulator.step(actions)
        total += simulator.rewards
    return total


@pytest.mark.parametrize("name", PLANNERS)
def test_without_a_choice_it_is_the_base_rule(name: str, sampler: Any) -> None:
    simulator, ruled = started(sampler, 3), started(sampler, 3)
    Lookahead(replace(PLANNERS[name], verbs=()), simulator).run()
    run_rule(ruled, Slack())
    # field by field: what lies between the fields is not part of the state
    for one, two in ((simulator.nodes, ruled.nodes), (simulator.requests, ruled.requests)):
        assert all((one[field] == two[field]).all() for field in one.dtype.names)
    assert simulator.nodes.actions.sum() > 0


def test_who_knows_the_future_never_earns_less(sampler: Any) -> None:
    simulator, ruled = started(sampler, 4), started(sampler, 4)
    planner = Planner(futures=0, horizon_s=60.0)
    earned = rewards(simulator, Lookahead(planner, simulator).act)
    planner.base.prepare(ruled.nodes)
    tables = ruled.decode_tables, ruled.prefill_tables
    of_base = rewards(
        ruled, lambda i: act(planner.base, ruled.nodes[i], ruled.request_array[i], *tables)
    )
    assert (earned >= of_base - 1e-6).all() and (earned > of_base + 0.1).any()
    assert not simulator.nodes.illegal_actions.any()


def test_samples_look_at_nothing_of_the_true_future(sampler: Any) -> None:
    """Change all that is to come, with what the node keeps of it: the same action is taken."""
    planner = Planner(futures=2, horizon_s=4.0)
    simulator, other = started(sampler, 1), started(sampler, 1)
    lookahead, beside = Lookahead(planner, simulator), Lookahead(planner, other)
    clairvoyant = Lookahead(Planner(futures=0, horizon_s=4.0), other)
    rng = np.random.default_rng(0)
    seen = np.zeros((2, 1, simulator.observation_size), np.float32)
    changed, acted, foreseen = 0, 0, 0
    while not simulator.done.all():
        action = lookahead.act(0)
        other.nodes[0], other.requests[0] = simulator.nodes[0], simulator.requests[0]
        knowing = clairvoyant.act(0)
        changed += change_future(other.nodes[0], other.requests[0], rng)
        assert beside.act(0) == action
        simulator.observe(seen[0])
        other.observe(seen[1])
        assert (seen[0] == seen[1]).all()
        acted += action != 0
        foreseen += clairvoyant.act(0) != knowing
        simulator.step(np.array([action]))
    assert changed > 30 and acted > 5 and foreseen > 0


def change_future(s: Any, r: Any, rng: np.random.Generator) -> int:
    """Redraw arrivals to come and outputs that are not known; return how many of these."""
    to_come = r[s.next_arrival : s.n_requests]
    gaps = rng.exponential(3e8, len(to_come)).astype(np.int64)
    to_come.arrival_ns = s.now_ns + 1 + np.cumsum(gaps)
    to_come.model = rng.integers(0, s.n_models, len(to_come))
    to_come.output = rng.integers(1, 400, len(to_come))
    open_ones = [i for i in range(s.next_arrival) if r[i].finish_ns < 0 and r[i].state != DONE]
    s.urgency = 0.0
    for i in open_ones:
        r[i].output = generated_tokens(s, r[i]) + rng.integers(1, 400)
        r[i].isolated_ns = rng.integers(10**8, 10**10)
        s.urgency += 1e9 / r[i].isolated_ns
    for m in range(s.n_models):
        decoding = [i for i in open_ones if r[i].model == m and r[i].state == DECODE]
        if decoding:
            s.seg_finish[m] = min(r[i].output - r[i].generated for i in decoding)
    s.next_miss_ns = s.now_ns + rng.integers(0, 10**9)
    return len(open_ones)
