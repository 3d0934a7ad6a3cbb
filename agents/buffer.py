"""`EventTimeRolloutBuffer`: returns and advantages over decisions that lie unevenly in time.

Decisions of a node are milliseconds or many seconds apart, so discount and trace decay go by the
time between them, not by their count: a step of ``dt`` s has ``gamma = exp(-dt / discount_s)``
and ``lambda = exp(-dt / trace_s)``, both 1 for decisions at the same instant. An episode that was
truncated bootstraps with the value of its last observation, discounted the same way. Where a load
takes seconds, what a decision leads to comes later: there time counts slower, by the node's pace.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer

Floats = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Allocate = Callable[[str, Shape, type], npt.NDArray[Any]]  # name, shape, type -> zeros

STAKE = 0.05  # value, half a miss at PPO's scale, below which nodes are not blown up
LARGEST_ADVANTAGE = 20.0  # few are larger; cutting more would hide what disasters cost


def event_time_advantages(
    rewards: Floats,
    values: Floats,
    next_values: Floats,
    ends: npt.NDArray[np.bool_],
    dt_s: Floats,
    discount_s: float,
    trace_s: float,
) -> Floats:
    """Return generalised advantage estimates with discount and trace decay by elapsed time.

    With g = exp(-dt / discount_s) and l = exp(-dt / trace_s), the estimate is
    ``A[t] = r[t] + g[t] V'[t] - V[t] + g[t] l[t] A[t + 1]``, the last term 0 where an episode
    ends: Schulman et al. 2016 with the constants of a semi-Markov process.

    Args:
        rewards: float32[T, N].
        values: float32[T, N], of the observations acted on.
        next_values: float32[T, N], of what followed: 0 after a terminated episode, the value of
            the last observation after a truncated one.
        ends: bool[T, N], an episode ended with this step.
        dt_s: float32[T, N], time that the step took.
        discount_s: Time constant of the discount.
        trace_s: Time constant of the trace decay.
    """
    gamma = np.exp(-dt_s / discount_s)
    delta = rewards + gamma * next_values - values
    decay = np.where(ends, np.float32(0), gamma * np.exp(-dt_s / trace_s))
    advantages = np.zeros_like(rewards)
    last = np.zeros_like(rewards[0])
    for t in range(len(rewards) - 1, -1, -1):
        last = delta[t] + decay[t] * last
        advantages[t] = last
    return advantages


def normalised(advantages: Floats, values: Floats) -> Floats:
    """Return advantages with mean 0 and spread 1, relative to what is at stake.

    One overloaded node loses more requests in a second than a quiet one in an episode, and would
    make most of the gradient: each advantage is divided by the misses that are expected from its
    state on, which is what the value says. The divisor may not depend on what then happens. A
    node's own spread over the rollout does: it is large where a decision turned out badly, and
    dividing by it makes rare disasters look small and risks worth taking.

    Args:
        advantages: float32[T, N].
        values: float32[T, N], of the observations; rewards are negative, and so are they.
    """
    scaled = advantages / (STAKE + np.maximum(-values, 0))
    scaled = (scaled - scaled.mean()) / (scaled.std() + 1e-8)
    return np.asarray(scaled.clip(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE), np.float32)


class Samples(NamedTuple):
    """Decisions to learn from; tensors over B decisions. ``pace`` is that of their nodes."""

    observations: th.Tensor
    actions: th.Tensor
    action_masks: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    pace: th.Tensor

    def at(self, rows: th.Tensor) -> "Samples":
        """Return some of them."""
        return Samples(*(array[rows] for array in self))

    def to(self, device: th.device) -> "Samples":
        """Return them on a device."""
        return Samples(*(array.to(device) for array in self))


class EventTimeRolloutBuffer(MaskableRolloutBuffer):
    """A rollout of ``buffer_size`` decisions of each of ``n_envs`` nodes.

    Values are not known while the rollout is collected: they are computed for all of it at once
    and handed to `finish`.

    Args:
        *args: Of `MaskableRolloutBuffer`.
        discount_s: Time constant of the discount.
        trace_s: Time constant of the trace decay (lambda).
        elapsed_time: Discount each step by its own time; else all by their mean.
        allocate: Makes the arrays that `store` writes to; memory of its own unless given.
        **kwargs: Of `MaskableRolloutBuffer`; ``gamma`` and ``gae_lambda`` are not used.
    """

    dt_s: Floats
    pace: Floats

    def __init__(
        self,
        *args: Any,
        discount_s: float,
        trace_s: float,
        elapsed_time: bool = True,
        allocate: Allocate | None = None,
        **kwargs: Any,
    ) -> None:
        self.discount_s, self.trace_s, self.elapsed_time = discount_s, trace_s, elapsed_time
        self._allocate = allocate or (lambda name, shape, kind: np.zeros(shape, kind))
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Forget the rollout; the arrays are kept."""
        self.pos, self.full, self.generator_ready = 0, False, False
        if hasattr(self, "dt_s"):
            return
        shape = (self.buffer_size, self.n_envs)
        assert isinstance(self.action_space, spaces.Discrete)
        self.mask_dims = int(self.action_space.n)
        self.observations = self._allocate("observations", (*shape, *self.obs_shape), np.float32)
        self.action_masks = self._allocate("action_masks", (*shape, self.mask_dims), np.bool_)
        self.actions = self._allocate("actions", shape, np.int64)
        self.ends = self._allocate("ends", shape, np.bool_)
        for name in ("rewards", "dt_s", "pace", "log_probs"):
            setattr(self, name, self._allocate(name, shape, np.float32))
        for name in ("values", "advantages", "returns"):
            setattr(self, name, np.zeros(shape, np.float32))

    def store(
        self,
        step: int,
        rows: slice,
        observations: Floats,
        action_masks: npt.NDArray[np.bool_],
        actions: npt.NDArray[np.int64],
        log_probs: Floats,
        rewards: npt.NDArray[np.floating[Any]],
        dt_s: npt.NDArray[np.floating[Any]],
        pace: npt.NDArray[np.floating[Any]],
        ends: npt.NDArray[np.bool_],
    ) -> None:
        """Write one step of some nodes: what was seen, legal, done and rewarded, arrays over N.

        Others may write other rows meanwhile. ``pace``: by which time constants are stretched.
        """
        self.observations[step, rows] = observations
        self.action_masks[step, rows] = action_masks
        self.actions[step, rows] = actions
        self.log_probs[step, rows] = log_probs
        self.rewards[step, rows] = rewards
        self.dt_s[step, rows] = dt_s
        self.pace[step, rows] = pace
        self.ends[step, rows] = ends

    def finish(self, values: Floats, last_values: Floats, bootstrap: Floats) -> None:
        """Compute advantages and returns of the rollout.

        Args:
            values: float32[T, N], of the observations stored.
            last_values: float32[N], of the observations after the rollout.
            bootstrap: float32[T, N], where an episode was truncated the value of its last
                observation, else 0.
        """
        self.values[:] = values
        following = np.concatenate((values[1:], last_values[None]))
        next_values = np.where(self.ends, bootstrap, following).astype(np.float32)
        rewards = np.divide(self.rewards, self.pace, dtype=np.float32)  # values of one size
        dt_s = self.dt_s / self.pace
        if not self.elapsed_time:
            dt_s[:] = dt_s.mean()
        self.advantages[:] = event_time_advantages(
            rewards,
            values,
            next_values,
            self.ends,
            dt_s,
            self.discount_s,
            self.trace_s,
        )
        self.returns[:] = self.advantages + values
        self.full = True

    def flat(self, name: str) -> th.Tensor:
        """Return an array of the rollout as a tensor [T * N, ...] that shares its memory."""
        array: npt.NDArray[Any] = getattr(self, name)
        return th.from_numpy(array.reshape(-1, *array.shape[2:]))

    def samples(self) -> Samples:
        """Return all decisions of the rollout; advantages are those of `normalised`."""
        assert self.full, "the rollout is not complete"
        return Samples(
            self.flat("observations"),
            self.flat("actions"),
            self.flat("action_masks"),
            self.flat("log_probs"),
            th.from_numpy(normalised(self.advantages, self.values).reshape(-1)),
            self.flat("returns"),
            self.flat("pace"),
        )

    def minibatches(self, batch_size: int, chunk_size: int) -> Iterator[tuple[th.Tensor, ...]]:
        """Yield minibatches in random order, each as the rows of chunks of at most a size."""
        order = th.randperm(self.buffer_size * self.n_envs)
        for batch in th.split(order, batch_size):
            yield th.split(batch, chunk_size)
