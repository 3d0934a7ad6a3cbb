import numpy as np
import pytest
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer

from mmrl.agents.buffer import EventTimeRolloutBuffer, event_time_advantages, normalised

LN2 = float(np.log(2))


def column(*values: float) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(values, np.float32)[:, None]


def test_a_case_worked_by_hand() -> None:
    # Discount halves in 10 s, trace in 20 s: dt 10, 0, 20 s give gamma 1/2, 1, 1/4 and
    # lambda 2^-1/2, 1, 1/2.
    dt = column(10, 0, 20)
    rewards, values = column(-1, 0, -2), column(3, 5, 4)
    next_values = column(5, 4, 8)
    advantages = event_time_advantages(
        rewards, values, next_values, np.zeros((3, 1), bool), dt, 10 / LN2, 20 / LN2
    )
    last = -2 + 8 / 4 - 4  # -4
    middle = 0 + 4 - 5 + last  # -5
    first = -1 + 5 / 2 - 3 + 0.5 * 2**-0.5 * middle
    assert np.allclose(advantages[:, 0], [first, middle, last])


def test_nothing_passes_the_end_of_an_episode() -> None:
    ends = np.array([[False], [True], [False]])
    rewards, values, zero = column(0, -1, -5), column(0, 0, 0), column(0, 0, 0)
    advantages = event_time_advantages(rewards, values, zero, ends, column(0, 0, 0), 15, 6)
    assert advantages[:, 0].tolist() == [-1, -1, -5]


def test_even_steps_give_the_advantages_of_stable_baselines() -> None:
    rng = np.random.default_rng(0)
    steps, nodes, dt = 9, 4, 0.5
    box, discrete = spaces.Box(-1, 1, (3,)), spaces.Discrete(5)
    gamma, trace = float(np.exp(-dt / 15)), float(np.exp(-dt / 6))
    theirs = MaskableRolloutBuffer(steps, box, discrete, "cpu", trace, gamma, nodes)
    ours = EventTimeRolloutBuffer(
        steps, box, discrete, "cpu", n_envs=nodes, discount_s=15.0, trace_s=6.0
    )
    import torch as th

    values = rng.normal(size=(steps + 1, nodes)).astype(np.float32)
    dones = rng.random((steps + 1, nodes)) < 0.2
    for t in range(steps):
        obs = rng.random((nodes, 3), np.float32)
        actions = rng.integers(5, size=nodes)
        rewards = rng.normal(size=nodes).astype(np.float32)
        ours.store(
            t,
            slice(None),
            obs,
            np.ones((nodes, 5), bool),
            actions,
            np.zeros(nodes, np.float32),
            rewards,
            np.full(nodes, dt),
            np.ones(nodes),
            dones[t + 1],
        )
        theirs.add(
            obs, actions[:, None], rewards, dones[t], th.from_numpy(values[t]), th.zeros(nodes)
        )
    theirs.compute_returns_and_advantage(th.from_numpy(values[-1]), dones[-1])
    ours.finish(values[:-1], values[-1], np.zeros((steps, nodes), np.float32))
    assert np.allclose(ours.advantages, theirs.advantages, atol=1e-5)
    assert np.allclose(ours.returns, theirs.returns, atol=1e-5)


def test_a_truncated_episode_bootstraps_with_the_discounted_value_of_its_last_observation() -> None:
    buffer = EventTimeRolloutBuffer(
        2, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", discount_s=10 / LN2, trace_s=1.0
    )
    for step, (end, dt) in enumerate(((True, 10.0), (False, 0.0))):
        one = np.zeros(1, np.float32)
        masks, actions, ends = np.ones((1, 2), bool), np.zeros(1, int), one + end > 0
        told = (masks, actions, one, one, one + dt, one + 1, ends)
        buffer.store(step, slice(None), one[:, None], *told)
    buffer.finish(column(0, 0), np.array([7], np.float32), column(-6, 0))
    assert buffer.advantages[:, 0] == pytest.approx([-3, 7])


