"""How fast the environment is, beside its peers, measured in one run on one thread.

    python benchmarks/env_speed.py [--seconds 5] [--envs 64] [--sched-sim PYTHON]

Prints one line per figure and, with ``--out``, writes them as JSON. ``--sched-sim`` names the
Python of an environment that has the package sched-sim 0.2.1 (a peer, not a dependency).
The ratios matter: they were taken in the same run on the same machine.
"""

import argparse
import json
import os
import platform
import subprocess
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
from gymnasium.utils.performance import benchmark_step

import mmrl
from mmrl.node.jit import jit
from mmrl.rollout import suggestions
from mmrl.rules import get_rule
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.seeds import episode_rng
from mmrl.sim.batch import Simulator

SCENARIO = "h200-24"  # eight models

SCHED_SIM = """
import json, time
from sched_sim.core.event_engine import Simulator
from sched_sim.hardware.presets import get_hardware_profile
from sched_sim.memory.preemption import PreemptionMode
from sched_sim.schedulers.factory import create_scheduler
from sched_sim.workloads.generator import generate_workload
hardware = get_hardware_profile("a100")
begun, iterations, simulated = time.perf_counter(), 0, 0.0
while time.perf_counter() - begun < {seconds}:
    scheduler = create_scheduler("chunked", hardware, PreemptionMode.RECOMPUTE, token_budget=512)
    simulator = Simulator(hardware, scheduler, preemption_mode=PreemptionMode.RECOMPUTE)
    simulator.submit_workload(generate_workload(rate_req_per_s=10.0, duration_s=60.0,
        workload_type="chatbot", pattern="poisson", seed=0))
    simulator.run()
    iterations += len(simulator.iteration_records)
    simulated += simulator.current_time
elapsed = time.perf_counter() - begun
print(json.dumps([iterations / elapsed, simulated / elapsed]))
"""


@jit
def random_legal(masks: np.ndarray, draws: np.ndarray, actions: np.ndarray) -> None:
    for i in range(len(masks)):
        legal = 0
        for a in range(masks.shape[1]):
            legal += masks[i, a]
        pick = int(draws[i] * legal)
        for a in range(masks.shape[1]):
            if masks[i, a]:
                if pick == 0:
                    actions[i] = a
                    break
                pick -= 1


def native(policy: str, num_envs: int, seconds: float, load: float) -> tuple[float, float, float]:
    """Return decisions/s, simulated s/s and simulated s per decision of a batch.

    Observation and mask are written for every decision; resets are included.
    """
    simulator = Simulator(get_scenario(SCENARIO, load=load).sampler(), num_envs)
    rule = get_rule("slack")
    observations = np.zeros((num_envs, simulator.observation_size), np.float32)
    masks = np.zeros((num_envs, simulator.num_actions), np.bool_)
    actions = np.zeros(num_envs, np.int64)
    rng = np.random.default_rng(0)
    episode = 0

    def reset(i: int) -> None:
        nonlocal episode
        simulator.reset(i, episode_rng("train", episode))
        if policy == "slack":
            rule.prepare(simulator.nodes[i])
        episode += 1

    def run(limit_s: float) -> tuple[int, float, float]:
        decisions, simulated, begun = 0, 0.0, time.perf_counter()
        while time.perf_counter() - begun < limit_s:
            for _ in range(50):
                simulator.observe(observations)
                simulator.masks(masks)
                if policy == "slack":
                    suggestions(simulator, rule, actions)
                else:
                    random_legal(masks, rng.random(num_envs), actions)
                simulator.step(actions)
                simulated += simulator.dt_s.sum()
                decisions += num_envs
                for i in np.flatnonzero(simulator.done):
                    reset(int(i))
        return decisions, simulated, time.perf_counter() - begun

    for i in range(num_envs):
        reset(i)
    run(0.5)
    decisions, simulated, elapsed = run(seconds)
    return decisions / elapsed, simulated / elapsed, simulated / decisions


def scalar(seconds: float) -> float:
    """Return steps/s through ``gym.make`` with its default wrappers, random legal actions."""
    env = gym.make("mmrl/MultiModelServing-v0")
    rng = np.random.default_rng(0)
    _, info = env.reset(seed=0)
    steps, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        legal = np.flatnonzero(info["action_mask"])
        *_, terminated, truncated, info = env.step(int(legal[int(rng.random() * len(legal))]))
        steps += 1
        if terminated or truncated:
            _, info = env.reset()
    return steps / (time.perf_counter() - begun)


def cartpole(seconds: float) -> tuple[float, float]:
    """Return steps/s of Gymnasium's CartPole: plain, and its native batch of 64."""
    plain = float(benchmark_step(gym.make("CartPole-v1"), target_duration=round(seconds), seed=0))
    envs = gym.make_vec("CartPole-v1", 64)
    envs.reset(seed=0)
    actions = envs.action_space.sample()
    steps, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        envs.step(actions)
        steps += 64
    return plain, steps / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure")
    parser.add_argument("--envs", type=int, default=64, help="nodes of a batch")
    parser.add_argument("--sched-sim", default="", help="Python that has sched-sim 0.2.1")
    parser.add_argument("--out", default="", help="JSON file")
    given = parser.parse_args()
    figures: dict[str, float] = {}

    def report(name: str, figure: float) -> None:
        figures[name] = figure
        print(f"{name:<58} {figures[name]:>14,.0f}", flush=True)

    print(f"mmrl {mmrl.__version__}, Python {platform.python_version()}, one thread")
    report("gym.make, steps/s", scalar(given.seconds))
    for policy, load in (("slack", 0.5), ("slack", 1.0), ("random", 1.0)):
        decisions, simulated, each = native(policy, given.envs, given.seconds, load)
        name = f"batch of {given.envs}, 8 models, {policy}, load {load}"
        report(f"{name}: decisions/s", decisions)
        report(f"{name}: simulated s/s", simulated)
        report(f"{name}: simulated ms/decision", each * 1e3)
    plain, batch = cartpole(given.seconds)
    report("CartPole, gym.make, steps/s", plain)
    report("CartPole, native batch of 64, steps/s", batch)
    if given.sched_sim:
        script = SCHED_SIM.format(seconds=given.seconds)
        answer = subprocess.run(
            [given.sched_sim, "-c", script], check=True, capture_output=True, text=True
        )
        iterations, simulated = json.loads(answer.stdout.splitlines()[-1])
        report("sched-sim 0.2.1, iterations/s", iterations)
        report("sched-sim 0.2.1, simulated s/s", simulated)
    if given.out:
        from mmrl.files import write_json

        write_json(given.out, figures)


if __name__ == "__main__":
    main()
