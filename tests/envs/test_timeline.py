import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from mmrl.envs import render
from mmrl.envs.env import MultiModelServingEnv
from mmrl.envs.perfetto import export, to_trace
from mmrl.envs.timeline import UNASKED, EpisodeLog, record_episode
from mmrl.node.state import REFUSED, Nodes, Record
from mmrl.rules import get_rule
from mmrl.rules.dispatch import act
from mmrl.scenarios.schema import Scenario


@pytest.fixture(scope="module")
def log(busy: Scenario) -> EpisodeLog:
    """An episode with random legal verbs now and then: loads, preemptions, KV moves."""
    rng = np.random.default_rng(0)
    env = MultiModelServingEnv(busy.model_copy(update={"utilisation_at_load_1": 5.0}))
    env.reset(seed=3)

    def decide(node: Record, requests: Nodes) -> int:
        legal = np.flatnonzero(env.action_masks())
        return int(rng.choice(legal)) if rng.random() < 0.4 else 0

    return record_episode(env.batch.simulator, decide)


def test_the_timeline_tells_the_episode(busy: Scenario, log: EpisodeLog) -> None:
    timeline = log.timeline
    assert (np.diff(timeline.time_s) >= 0).all()
    assert np.diff(timeline.time_s).max() <= busy.interval_s + 1e-9
    assert timeline.action[-1] == UNASKED
    assert (timeline.landed <= 1).all() and (timeline.landed > 0).any()
    assert (timeline.free >= 0).all()
    assert timeline.queued.max() > 0 and timeline.running.max() > 0
    assert timeline.saving.any() and timeline.suspended.max() > 0


def test_recording_changes_nothing(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy, suggestion="slack")
    observation, _ = env.reset(seed=9)
    simulator, rule = env.batch.simulator, get_rule("slack")
    tables = simulator.decode_tables, simulator.prefill_tables
    log = record_episode(simulator, lambda node, requests: act(rule, node, requests, *tables))
    observation, _ = env.reset(seed=9)
    total, done, actions = 0.0, False, []
    while not done:
        actions.append(int(np.argmax(observation[env.layout.public_size :])))
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        total, done = total + reward, terminated or truncated
    assert log.reward == total
    assert log.metrics == info["metrics"]
    assert log.timeline.action[log.timeline.action != UNASKED].tolist() == actions


def test_the_perfetto_trace_holds_every_request_and_balanced_spans(
    log: EpisodeLog, tmp_path: Path
) -> None:
    export(log, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert events == json.loads(json.dumps(to_trace(log)["traceEvents"]))
    end_us = log.timeline.time_s[-1] * 1e6 + 1e-3
    assert all(0 <= event["ts"] <= end_us for event in events)
    assert all(event["ts"] + event["dur"] <= end_us for event in events if event["ph"] == "X")
    spans = request_spans(events)
    assert sum(name.startswith("request") for _, name in spans) == log.info.requests
    decisions = int((log.timeline.action > 0).sum())
    assert sum(event["ph"] == "i" for event in events) == decisions > 0
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"load", "save"}


def request_spans(events: list[dict[str, Any]]) -> dict[tuple[int, str], list[float]]:
    """Return (request, stage) -> [start, end], microseconds, and assert that stages nest."""
    spans: dict[tuple[int, str], list[float]] = {}
    for event in events:
        if event["ph"] in "be":
            spans.setdefault((event["id"], event["name"]), []).append(event["ts"])
    assert all(len(span) == 2 and span[0] <= span[1] for span in spans.values())
    for (request, _), (start, end) in spans.items():
        whole = spans[request, f"request {request - 1}"]
        assert whole[0] <= start and end <= whole[1]
    return spans


def test_a_refused_request_waits_until_it_is_refused(busy: Scenario) -> None:
    """A queue that is full refuses who comes; nobody waits beyond that."""
    env = MultiModelServingEnv(busy.model_copy(update={"utilisation_at_load_1": 500.0}))
    env.reset(seed=3)
    log = record_episode(env.batch.simulator, lambda node, requests: 0)
    refused = np.flatnonzero(log.requests["state"] == REFUSED)
    assert len(refused) > 0
    spans = request_spans(to_trace(log)["traceEvents"])
    for k in refused.tolist():
        assert spans[k + 1, "waiting"][1] == pytest.approx(log.requests["finish_ns"][k] / 1e3)
        assert (k + 1, "generating") not in spans


def test_pictures(busy: Scenario, full: Scenario) -> None:
    for scenario in (busy, full):
        env = MultiModelServingEnv(scenario, render_mode="rgb_array")
        env.reset(seed=1)
        before = env.render()
        for _ in range(20):
            env.step(int(np.flatnonzero(env.action_masks())[-1]))
        after = env.render()
        assert before.shape == after.shape and before.dtype == np.uint8
        assert (before != after).any()


def test_the_table_has_a_line_for_each_model(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy, render_mode="ansi")
    env.reset(seed=1)
    load = next(a for a in np.flatnonzero(env.action_masks()) if a)
    env.step(load)
    lines = env.render().splitlines()
    assert env.action_names[load] in lines[0]
    assert [line.split()[0] for line in lines[2:]] == list(env.episode.model_names)
    assert lines == render.table(env.batch.simulator, env.action_names[load]).splitlines()


def test_no_timeline_without_a_render_mode(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy)
    env.reset()
    with pytest.raises(gym.error.ResetNeeded, match="render_mode"):
        env.timeline()
