"""`EventTimePPO`: maskable PPO for decisions that lie unevenly in time, lean enough for two cores.

It differs from `MaskablePPO` in three ways. Discount and trace decay go by elapsed time (see
`EventTimeRolloutBuffer`), truncation included. Actor and critic have their gradients clipped apart,
so that a large value loss cannot freeze the policy. And it spends its time well: while a rollout is
collected only the actor runs, the critic sees all of it at once; minibatches are large, and are
worked through in chunks that stay in the processor's cache, on one thread or several.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch.nn import functional as F

from mmrl.agents.buffer import EventTimeRolloutBuffer, Floats, Samples
from mmrl.agents.policy import EquivariantPolicy

CHUNK = 1024  # decisions whose activations fit the cache
STATISTICS = ("policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction")


class EventTimePPO(MaskablePPO):
    """Maskable PPO with discount by elapsed time, for an environment that tells ``last_dt_s``.

    Args:
        policy: The policy class.
        env: A VecEnv with ``last_dt_s`` float64[N], the simulated seconds of the last step.
        discount_s: Time constant of the discount.
        trace_s: Time constant of the trace decay, the lambda of the advantages.
        reward_scale: Rewards are multiplied by it, so that values are about 1.
        threads: Threads that learn; each works on a chunk of its own, and the sum of their
            gradients does not depend on their number.
        **kwargs: Of `MaskablePPO`; ``gamma``, ``gae_lambda``, ``clip_range_vf``, ``target_kl`` and
            ``normalize_advantage`` are not used.

    Attributes:
        seconds: Wall-clock time spent with the environment, the policy and learning.
        time_left: Where training ends by the clock, the share of its time that is left: schedules
            follow it when it is ahead of the steps.
    """

    policy: EquivariantPolicy
    rollout_buffer: EventTimeRolloutBuffer

    def __init__(
        self,
        policy: type[EquivariantPolicy],
        env: VecEnv,
        *,
        discount_s: float = 15.0,
        trace_s: float = 6.0,
        reward_scale: float = 0.1,
        threads: int = 1,
        **kwargs: Any,
    ) -> None:
        self.reward_scale = reward_scale
        self.threads = threads
        self.time_left: Callable[[], float] | None = None
        self.seconds = dict.fromkeys(("env", "policy", "learn"), 0.0)
        constants = {"discount_s": discount_s, "trace_s": trace_s}
        super().__init__(
            policy,
            env,
            rollout_buffer_class=EventTimeRolloutBuffer,
            rollout_buffer_kwargs=constants,
            device="cpu",
            **kwargs,
        )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "seconds", "time_left"]

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        if self.time_left is not None:
            left = max(0.0, min(self._current_progress_remaining, self.time_left()))
            self._current_progress_remaining = left

    @contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
        use_masking: bool = True,
    ) -> bool:
        """Play ``n_rollout_steps`` decisions of every node into the buffer.

        Args:
            env: The environment.
            callback: Called at each step.
            rollout_buffer: Filled.
            n_rollout_steps: Decisions per node.
            use_masking: Whether illegal actions are masked; they always are.

        Returns:
            Whether to go on; False when the callback said stop.
        """
        assert isinstance(rollout_buffer, EventTimeRolloutBuffer) and use_masking
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        ended: list[tuple[int, int]] = []  # step and node of truncated episodes ...
        last_seen: list[Floats] = []  # ... and their last observations
        observations = self._last_obs
        for step in range(n_rollout_steps):
            assert isinstance(observations, np.ndarray)
            with self._clock("env"):
                masks = get_action_masks(env)
            with self._clock("policy"), th.no_grad():
                drawn, log_probs = self.policy.sample(th.from_numpy(observations), masks)
                actions = drawn.numpy()
            with self._clock("env"):
                following, rewards, dones, infos = env.step(actions)
            self.num_timesteps += env.num_envs
            for i in np.flatnonzero(dones):
                if infos[i].get("TimeLimit.truncated", False):
                    ended.append((step, int(i)))
                    last_seen.append(infos[i]["terminal_observation"])
            with self._clock("policy"):
                rollout_buffer.store(
                    observations,
                    masks.reshape(env.num_envs, -1),
                    actions,
                    log_probs.numpy(),
                    rewards * self.reward_scale,
                    env.last_dt_s,  # type: ignore[attr-defined]
                    dones,
                )
            assert isinstance(following, np.ndarray)
            observations = self._last_obs = following
            self._last_episode_starts = dones
            self._update_info_buffer([infos[i] for i in np.flatnonzero(dones)])
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        with self._clock("policy"):
            self._finish_rollout(rollout_buffer, ended, last_seen)
        callback.on_rollout_end()
        return True

    def _finish_rollout(
        self,
        buffer: EventTimeRolloutBuffer,
        ended: list[tuple[int, int]],
        last_seen: list[Floats],
    ) -> None:
        """Value all observations of a rollout in one go, and have the advantages computed."""
        bootstrap = np.zeros((buffer.buffer_size, buffer.n_envs), np.float32)
        if ended:
            steps, nodes = zip(*ended, strict=True)
            bootstrap[list(steps), list(nodes)] = self._values(np.stack(last_seen))
        assert isinstance(self._last_obs, np.ndarray)
        values = self._values(buffer.observations.reshape(-1, buffer.observations.shape[-1]))
        buffer.finish(values.reshape(bootstrap.shape), self._values(self._last_obs), bootstrap)

    def _values(self, observations: Floats) -> Floats:
        chunks = th.split(th.from_numpy(observations), CHUNK)
        with ThreadPoolExecutor(self.threads) as pool:
            values: Floats = th.cat(list(pool.map(self._chunk_values, chunks))).numpy()
        return values.reshape(-1)

    def _chunk_values(self, observations: th.Tensor) -> th.Tensor:
        with th.no_grad():  # is a property of the thread
            return self.policy.predict_values(observations)

    def train(self) -> None:
        """Update actor and critic on the rollout."""
        with self._clock("learn"), ThreadPoolExecutor(self.threads) as pool:
            self._train(pool)

    def _train(self, pool: ThreadPoolExecutor) -> None:
        policy = self.policy
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        parameters = list(policy.parameters())
        samples = self.rollout_buffer.samples()
        statistics: list[th.Tensor] = []

        def gradients_of(rows: th.Tensor) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
            return self._gradients(samples.at(rows), parameters)

        for _ in range(self.n_epochs):
            assert self.batch_size is not None
            for batch in self.rollout_buffer.minibatches(self.batch_size, CHUNK):
                size = sum(map(len, batch))
                results = pool.map(gradients_of, batch)
                total: tuple[th.Tensor, ...] = ()
                for gradients, found in results:
                    total = (
                        tuple(map(th.add, total, gradients)) if total else gradients
                    )  # in the order of the chunks: the same sum on any number of threads
                    statistics.append(found)
                for parameter, gradient in zip(parameters, total, strict=True):
                    parameter.grad = gradient / size
                for network in (policy.actor, policy.critic):
                    th.nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm)
                policy.optimizer.step()
            self._n_updates += 1
        decisions = self.n_epochs * self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs
        self._record(th.stack(statistics).sum(0) / decisions)

    def _gradients(
        self, chunk: Samples, parameters: list[th.nn.Parameter]
    ) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
        """Return the gradients of the loss summed over a chunk, and the sums of `STATISTICS`."""
        values, log_prob, entropy = self.policy.evaluate_actions(
            chunk.observations, chunk.actions, chunk.action_masks
        )
        log_ratio = log_prob - chunk.old_log_prob
        ratio = log_ratio.exp()
        clip = self._clip_range()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        policy_loss = -th.min(chunk.advantages * ratio, chunk.advantages * clipped).sum()
        value_loss = F.mse_loss(values.flatten(), chunk.returns, reduction="sum")
        entropy_loss = -entropy.sum()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
        gradients = th.autograd.grad(loss, parameters)
        with th.no_grad():
            kl = (ratio - 1 - log_ratio).sum()  # Schulman's estimate of the KL divergence
            outside = ((ratio - 1).abs() > clip).float().sum()
            found = th.stack((policy_loss, value_loss, entropy_loss, kl, outside))
        return gradients, found

    def _clip_range(self) -> float:
        schedule: Any = self.clip_range
        return float(schedule(self._current_progress_remaining))

    def _record(self, means: th.Tensor) -> None:
        buffer = self.rollout_buffer
        for name, mean in zip(STATISTICS, means.tolist(), strict=True):
            self.logger.record(f"train/{name}", mean)
        explained = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        self.logger.record("train/explained_variance", float(explained))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.policy.actor.beta is not None:
            self.logger.record("train/beta", self.policy.actor.beta.item())

    def action_counts(self) -> npt.NDArray[np.int64]:
        """Return how often each action was taken in the last rollout, int64[A]."""
        buffer = self.rollout_buffer
        return np.bincount(buffer.actions.ravel(), minlength=buffer.mask_dims)
