"""`EventTimePPO`: maskable PPO for decisions that lie unevenly in time, lean enough for two cores.

It differs from `MaskablePPO` in four ways. Discount and trace decay go by elapsed time (see
`EventTimeRolloutBuffer`), truncation included. Actor and critic have their gradients clipped apart,
so that a large value loss cannot freeze the policy. Where the policy is a residual on a rule, it is
not its entropy that is rewarded but its nearness to the rule (`Actor.divergence`): where nothing is
to be gained, noise would lead away from it, the more so where loads take seconds. And it spends its
time well: each part of the environment plays its rollout on a thread of its own, simulation and
policy in turn, and waits for no other; meanwhile only the actor runs, the critic sees the whole
rollout at once; minibatches are large, and are worked through in chunks that stay in the
processor's cache, on one thread or several, or as a whole on a GPU.
"""

import copy
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from sb3_contrib import MaskablePPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch.nn import functional as F

from mmrl.agents.buffer import EventTimeRolloutBuffer, Floats, Samples
from mmrl.agents.playing import Players, Rolled, Whole, play_part
from mmrl.agents.policy import EquivariantPolicy, of_actions
from mmrl.agents.processes import NodeProcesses

CHUNK = 1024  # decisions whose activations fit the cache
GPU_CHUNK = 2**16  # observations that are valued at once on a GPU
STATISTICS = ("policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction")


