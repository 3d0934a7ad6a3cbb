import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import mmrl  # noqa: F401
from mmrl.envs.env import MultiModelServingEnv
from mmrl.envs.wrappers import MaskInObservation
from mmrl.errors import InputError
from mmrl.node.observe import GLOBAL_FEATURES, MODEL_FEATURES
from mmrl.rules.dispatch import act
from mmrl.scenarios.schema import Scenario

ID = "mmrl/MultiModelServing-v0"


def play(env: Any, seed: int, steps: int, choices: int = 0) -> list[Any]:
    """Reset with seed, then do random legal actions; return all that came back."""
    rng = np.random.default_rng(choices)
    seen: list[Any] = [env.reset(seed=seed)]
    for _ in range(steps):
        action = rng.choice(np.flatnonzero(env.get_wrapper_attr("action_masks")()))
        seen.append(env.step(action))
        if seen[-1][2] or seen[-1][3]:
            seen.append(env.reset())
    return seen


def test_gymnasium_and_sb3_accept_the_environment(busy: Scenario) -> None:
    env = gym.make(ID, scenario=busy).unwrapped
    check_env(env)
    sb3_check_env(env)
    check_env(gym.make(ID, scenario=busy, suggestion="slack", privileged=True).unwrapped)


@pytest.mark.parametrize("scenario", ["busy", "full"])
def test_same_seed_same_bytes(scenario: str, request: pytest.FixtureRequest) -> None:
    chosen = request.getfixturevalue(scenario)
    one, two = MultiModelServingEnv(chosen), MultiModelServingEnv(chosen)
    first = play(one, seed=3, steps=150)
    assert data_equivalence(first, play(two, seed=3, steps=150), exact=True)
    assert data_equivalence(first, play(one, seed=3, steps=150), exact=True)
    assert not data_equivalence(first, play(one, seed=4, steps=150))


@pytest.mark.parametrize("scenario", ["busy", "full"])
def test_observations_stay_in_range_and_waiting_stays_legal(
    scenario: str, request: pytest.FixtureRequest
) -> None:
    chosen = request.getfixturevalue(scenario)
    env = MultiModelServingEnv(chosen, max_models=8, suggestion="slack", privileged=True)
    for seed in range(3):
        for observation, *_, info in play(env, seed, steps=200, choices=seed):
            assert np.isfinite(observation).all()
            assert observation in env.observation_space
            assert info["action_mask"][0] == 1
            assert info["action_mask"][1 + 6 * len(env.layout.verbs) :].sum() == 0


def test_rendering_does_not_change_the_episode(busy: Scenario) -> None:
    watched = MultiModelServingEnv(busy, render_mode="rgb_array")
    plain = MultiModelServingEnv(busy)
    assert data_equivalence(play(watched, 5, 120), play(plain, 5, 120), exact=True)


def test_reset_without_seed_goes_on_with_the_stream(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy)
    first = [env.reset(seed=0)[0], env.reset()[0], env.reset()[0]]
    again = [env.reset(seed=0)[0], env.reset()[0], env.reset()[0]]
    assert data_equivalence(first, again, exact=True)
    assert not np.array_equal(first[0], first[1])


def test_an_illegal_action_waits_and_is_counted(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy)
    env.reset(seed=1)
    twin = copy.deepcopy(env)
    illegal = int(np.flatnonzero(~env.action_masks())[0])
    waited, obeyed = twin.step(0), env.step(illegal)
    assert waited[4].pop("illegal_actions") == 0
    assert obeyed[4].pop("illegal_actions") == 1
    assert data_equivalence(waited, obeyed, exact=True)


def test_strict_raises_and_names_the_action(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy, strict=True)
    env.reset(seed=1)
    illegal = int(np.flatnonzero(~env.action_masks())[0])
    with pytest.raises(InputError, match=env.action_names[illegal]):
        env.step(illegal)
    with pytest.raises(InputError, match="99999"):
        env.step(99999)
    env.step(0)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_from_the_future_is_observed(busy: Scenario, seed: int) -> None:
    env = MultiModelServingEnv(busy, suggestion="slack", privileged=True)
    play(env, seed, steps=3 + 3 * seed)
    mask, seen = env.action_masks(), env.batch.observe()[0]
    node, requests = env.batch.simulator.nodes[0], env.batch.simulator.requests[0]
    coming = requests[int(node.next_arrival) : int(node.n_requests)]
    assert len(coming)
    coming["arrival_ns"] += 123_456_789
    coming["model"] = (coming["model"] + 1) % int(node.n_models)
    for field in ("prompt", "output", "ttft_ns", "tpot_ns", "isolated_ns"):
        coming[field] *= 3
    unended = requests[: int(node.next_arrival)]
    unended["output"][unended["finish_ns"] < 0] += 1_000  # unknown too until it has ended
    changed = env.batch.observe()[0]
    actor = env.layout.actor_size
    np.testing.assert_array_equal(seen[:actor], changed[:actor])
    np.testing.assert_array_equal(mask, env.action_masks())
    assert not np.array_equal(seen[actor:], changed[actor:])  # the critic's block is the future