def test_on_a_slow_node_everything_takes_longer_and_counts_the_same() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6, 3)).astype(np.float32)
    found = []
    for pace in (1.0, 5.0):
        buffer = EventTimeRolloutBuffer(
            6,
            spaces.Box(-1, 1, (1,)),
            spaces.Discrete(2),
            "cpu",
            n_envs=3,
            discount_s=15,
            trace_s=6,
        )
        for t in range(6):
            obs, zeros, ones = np.zeros((3, 1), np.float32), np.zeros(3, np.float32), np.ones(3)
            told = (obs, np.ones((3, 2), bool), np.zeros(3, int), zeros, pace * rewards[t])
            buffer.store(t, slice(None), *told, 0.7 * pace * ones, pace * ones, ones > 1)
        buffer.finish(values, values[0], np.zeros((6, 3), np.float32))
        found.append(buffer.advantages.copy())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_minibatches_hold_every_decision_once_with_normal_advantages() -> None:
    buffer = EventTimeRolloutBuffer(
        8, spaces.Box(-1, 1, (2,)), spaces.Discrete(3), "cpu", n_envs=5, discount_s=9, trace_s=9
    )
    for t in range(8):
        marks = (t * 5 + np.arange(5)).astype(np.float32)
        buffer.store(
            t,
            slice(None),
            np.stack((marks, marks), axis=1),
            np.ones((5, 3), bool),
            np.full(5, t % 3),
            marks,
            marks,
            np.ones(5),
            np.ones(5),
            np.zeros(5, bool),
        )
    buffer.finish(
        np.zeros((8, 5), np.float32), np.zeros(5, np.float32), np.zeros((8, 5), np.float32)
    )
    batches = list(buffer.minibatches(16, 6))
    assert [[len(rows) for rows in batch] for batch in batches] == [
        [6, 6, 4],
        [6, 6, 4],
        [6, 2],
    ]
    chunks = [buffer.samples().at(rows) for batch in batches for rows in batch]
    marks = np.concatenate([chunk.old_log_prob.numpy() for chunk in chunks])
    assert sorted(marks.tolist()) == list(range(40))
    for chunk in chunks:
        assert np.array_equal(chunk.observations[:, 0], chunk.old_log_prob)
        assert np.array_equal(chunk.actions, chunk.old_log_prob.numpy() // 5 % 3)
    advantages = np.concatenate([chunk.advantages.numpy() for chunk in chunks])
    assert advantages.mean() == pytest.approx(0, abs=1e-5)
    assert advantages.std() == pytest.approx(1, abs=1e-4)


def test_no_node_has_more_than_its_share_of_the_advantages() -> None:
    rng = np.random.default_rng(0)
    advantages = rng.normal(size=(64, 20)).astype(np.float32)
    wild = advantages * np.where(np.arange(20) == 7, 1000, 1).astype(np.float32)
    values = np.where(np.arange(20) == 7, -1000, -1) * np.ones_like(wild)
    scaled = normalised(wild, values)
    squares = (scaled**2).sum(axis=0)
    assert (wild[:, 7] ** 2).sum() > 0.99 * (wild**2).sum()
    assert squares[7] < 0.3 * squares.sum()
    order = np.argsort(wild, axis=0)
    assert (np.diff(np.take_along_axis(scaled, order, axis=0), axis=0) >= 0).all()
    assert np.allclose(normalised(*np.zeros((2, 3, 2), np.float32)), 0)


def test_a_rare_disaster_weighs_what_it_costs() -> None:
    # Nodes in like states, where a risk gained 1 nine times and cost 12 the tenth: not worth it.
    gained = np.zeros((20, 10), np.float32)
    gained[5] = [1] * 9 + [-12]
    scaled = normalised(gained, np.full_like(gained, -0.5))
    assert scaled[5].mean() < scaled[0, 0]
    others = np.delete(scaled, 5, axis=0)
    assert np.allclose(others, others[0, 0])
