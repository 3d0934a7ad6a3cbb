from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

import mmrl  # noqa: F401
from mmrl.envs.env import MultiModelServingEnv
from mmrl.envs.sb3 import MultiModelServingVecEnv
from mmrl.envs.vector import MultiModelServingVectorEnv
from mmrl.errors import InputError
from mmrl.scenarios.schema import Scenario

ID = "mmrl/MultiModelServing-v0"
N = 3
STEPS = 400  # several episodes each


def legal(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])


def test_vector_equals_gymnasiums_sync_vector_of_scalars(busy: Scenario) -> None:
    ours = gym.make_vec(ID, num_envs=N, scenario=busy)
    sync = gym.make_vec(
        ID,
        num_envs=N,
        scenario=busy,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )
    assert isinstance(ours, MultiModelServingVectorEnv)
    assert ours.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert ours.observation_space == sync.observation_space
    assert ours.action_space == sync.action_space
    rng = np.random.default_rng(0)
    seen = ours.reset(seed=11)
    assert data_equivalence(seen, sync.reset(seed=11), exact=True)
    endings = 0
    for _ in range(STEPS):
        actions = legal(ours.action_masks(), rng)
        seen = ours.step(actions)
        assert data_equivalence(seen, sync.step(actions), exact=True)
        endings += int((seen[2] | seen[3]).sum())
    assert endings > N
    assert data_equivalence(ours.reset(), sync.reset(), exact=True)


def test_sb3_vec_env_equals_scalars(busy: Scenario) -> None:
    ours = MultiModelServingVecEnv(N, busy)
    each = DummyVecEnv([lambda: MultiModelServingEnv(busy)] * N)
    ours.seed(11)
    each.seed(11)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(ours.reset(), each.reset())
    endings = 0
    for _ in range(STEPS):
        actions = legal(ours.action_masks(), rng)
        (obs, rewards, dones, infos), others = ours.step(actions), each.step(actions)
        np.testing.assert_array_equal(obs, others[0])
        np.testing.assert_array_equal(rewards, others[1])
        np.testing.assert_array_equal(dones, others[2])
        for i in range(N):
            assert ours.last_dt_s[i] == others[3][i]["dt"]
            if not dones[i]:
                assert infos[i] == {}
                continue
            endings += 1
            for key in ("terminal_observation", "TimeLimit.truncated"):
                assert data_equivalence(infos[i][key], others[3][i][key], exact=True)
            assert infos[i]["episode"].items() >= others[3][i]["metrics"].items()
    assert endings > N


def test_results_do_not_depend_on_the_number_of_environments(busy: Scenario) -> None:
    few, many = MultiModelServingVectorEnv(2, busy), MultiModelServingVectorEnv(7, busy)
    first, second = few.reset(seed=5)[0], many.reset(seed=5)[0]
    for _ in range(100):
        np.testing.assert_array_equal(first, second[:2])
        actions = np.array([np.flatnonzero(mask)[-1] for mask in many.action_masks()])
        first, second = few.step(actions[:2])[0], many.step(actions)[0]


@pytest.mark.parametrize("kind", [MultiModelServingVectorEnv, MultiModelServingVecEnv])
def test_what_was_handed_out_never_changes(kind: type[Any], busy: Scenario) -> None:
    env = kind(N, busy, suggestion="slack", privileged=True)
    first = env.reset()
    kept = [first if isinstance(first, np.ndarray) else first[0]]
    copies = [kept[0].copy()]
    rng = np.random.default_rng(1)
    for _ in range(60):
        masks = env.action_masks()
        back = env.step(legal(masks, rng))
        arrays = [masks, *back[:3], env.last_dt_s, env.last_reward_terms]
        kept += arrays
        copies += [array.copy() for array in arrays]
    for array, copied in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copied)


def test_masks_travel_to_sb3_as_one_array(busy: Scenario) -> None:
    env = MultiModelServingVecEnv(N, busy)
    env.reset()
    assert is_masking_supported(env)
    masks = get_action_masks(env)  # MaskablePPO reshapes it to (N, num_actions)
    assert masks.shape == (1, N, env.action_space.n)
    np.testing.assert_array_equal(masks[0], env.action_masks())
    np.testing.assert_array_equal(
        env.env_method("action_masks", indices=[2])[0], env.action_masks()[2:]
    )


def test_ppo_and_maskable_ppo_learn_on_it(busy: Scenario) -> None:
    env = MultiModelServingVecEnv(4, busy, split="train", seed=1, stagger=True)
    settings: dict[str, Any] = {"n_steps": 64, "batch_size": 128, "n_epochs": 1, "device": "cpu"}
    model = MaskablePPO("MlpPolicy", env, seed=1, **settings)
    model.learn(512)
    assert env.batch.field("illegal_actions").sum() == 0
    assert {"r", "l", "t", "goodput"} <= model.ep_info_buffer[0].keys()
    PPO("MlpPolicy", env, **settings).learn(256)
    scalar = MaskablePPO("MlpPolicy", MultiModelServingEnv(busy), **settings).learn(128)
    assert scalar.num_timesteps == 128


def test_streams_of_splits_and_seeds_are_apart_and_repeat(busy: Scenario) -> None:
    def first(**options: Any) -> np.ndarray:
        return MultiModelServingVecEnv(2, busy, **options).reset()

    train = first(split="train", seed=3)
    np.testing.assert_array_equal(train, first(split="train", seed=3))
    for other in (first(split="dev", seed=3), first(split="train", seed=4), first(seed=3)):
        assert not np.array_equal(train, other)
    assert not np.array_equal(train[0], train[1])
    with pytest.raises(InputError, match="train"):
        MultiModelServingVecEnv(2, busy, split="trian")


def test_staggered_first_episodes_end_one_by_one(busy: Scenario) -> None:
    env = MultiModelServingVecEnv(4, busy, seed=0, stagger=True)
    env.reset()
    ends: list[list[float]] = [[] for _ in range(4)]
    clock = env.batch.field("now_ns") * 1e-9
    while min(len(end) for end in ends) < 2:
        _, _, dones, infos = env.step(np.zeros(4, np.int64))  # nothing is served: all truncated
        clock += env.last_dt_s
        for i in np.flatnonzero(dones):
            assert infos[i]["TimeLimit.truncated"]
            shortened = not ends[i] and i < 3
            assert ("episode" in infos[i]) is not shortened
            ends[i].append(clock[i])
            clock[i] = env.batch.field("now_ns")[i] * 1e-9
    assert [end[0] for end in ends] == pytest.approx([3.5, 7.0, 10.5, 14.0])
    assert [end[1] for end in ends] == pytest.approx([14.0] * 4)


def test_wrong_use_is_explained(busy: Scenario) -> None:
    env = MultiModelServingVectorEnv(2, busy)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(2, np.int64))
    with pytest.raises(InputError, match="3 seeds for 2"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(InputError, match="num_envs"):
        MultiModelServingVectorEnv(0, busy)