def test_an_episode_ends_with_metrics_and_reward_terms_add_up(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy)
    env.reset(seed=2)
    misses, time_s, done = 0.0, None, False
    while not done:
        _, reward, terminated, truncated, info = env.step(0)
        assert reward == info["miss_reward"] + info["latency_reward"]
        assert time_s is None or info["time_s"] == pytest.approx(time_s + info["dt"])
        misses, time_s, done = misses - info["miss_reward"], info["time_s"], terminated or truncated
    # Nothing is ever loaded: time runs out, and every request misses its first token.
    assert truncated and not terminated
    assert info["time_s"] == 14.0
    assert info["metrics"]["goodput"] == 0.0
    assert misses <= info["metrics"]["requests"] == env.episode.requests


def test_options_choose_frozen_episodes_and_load(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy)
    dev = env.reset(seed=1, options={"split": "dev", "episode": 7})[0]
    assert np.array_equal(dev, env.reset(seed=2, options={"episode": 7})[0])
    assert not np.array_equal(dev, env.reset(options={"split": "test", "episode": 7})[0])
    env.reset(options={"load": 0.25})
    assert env.episode.load == 0.25
    with pytest.raises(InputError, match="episode"):
        env.reset(options={"split": "dev"})
    with pytest.raises(InputError, match="laod"):
        env.reset(options={"laod": 1.0})


def test_names_and_numbers_of_actions_agree(full: Scenario) -> None:
    env = MultiModelServingEnv(full, suggestion="slack", privileged=True)
    assert len(env.feature_names) == len(set(env.feature_names)) == env.observation_space.shape[0]
    assert len(env.action_names) == env.action_space.n
    assert env.decode(0) is None
    for action in range(1, int(env.action_space.n)):
        model, verb = env.decode(action)
        assert env.encode(model, verb) == action
        assert env.action_names[action] == f"model{model}.{verb}"
    with pytest.raises(InputError, match="level100"):
        env.encode(0, "level10")
    with pytest.raises(InputError, match="6"):
        env.encode(6, "out")


def test_padding_adds_zeros_and_nothing_else(busy: Scenario) -> None:
    small, wide = MultiModelServingEnv(busy), MultiModelServingEnv(busy, max_models=9)
    a, b = small.reset(seed=4)[0], wide.reset(seed=4)[0]
    np.testing.assert_array_equal(a, b[: len(a)])
    assert not b[len(a) :].any()
    with pytest.raises(InputError, match="max_models"):
        MultiModelServingEnv(busy, max_models=5)


def test_the_suggestion_is_the_action_of_the_rule(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy, suggestion={"name": "slack", "patience": 0.7})
    rule, simulator = env.batch.rule, env.batch.simulator
    assert rule.patience == 0.7
    observation, _ = env.reset(seed=6)
    taken = set()
    for _ in range(100):
        suggested = np.flatnonzero(observation[env.layout.public_size :])
        tables = simulator.decode_tables, simulator.prefill_tables
        assert suggested == [act(rule, simulator.nodes[0], simulator.requests[0], *tables)]
        taken.add(int(suggested[0]))
        observation, _, terminated, truncated, _ = env.step(suggested[0])
        if terminated or truncated:
            observation, _ = env.reset()
    assert len(taken) > 3


def test_a_copy_goes_on_alike(busy: Scenario) -> None:
    env = MultiModelServingEnv(busy, suggestion="slack")
    play(env, 8, 30)
    twin = pickle.loads(pickle.dumps(env))
    for _ in range(20):
        assert data_equivalence(env.step(0), twin.step(0), exact=True)
    assert data_equivalence(env.reset(), twin.reset(), exact=True)


def test_the_spec_survives_json() -> None:
    env = gym.make(ID, scenario="demo", max_models=8, suggestion={"name": "slack"})
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.spec.kwargs == env.spec.kwargs
    assert again.observation_space == env.observation_space


def test_the_page_names_every_feature_and_argument() -> None:
    page = MultiModelServingEnv.__doc__
    for name in (*GLOBAL_FEATURES, *MODEL_FEATURES, *MultiModelServingEnv.__init__.__annotations__):
        assert f"`{name}`" in page or name == "return", name
    assert f"({len(GLOBAL_FEATURES)} + {len(MODEL_FEATURES)} * max_models,)" in page


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(InputError, match="demo"):
        MultiModelServingEnv("dmeo")
    with pytest.raises(InputError, match="slack"):
        MultiModelServingEnv("demo", suggestion="slak")
    with pytest.raises(InputError, match="human"):
        MultiModelServingEnv("demo", render_mode="human")
    with pytest.raises(gym.error.ResetNeeded):
        MultiModelServingEnv("demo").step(0)


def test_the_mask_can_be_observed(busy: Scenario) -> None:
    env = MaskInObservation(gym.make(ID, scenario=busy))
    observation, info = env.reset(seed=0)
    for _ in range(30):
        assert observation in env.observation_space
        np.testing.assert_array_equal(observation["action_mask"], info["action_mask"])
        action = env.action_space.sample(mask=observation["action_mask"])
        observation, *_, info = env.step(action)
