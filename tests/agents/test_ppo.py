import multiprocessing
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch as th
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from mmrl.agents.nodes import NodePlan, Played, TrainingNodes
from mmrl.agents.policy import EquivariantPolicy
from mmrl.agents.ppo import EventTimePPO
from mmrl.agents.processes import NodeProcesses
from mmrl.envs.layout import Layout
from mmrl.envs.sb3 import MultiModelServingVecEnv
from mmrl.errors import MmrlError
from mmrl.node.observe import MODEL_FEATURES, N_GLOBAL, N_MODEL
from mmrl.rules import get_rule
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.schema import Scenario

LAYOUT = Layout(4, full_verbs=False)
PRESENT, QUEUED = MODEL_FEATURES.index("weights"), MODEL_FEATURES.index("queued")
PAUSE = LAYOUT.verbs.index("pause")


class LongestQueue(VecEnv):
    """Pausing the model with the longest queue is right; some wrong actions are illegal."""

    render_mode = None

    def __init__(self) -> None:
        super().__init__(32, LAYOUT.observation_space, LAYOUT.action_space)
        self.last_dt_s = np.full(32, 100.0)  # what comes next hardly counts
        self.rng = np.random.default_rng(0)
        self.illegal = 0

    def _draw(self) -> npt.NDArray[np.float32]:
        models = np.zeros((32, 4, N_MODEL), np.float32)
        models[:, :3, PRESENT] = 0.5
        queues = self.rng.random((32, 3))
        models[:, :3, QUEUED] = queues
        self.right = 1 + queues.argmax(axis=1) * len(LAYOUT.verbs) + PAUSE
        self.masks = self.rng.random((32, LAYOUT.num_actions)) < 0.6
        self.masks[:, 0] = self.masks[np.arange(32), self.right] = True
        return np.concatenate((np.zeros((32, N_GLOBAL), np.float32), models.reshape(32, -1)), 1)

    def reset(self) -> npt.NDArray[np.float32]:
        return self._draw()

    def step_async(self, actions: npt.NDArray[np.int64]) -> None:
        self.illegal += int((~self.masks[np.arange(32), actions]).sum())
        self.rewards = (actions == self.right).astype(np.float32)

    def step_wait(self) -> Any:
        return self._draw(), self.rewards, np.zeros(32, bool), [{} for _ in range(32)]

    def env_method(self, name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [self.masks]

    def has_attr(self, attr_name: str) -> bool:
        return attr_name == "action_masks"

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * 32

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * 32

    def close(self) -> None: ...


def learner(env: VecEnv, layout: Layout, **settings: Any) -> EventTimePPO:
    settings = {"n_steps": 32, "batch_size": 256, "n_epochs": 2, "seed": 0} | settings
    return EventTimePPO(EquivariantPolicy, env, policy_kwargs={"layout": layout}, **settings)


def test_it_finds_a_known_optimum_and_never_does_what_is_illegal() -> None:
    env = LongestQueue()
    model = learner(env, LAYOUT, learning_rate=5e-3)
    model.learn(20 * 32 * 32)
    assert env.illegal == 0
    obs = env.reset()
    actions, _ = model.predict(obs, deterministic=True, action_masks=env.masks)
    assert (actions == env.right).mean() > 0.9


class Script:
    """Two nodes of four whose rollouts are written down; what is seen is one number."""

    def __init__(self, first: int) -> None:
        rng = np.random.default_rng(first)
        self.rows = slice(first, first + 2)
        self.seen = rng.normal(size=(5, 2))  # before each of four decisions, and after
        self.rewards, self.last_seen = rng.normal(size=(4, 2)), rng.normal(size=(4, 2))
        self.dt_s = rng.uniform(0, 20, (4, 2))
        self.dt_s[2] = 0  # a second action at the same instant
        self.stretch = np.array([1.0, 2.5])
        self.ends = np.zeros((4, 2), bool)
        self.ends[1, 1] = self.ends[3, 0] = True
        self.truncated = self.ends & (first == 2)
        self.step_ = 0
        self.last_reward_terms = np.zeros((2, 2))

    @staticmethod
    def observation(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        found = np.zeros((len(values), LAYOUT.actor_size), np.float32)
        found[:, 0] = values
        return found

    @property
    def last_dt_s(self) -> npt.NDArray[np.float64]:
        return self.dt_s[self.step_ - 1]

    def pace(self) -> npt.NDArray[np.float64]:
        return self.stretch

    def action_masks(self) -> npt.NDArray[np.bool_]:
        return np.ones((2, LAYOUT.num_actions), bool)

    def step(self, actions: npt.NDArray[np.int64]) -> Played:
        t, self.step_ = self.step_, self.step_ + 1
        infos = [
            {
                "TimeLimit.truncated": bool(self.truncated[t, n]),
                "terminal_observation": self.observation(self.last_seen[t, n : n + 1])[0],
            }
            for n in range(2)
        ]
        return Played(self.observation(self.seen[t + 1]), self.rewards[t], self.ends[t], infos)


def test_returns_are_those_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over time that is uneven and stretched, past ends that are the world's and the clock's."""
    parts = [Script(0), Script(2)]

    class Two(LongestQueue):
        def __init__(self) -> None:
            VecEnv.__init__(self, 4, LAYOUT.observation_space, LAYOUT.action_space)
            self.parts = parts

        def reset(self) -> npt.NDArray[np.float32]:
            return Script.observation(np.concatenate([part.seen[0] for part in parts]))

    model = learner(Two(), LAYOUT, n_steps=4, batch_size=16, reward_scale=0.5)
    monkeypatch.setattr(model.policy, "predict_values", lambda seen: seen[:, :1])
    _, callback = model._setup_learn(16)
    assert isinstance(model.env, VecEnv)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 4)
    for n in range(4):
        part, k = parts[n // 2], n % 2
        advantage = 0.0
        for t in (3, 2, 1, 0):
            value, following = part.seen[t, k], part.seen[t + 1, k]
            if part.ends[t, k]:  # what follows is another episode
                advantage = 0.0
                following = part.last_seen[t, k] if part.truncated[t, k] else 0.0
            dt_s = part.dt_s[t, k] / part.stretch[k]
            gamma, lam = np.exp(-dt_s / 15), np.exp(-dt_s / 6)
            reward = 0.5 * part.rewards[t, k] / part.stretch[k]
            advantage = reward + gamma * (following + lam * advantage) - value
            found = model.rollout_buffer.returns[t, n]
            assert found == pytest.approx(advantage + value, abs=1e-5), (t, n)


def trained(busy: Scenario, processes: int = 0, **settings: Any) -> dict[str, th.Tensor]:
    plan = NodePlan([busy], 32, get_rule("slack"), privileged=True, seed=0)
    nodes = NodeProcesses(plan, processes) if processes else TrainingNodes(plan)
    model = learner(nodes, nodes.layout, **settings)
    model.learn(2 * 32 * 32)
    nodes.close()
    return {k: v.clone() for k, v in model.policy.state_dict().items()}


def test_the_number_of_threads_changes_nothing(
    busy: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrl.agents.ppo.CHUNK", 64)
    one, three = trained(busy, threads=1), trained(busy, threads=3)
    assert all(th.equal(one[name], three[name]) for name in one)


def test_nor_does_it_matter_whether_processes_play(busy: Scenario) -> None:
    here, apart = trained(busy), trained(busy, processes=1)
    assert all(th.equal(here[name], apart[name]) for name in here)


def test_a_process_that_fails_or_dies_is_told() -> None:
    connection, theirs = multiprocessing.Pipe()
    nodes = NodeProcesses(NodePlan([get_scenario("demo")], 16, None, False, 0), processes=1)
    nodes._started = [(None, connection)]
    theirs.send((False, "Traceback: no room"))
    with pytest.raises(MmrlError, match="failed: Traceback: no room"):
        nodes.reset()
    theirs.close()
    with pytest.raises(MmrlError, match="died"):
        nodes.reset()


def test_a_large_value_loss_does_not_freeze_the_policy() -> None:
    def first_update(scale: float) -> dict[str, th.Tensor]:
        model = learner(LongestQueue(), LAYOUT, reward_scale=scale, n_epochs=1)
        model.learn(32 * 32)
        return model.policy.actor.state_dict()

    small, large = first_update(1.0), first_update(1024.0)
    for name in ("verbs.weight", "wait.weight"):  # zero before; the first update moves them
        assert small[name].abs().max() > 1e-4
        assert th.allclose(small[name], large[name], rtol=0.2, atol=1e-4)


def test_while_the_critic_learns_alone_the_actor_is_not_touched() -> None:
    model = learner(LongestQueue(), LAYOUT, critic_first=1)
    before = {name: value.clone() for name, value in model.policy.actor.state_dict().items()}
    critic = [value.clone() for value in model.policy.critic.parameters()]
    model.learn(32 * 32)
    assert all(th.equal(model.policy.actor.state_dict()[name], before[name]) for name in before)
    assert not all(map(th.equal, critic, model.policy.critic.parameters()))
    # Nor are the averages of its gradients: its first step is the first of all.
    state = model.policy.optimizer.state
    assert not any(parameter in state for parameter in model.policy.actor.parameters())
    model.learn(32 * 32)
    steps = {int(state[parameter]["step"]) for parameter in model.policy.actor.parameters()}
    assert steps == {2 * 32 * 32 // 256}


def test_the_price_of_a_deviation_grows_with_the_pace_of_a_node() -> None:
    model = learner(LongestQueue(), LAYOUT, ent_coef=0.01)
    model.learn(32 * 32)
    samples = model.rollout_buffer.samples()
    alone = samples._replace(advantages=th.zeros_like(samples.advantages))  # nothing to be gained
    actor = list(model.policy.actor.parameters())
    quick, slow = (
        model._gradients(alone._replace(pace=th.full_like(alone.pace, pace)), actor, True)[0]
        for pace in (1.0, 3.0)
    )
    assert max(gradient.abs().max() for gradient in quick) > 1e-3
    for once, thrice in zip(quick, slow, strict=True):
        assert th.allclose(3 * once, thrice, rtol=1e-3, atol=1e-5)


def test_callbacks_see_every_step_and_can_stop(busy: Scenario) -> None:
    class Count(BaseCallback):
        steps = rollouts = 0

        def _on_step(self) -> bool:
            self.steps += 1
            return self.steps < 40

        def _on_rollout_end(self) -> None:
            self.rollouts += 1

    nodes = TrainingNodes(NodePlan([busy], 16, None, privileged=False, seed=0))
    model, count = learner(nodes, nodes.layout), Count()
    model.learn(10_000, count)
    nodes.close()
    assert (count.steps, count.rollouts) == (40, 1)
    assert model.num_timesteps == 40 * 16
    assert len(model.ep_info_buffer or ()) > 0


@pytest.mark.parametrize("kind", ["mlp", "equivariant"])
def test_stock_maskable_ppo_trains_on_the_environment(kind: str, busy: Scenario) -> None:
    env = MultiModelServingVecEnv(8, busy, suggestion="slack", privileged=True, seed=0)
    policy: Any = "MlpPolicy"
    settings: dict[str, Any] = {"n_steps": 32, "batch_size": 64, "n_epochs": 1, "seed": 0}
    if kind == "equivariant":
        policy = EquivariantPolicy
        settings["policy_kwargs"] = {"layout": env.layout}
    model = MaskablePPO(policy, env, device="cpu", **settings)
    model.learn(512)
    obs = env.reset()
    masks = env.action_masks()
    actions, _ = model.predict(obs, action_masks=masks)
    assert masks[np.arange(8), actions].all()


def test_plain_ppo_trains_on_the_environment(busy: Scenario) -> None:
    env = MultiModelServingVecEnv(8, busy, seed=0)
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=64, n_epochs=1, seed=0, device="cpu")
    model.learn(512)
    assert model.num_timesteps == 512
