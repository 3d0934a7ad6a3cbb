"""Masked PPO in one file, in the style of CleanRL, on the natively batched environment.

python examples/cleanrl_style_ppo.py --scenario demo --total-steps 300000 --seed 1

Two things differ from textbook PPO, both because decisions are not evenly spaced in time: a step is
discounted by the simulated time it took, exp(-dt / horizon), and where an episode is truncated the
value of its last observation is added. This is to be read; `mmrl train` has a better network.
"""

import argparse
import time

import gymnasium as gym
import numpy as np
import torch
from torch import nn

import mmrl  # noqa: F401 (registers the environment)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--scenario", default="demo", help="name or path of a scenario")
    parser.add_argument("--total-steps", type=int, default=300_000, help="decisions in all")
    parser.add_argument("--num-envs", type=int, default=64, help="nodes in parallel")
    parser.add_argument("--num-steps", type=int, default=64, help="decisions per node and update")
    parser.add_argument("--epochs", type=int, default=2, help="passes over a batch")
    parser.add_argument("--minibatches", type=int, default=2, help="parts of a batch")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--horizon-s", type=float, default=20.0, help="time scale of the discount")
    parser.add_argument("--trace-s", type=float, default=5.0, help="time scale of GAE")
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--entropy", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


class Agent(nn.Module):
    """Two small networks: logits of the legal actions, and the value."""

    def __init__(self, observation_size: int, num_actions: int, width: int = 64) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            nn.Linear(observation_size, width), nn.ReLU(), nn.Linear(width, num_actions)
        )
        self.critic = nn.Sequential(
            nn.Linear(observation_size, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def policy(
        self, observation: torch.Tensor, mask: torch.Tensor
    ) -> torch.distributions.Categorical:
        """Return the distribution over legal actions."""
        logits = self.actor(observation).masked_fill(~mask, -1e9)
        return torch.distributions.Categorical(logits=logits, validate_args=False)

    def value(self, observation: torch.Tensor) -> torch.Tensor:
        """Return the value, float32[N]."""
        return self.critic(observation).squeeze(-1)


def main(arguments: list[str] | None = None) -> float:
    """Train; return the mean goodput of the last hundred episodes."""
    args = parse(arguments)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    envs = gym.make_vec("mmrl/MultiModelServing-v0", num_envs=args.num_envs, scenario=args.scenario)
    shape = (args.num_steps, args.num_envs)
    size, num_actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
    agent = Agent(size, num_actions)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    observations = torch.zeros((*shape, size))
    masks = torch.zeros((*shape, num_actions), dtype=torch.bool)
    actions = torch.zeros(shape, dtype=torch.long)
    logprobs, values, rewards, dts, dones = (torch.zeros(shape) for _ in range(5))
    goodputs: list[float] = []
    observation, info = envs.reset(seed=args.seed)
    started = time.monotonic()

    for update in range(max(1, args.total_steps // (args.num_steps * args.num_envs))):
        for t in range(args.num_steps):
            observations[t] = torch.as_tensor(observation)
            masks[t] = torch.as_tensor(info["action_mask"], dtype=torch.bool)
            with torch.no_grad():
                policy = agent.policy(observations[t], masks[t])
                actions[t] = policy.sample()
                logprobs[t] = policy.log_prob(actions[t])
                values[t] = agent.value(observations[t])
            observation, reward, terminated, truncated, info = envs.step(actions[t].numpy())
            dts[t] = torch.as_tensor(envs.unwrapped.last_dt_s)
            rewards[t] = torch.as_tensor(reward)
            dones[t] = torch.as_tensor(terminated | truncated)
            for i in np.flatnonzero(truncated):  # the episode would have gone on: bootstrap
                final = torch.as_tensor(info["final_obs"][i])
                with torch.no_grad():
                    rewards[t, i] += torch.exp(-dts[t, i] / args.horizon_s) * agent.value(final)
            if "final_info" in info:
                ended = info["final_info"]["_metrics"]
                goodputs += info["final_info"]["metrics"]["goodput"][ended].tolist()

        # Generalised advantages. Discounts depend on the time that passed: 1 within an instant.
        gamma, decay = torch.exp(-dts / args.horizon_s), torch.exp(-dts / args.trace_s)
        advantages = torch.zeros(shape)
        with torch.no_grad():
            next_value, advantage = agent.value(torch.as_tensor(observation)), torch.zeros(shape[1])
        for t in reversed(range(args.num_steps)):
            alive = 1.0 - dones[t]
            delta = rewards[t] + gamma[t] * next_value * alive - values[t]
            advantage = delta + gamma[t] * decay[t] * alive * advantage
            advantages[t], next_value = advantage, values[t]

        batch = (observations, masks, actions, logprobs, advantages, advantages + values)
        flat = [tensor.flatten(0, 1) for tensor in batch]
        for _ in range(args.epochs):
            for rows in torch.randperm(len(flat[0])).chunk(args.minibatches):
                o, m, a, old, adv, ret = (tensor[rows] for tensor in flat)
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                policy = agent.policy(o, m)
                ratio = (policy.log_prob(a) - old).exp()
                clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                policy_loss = -torch.min(ratio * adv, clipped * adv).mean()
                value_loss = 0.5 * (agent.value(o) - ret).pow(2).mean()
                loss = policy_loss + 0.5 * value_loss - args.entropy * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()

        steps = (update + 1) * args.num_steps * args.num_envs
        rate = steps / (time.monotonic() - started)
        recent = float(np.mean(goodputs[-100:])) if goodputs else float("nan")
        print(f"{steps:>9,} steps  {rate:>7,.0f}/s  goodput {recent:.3f}  loss {loss.item():.3f}")
    return recent


if __name__ == "__main__":
    main()