class EventTimePPO(MaskablePPO):
    """Maskable PPO with discount by elapsed time, for an environment that tells ``last_dt_s``.

    Args:
        policy: The policy class.
        env: A VecEnv with ``last_dt_s`` float64[N], the simulated seconds of the last step, and
            maybe ``parts`` (see `Players`), whose generators of random numbers are their own.
        discount_s: Time constant of the discount.
        trace_s: Time constant of the trace decay, the lambda of the advantages.
        elapsed_time: Discount by the time between decisions; else every decision counts as
            the mean of the rollout.
        reward_scale: Rewards are multiplied by it, so that values are about 1.
        clip_apart: Clip the gradients of actor and critic each by its own norm.
        critic_first: Iterations in which only the critic learns.
        threads: Threads that play and learn; each works on a part or a chunk of its own, and
            neither rollouts nor the sum of gradients depend on their number.
        **kwargs: Of `MaskablePPO`; ``gamma``, ``gae_lambda``, ``clip_range_vf``, ``target_kl`` and
            ``normalize_advantage`` are not used.

    Attributes:
        seconds: Wall-clock time spent with the environment, the policy and learning.
        time_left: Where training ends by the clock, the share of its time that is left: schedules
            follow it when it is ahead of the steps.
        stopped: Set by a callback at the start of a rollout: training ends before it.
        reward_terms: Sums of the parts of the rewards of the last rollout, float64[2].
        generators: One for each part; actions are drawn from them.
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
        elapsed_time: bool = True,
        reward_scale: float = 0.1,
        clip_apart: bool = True,
        critic_first: int = 0,
        threads: int = 1,
        device: str = "cpu",
        **kwargs: Any,
    ) -> None:
        self.reward_scale = reward_scale
        self.clip_apart, self.critic_first = clip_apart, critic_first
        self.threads = threads
        self.time_left: Callable[[], float] | None = None
        self.stopped = False
        self.seconds = dict.fromkeys(("env", "policy", "learn"), 0.0)
        self.reward_terms = np.zeros(2)
        constants: dict[str, Any] = {
            "discount_s": discount_s,
            "trace_s": trace_s,
            "elapsed_time": elapsed_time,
        }
        if isinstance(env, NodeProcesses):
            constants["allocate"] = env.allocate
        super().__init__(
            policy,
            env,
            rollout_buffer_class=EventTimeRolloutBuffer,
            rollout_buffer_kwargs=constants,
            device=device,
            **kwargs,
        )
        self._parts: list[Players] = getattr(self.env, "parts", None) or [Whole(env)]
        count = self.env.count if isinstance(self.env, NodeProcesses) else len(self._parts)
        self.generators = [
            th.Generator().manual_seed((self.seed or 0) * 1000 + k) for k in range(count)
        ]
        self._on_gpu = self.device.type != "cpu"
        self._observations = th.empty(0)  # of the last rollout, where the network learns
        # Nodes are played on the processor, with a copy of the actor where that learns elsewhere.
        actor = self.policy.actor
        self._player = copy.deepcopy(actor).to("cpu") if self._on_gpu else actor

    def _excluded_save_params(self) -> list[str]:
        own = ["seconds", "time_left", "generators", "_parts", "_player", "_observations"]
        return [*super()._excluded_save_params(), *own]

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
        if self.stopped:
            return False
        if self._on_gpu:
            self._player.load_state_dict(self.policy.actor.state_dict())
        rolled = self._play(rollout_buffer, n_rollout_steps)
        for step in range(n_rollout_steps):
            self.num_timesteps += env.num_envs
            self._update_info_buffer([info for part in rolled for info in part.infos[step]])
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        with self._clock("policy"):
            self._observations = rollout_buffer.flat("observations").to(self.device)
            self._finish_rollout(rollout_buffer, rolled)
        callback.on_rollout_end()
        return True

    def _play(self, buffer: EventTimeRolloutBuffer, steps: int) -> list[Rolled]:
        """Have each part play its rollout; threads take the parts in turn, or processes do."""
        observations = self._last_obs
        assert isinstance(observations, np.ndarray)

        def play(k: int) -> Rolled:
            part = self._parts[k]
            first = observations[part.rows]
            settings = buffer, steps, self.reward_scale
            return play_part(part, self._player, self.generators[k], first, *settings)

        began_s = time.perf_counter()
        if isinstance(self.env, NodeProcesses):
            rolled = self.env.play(pickle.dumps(self._player), self.generators, self.reward_scale)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                rolled = list(pool.map(play, range(len(self._parts))))
        spent_s = time.perf_counter() - began_s
        env_s, policy_s = (sum(part.seconds[k] for part in rolled) for k in range(2))
        self.seconds["env"] += spent_s * env_s / (env_s + policy_s)
        self.seconds["policy"] += spent_s * policy_s / (env_s + policy_s)
        self._last_obs = np.concatenate([part.last for part in rolled])
        self.reward_terms = sum((part.reward_terms for part in rolled), np.zeros(2))
        return rolled

    def _finish_rollout(self, buffer: EventTimeRolloutBuffer, rolled: list[Rolled]) -> None:
        """Value all observations of a rollout in one go, and have the advantages computed."""
        bootstrap = np.zeros((buffer.buffer_size, buffer.n_envs), np.float32)
        ended = [place for part in rolled for place in part.ended]
        if ended:
            steps, nodes = zip(*ended, strict=True)
            last_seen = np.stack([seen for part in rolled for seen in part.last_seen])
            bootstrap[list(steps), list(nodes)] = self._values(th.from_numpy(last_seen))
        assert isinstance(self._last_obs, np.ndarray)
        values = self._values(self._observations).reshape(bootstrap.shape)
        buffer.finish(values, self._values(th.from_numpy(self._last_obs)), bootstrap)

    def _values(self, observations: th.Tensor) -> Floats:
        chunks = th.split(observations, GPU_CHUNK if self._on_gpu else CHUNK)
        with ThreadPoolExecutor(1 if self._on_gpu else self.threads) as pool:
            values: Floats = th.cat(list(pool.map(self._chunk_values, chunks))).numpy()
        return values.reshape(-1)

    def _chunk_values(self, observations: th.Tensor) -> th.Tensor:
        with th.no_grad():  # is a property of the thread
            return self.policy.predict_values(observations.to(self.device)).cpu()

    def train(self) -> None:
        """Update actor and critic on the rollout."""
        with (
            self._clock("learn"),
            ThreadPoolExecutor(1 if self._on_gpu else self.threads) as pool,
        ):
            self._train(pool)

    def _train(self, pool: ThreadPoolExecutor) -> None:
        policy = self.policy
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        # While only the critic learns the actor has no gradients at all: zeros would age Adam's
        # averages, and its first steps would be two to three times too long.
        acting = self._n_updates >= self.critic_first * self.n_epochs
        parameters = list((policy if acting else policy.critic).parameters())
        samples = self.rollout_buffer.samples()._replace(observations=self._observations)
        samples = samples.to(self.device)
        statistics: list[th.Tensor] = []

        def gradients_of(rows: th.Tensor) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
            return self._gradients(samples.at(rows.to(self.device)), parameters, acting)

        assert self.batch_size is not None
        chunk = self.batch_size if self._on_gpu else CHUNK
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.minibatches(self.batch_size, chunk):
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
                for network in (policy.actor, policy.critic) if self.clip_apart else (policy,):
                    th.nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm)
                policy.optimizer.step()
            self._n_updates += 1
        decisions = self.n_epochs * self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs
        self._record(th.stack(statistics).sum(0) / decisions)

    def _gradients(
        self, chunk: Samples, parameters: list[th.nn.Parameter], acting: bool
    ) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
        """Return the gradients of the loss summed over a chunk, and the sums of `STATISTICS`.

        Args:
            chunk: The decisions.
            parameters: What the gradients are of.
            acting: Whether the actor learns, too.
        """
        log_probs = self.policy.log_probs(chunk.observations, chunk.action_masks)
        log_prob = of_actions(log_probs, chunk.actions)
        log_ratio = log_prob - chunk.old_log_prob
        ratio = log_ratio.exp()
        clip = self._clip_range()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        policy_loss = -th.min(chunk.advantages * ratio, chunk.advantages * clipped).sum()
        divergence = self.policy.actor.divergence(chunk.observations, log_probs)
        price = self.ent_coef * (chunk.pace * divergence).sum()
        values = self.policy.predict_values(chunk.observations)
        value_loss = F.mse_loss(values.flatten(), chunk.returns, reduction="sum")
        loss = self.vf_coef * value_loss
        if acting:
            loss = loss + policy_loss + price
        gradients = th.autograd.grad(loss, parameters)
        with th.no_grad():
            kl = (ratio - 1 - log_ratio).sum()  # Schulman's estimate of the KL divergence
            outside = ((ratio - 1).abs() > clip).float().sum()
            entropy_loss = (log_probs.exp() * log_probs).sum()
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
            for verbs, beta in zip(("core", "full"), self.policy.actor.beta.tolist(), strict=True):
                self.logger.record(f"train/beta_{verbs}", beta)

    def action_counts(self) -> npt.NDArray[np.int64]:
        """Return how often each action was taken in the last rollout, int64[A]."""
        buffer = self.rollout_buffer
        return np.bincount(buffer.actions.ravel(), minlength=buffer.mask_dims)
